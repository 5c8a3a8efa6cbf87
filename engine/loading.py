"""A model by name: files, weights in 4 bits with LoRA adapters, tokenizer, prompt."""
import json
import logging
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.utils import enable_progress_bars
from transformers.utils import logging as transformers_logging

import engine.attention  # noqa: F401  (registers the attention named "packed")
from engine.errors import UsageError, first_line
from engine.examples import FEW_SHOT
from react_env import Question, prompt_text
from tree import Node

QUIET = ("fan_in_fan_out", ".*is_gradient_checkpointing",  # peft mends GPT-2, asks the old way
         "Cannot .*able progress bars")                    # where the environment has settled it
for message in QUIET:
    warnings.filterwarnings("ignore", message=message)
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()  # of reading weights, and of downloading them too;
enable_progress_bars()                       # ... but that takes minutes

EMBEDDED = Path(__file__).resolve().parents[1] / "world"  # holds the policies in the box
FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]  # of a hub's model: no pickles
NOT_FILES = ["*/*", "consolidated*"]  # of these: folders for other engines, a second copy
LORA_RANK = 16
SLOT = Question("", "{the question}", (), "", 0)  # stands for any question in a prompt


def model_folder(name):
    """tiny, tiny2: in the box, wherever we are started; else the name as it is."""
    embedded = EMBEDDED / name
    return str(embedded) if name.isalnum() and embedded.is_dir() else name


def load_model(name, four_bit, device, seed):
    """-> (model with LoRA adapters, tokenizer)."""
    import_bitsandbytes()
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    folder = find_files(name)
    local = {"local_files_only": True, "trust_remote_code": False}  # nor ask on the terminal
    if not any(file for kind in ("tokenizer*", "vocab*", "*.model") for file in folder.glob(kind)):
        raise UsageError("no tokenizer in that folder")
    tokenizer = AutoTokenizer.from_pretrained(folder, **local)
    shape = AutoConfig.from_pretrained(folder, **local)
    for key, value in vars(shape).items():
        if "drop" in key and isinstance(value, float):
            setattr(shape, key, 0.0)  # the update must see the network that sampled
    dtype, quantization = compute_dtype(device), None
    if four_bit:
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                          bnb_4bit_compute_dtype=dtype)
    model, found = AutoModelForCausalLM.from_pretrained(
        folder, config=shape, dtype=dtype, quantization_config=quantization, use_safetensors=True,
        output_loading_info=True, attn_implementation="packed", device_map={"": device}, **local)
    if found["missing_keys"]:  # transformers would leave them random and say nothing
        raise UsageError(f"its files have no weights for {min(found['missing_keys'])}")
    if device == "cpu":
        check_blocks(model)
    torch.manual_seed(seed)  # the LoRA matrices A start at random, B at zero
    model = get_peft_model(model, LoraConfig(  # in 32 bits, whatever the base is in
        r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", lora_dropout=0.0,
        task_type="CAUSAL_LM"))
    model.peft_config["default"].base_model_name_or_path = name  # not our cache
    return model, tokenizer


def find_files(name):
    """Folder of a model: a local one, or the hub's files, downloaded once and then cached."""
    from huggingface_hub import snapshot_download
    if os.path.isdir(name):
        return Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or os.path.exists(name):
        raise UsageError("no such folder")
    try:
        return Path(snapshot_download(name, allow_patterns=FILES, ignore_patterns=NOT_FILES))
    except Exception as error:  # the hub has a dozen kinds, whose texts say what to do
        lines = str(error).split("\n\n")[-1]
        raise UsageError(f"no folder here, and from the hub: {first_line(lines)}") from None


def knows_bare_prompt(folder):
    """Was the model in this folder made by our warm start? Its config.json says so. Such a model
    has been taught the bare prompt and has never seen the examples."""
    try:
        saved = json.loads(Path(folder, "config.json").read_text())
        return saved.get("trace_mini_prompt") == "bare"
    except (OSError, ValueError, AttributeError):  # no such folder or file; loading will tell
        return False


def compute_dtype(device):
    """bfloat16 where the card computes in it, else float32: float16 has too small a range for
    these gradients unless the loss is scaled, and for the activations of some models at all."""
    bf16 = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if bf16 else torch.float32


