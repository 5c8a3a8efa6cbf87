"""A model by name: files, weights in 4 bits with LoRA adapters, tokenizer, prompt."""
import json
import logging
import os
import sys
import warnings
from pathlib import Path

import torch
from huggingface_hub.utils import enable_progress_bars
from transformers.utils import logging as transformers_logging

from react_env import Question, prompt_text

QUIET = ("fan_in_fan_out", ".*is_gradient_checkpointing",  # peft mends GPT-2, asks the old way
         "Cannot .*able progress bars")                    # where the environment has settled it
for message in QUIET:
    warnings.filterwarnings("ignore", message=message)
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()  # of reading weights, and of downloading them too;
enable_progress_bars()                       # ... but that takes minutes

FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]  # of a hub's model: no pickles
NOT_FILES = ["*/*", "consolidated*"]  # of these: folders for other engines, a second copy
SLOT = Question("", "{the question}", (), "", 0)  # stands for any question in a prompt


class ModelError(ValueError):
    """A model that cannot be loaded or used, in one line."""


def load_model(config):
    """-> (model with LoRA adapters, tokenizer) of `config.model`."""
    import_bitsandbytes()
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    folder = find_files(config.model_path)
    if not any(file for kind in ("tokenizer*", "vocab*", "*.model") for file in folder.glob(kind)):
        raise ModelError("no tokenizer in that folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False)  # nor ask on the terminal
    except Exception as error:
        raise ModelError(f"no tokenizer there ({first_line(error)})") from None
    dtype, quantization = compute_dtype(config.device), None
    if config.four_bit:
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                          bnb_4bit_compute_dtype=dtype)
    shape = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    for name, value in vars(shape).items():
        if "drop" in name and isinstance(value, float):
            setattr(shape, name, 0.0)  # the update must see the network that sampled
    model, found = AutoModelForCausalLM.from_pretrained(
        folder, config=shape, dtype=dtype, quantization_config=quantization, local_files_only=True,
        use_safetensors=True, trust_remote_code=False, output_loading_info=True,
        attn_implementation="packed", device_map={"": config.device})  # packing.py's
    if found["missing_keys"]:  # transformers would leave them random and say nothing
        raise ModelError(f"its files have no weights for {min(found['missing_keys'])}")
    if config.device == "cpu":
        check_blocks(model)
    torch.manual_seed(config.seed)  # the LoRA matrices A start at random, B at zero
    model = get_peft_model(model, LoraConfig(  # in 32 bits, whatever the base is in
        r=config.lora_rank, lora_alpha=2 * config.lora_rank, target_modules="all-linear",
        lora_dropout=0.0, task_type="CAUSAL_LM"))
    model.peft_config["default"].base_model_name_or_path = config.model_path  # not our cache
    return model, tokenizer


def find_files(name):
    """Folder of a model: a local one, or the hub's files, downloaded once and then cached."""
    from huggingface_hub import errors, snapshot_download
    if os.path.isdir(name):
        return Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or os.path.exists(name):
        raise ModelError("no such folder")
    try:
        return Path(snapshot_download(name, allow_patterns=FILES,
                                      ignore_patterns=NOT_FILES))
    except errors.GatedRepoError:
        why = (f"it is gated: accept its terms at huggingface.co/{name}, then log in with "
               "`hf auth login`")
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        why = "neither a folder here nor a public model on huggingface.co"
    except errors.LocalEntryNotFoundError:
        why = "not downloaded yet, and huggingface.co cannot be reached"
    except Exception as error:
        why = f"the download failed ({first_line(error)})"
    raise ModelError(why)


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
            raise ModelError(f"bitsandbytes on CPU misreads {name}, whose rows of "
                             f"{module.in_features} weights do not fill its blocks of "
                             f"{module.weight.blocksize}; use --no-4bit")


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
    def encode(text):
        return tokenizer(text, add_special_tokens=False).input_ids
    text, start = prompt_text(SLOT, few_shot), []
    if chat:
        said, thought = text.rsplit("\n", 1)
        text = render(tokenizer, add_generation_prompt=True, user=said) + thought
    elif tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]:
        start = [tokenizer.bos_token_id]
    if text.count(SLOT.text) != 1:
        raise ModelError("the chat template does not show what the user says, once")
    before, behind = text.split(SLOT.text)
    return start + encode(before.removesuffix(" ")), encode(behind)


def end_of_turn(tokenizer):
    """Ids, at most one, with which the chat template ends what the assistant says."""
    if not tokenizer.chat_template:
        return set()
    text = render(tokenizer, user="?", assistant=SLOT.text)
    ids = tokenizer(text.rpartition(SLOT.text)[2], add_special_tokens=False).input_ids
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
        raise ModelError(f"the chat template fails: {first_line(error)}") from None


def first_line(error):
    return str(error).strip().split("\n")[0][:200]