def check_blocks(model):
    """On CPU, bitsandbytes 0.50 misreads NF4 rows that do not fill whole blocks: the weights
    come back with an error of a quarter instead of a tenth, and nothing says so."""
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit" and module.in_features % module.weight.blocksize:
            raise UsageError(f"bitsandbytes on CPU misreads {name}, whose rows of "
                             f"{module.in_features} weights do not fill its blocks of "
                             f"{module.weight.blocksize}; use --no-4bit")


def check_logits(policy):
    """Some architectures scale their logits in ways of their own, or have an attention that is
    more than ours: refuse those. What they compute as they come is "eager". Errors are measured
    against the spread of the logits: in bfloat16, 30 layers round to 1 to 4 % of it, whatever the
    logits are; what a wrong attention does is 20 % and more."""
    base, ids = policy.model.get_base_model(), torch.arange(3, device=policy.device)[None]
    root = Node(np.arange(3), 0, None)
    left = Node(np.arange(3, 7), 4, None, root)
    right = Node(np.arange(7, 11), 4, None, root)
    with policy.sampling():
        forked = policy.logprobs([root, left, right], [right])
        alone = policy.logprobs([root, right], [right])
        ours = policy.logits(policy.body(input_ids=ids).last_hidden_state)
        base.set_attn_implementation("eager")
        theirs = policy.model(input_ids=ids).logits[..., :policy.num_words]
    base.set_attn_implementation("packed")
    most = (0.01 if theirs.dtype == torch.float32 else 0.1) * theirs.float().std()
    for a, b in ((forked, alone), (ours, theirs)):
        error = (a.float() - b.float()).square().mean().sqrt()
        if not error <= most:
            raise UsageError("not supported: its logits are not head(hidden state), or its "
                             "attention is not the usual one")


def import_bitsandbytes():
    """Import it without its search for a CPU kernel on a hub: where the package `kernels` is
    installed that would go to the network, and where it is not it prints a warning."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    hidden, sys.modules["kernels"] = sys.modules.get("kernels"), None  # import fails, by design
    try:
        import bitsandbytes
        return bitsandbytes
    except ImportError:
        return None  # then only --no-4bit works, and loading says so
    finally:
        del sys.modules["kernels"]
        if hidden is not None:
            sys.modules["kernels"] = hidden


# ---------------------------------------------------------------- prompt
def prompt_ids(tokenizer, few_shot, chat):
    """Ids of the prompt before and behind the question, which is encoded apart, as plain text:
    no question can put a special token into the prompt, and a template's own stay special.

    With `chat` all stands in one user turn (some templates, Gemma's, refuse a system role), and
    the assistant's turn begins with "Thought:". What follows is appended as ids, turn by turn."""
    text, start = (FEW_SHOT if few_shot else "") + prompt_text(SLOT), []
    if chat:
        said, thought = text.rsplit("\n", 1)
        text = render(tokenizer, add_generation_prompt=True, user=said) + thought
    elif tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]:
        start = [tokenizer.bos_token_id]
    if text.count(SLOT.text) != 1:
        raise UsageError("the chat template does not show what the user says, once")
    before, behind = text.split(SLOT.text)
    before = tokenizer(before.removesuffix(" "), add_special_tokens=False).input_ids
    return start + before, tokenizer(behind, add_special_tokens=False).input_ids


def end_of_turn(tokenizer):
    """Ids, at most one, with which the chat template ends what the assistant says."""
    if not tokenizer.chat_template:
        return set()
    text = render(tokenizer, user="?", assistant=SLOT.text).rpartition(SLOT.text)[2]
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return set([i for i in ids if i in tokenizer.added_tokens_decoder][:1])


def render(tokenizer, add_generation_prompt=False, **said):
    """A conversation, role=text, as the chat template writes it. Reasoning models are asked not
    to think at length, and a date in the prompt would change it from day to day."""
    turns = [{"role": role, "content": text} for role, text in said.items()]
    try:
        return tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=add_generation_prompt,
            enable_thinking=False, date_string="26 Jul 2024")
    except Exception as error:
        raise UsageError(f"the chat template fails: {first_line(error)}") from None
