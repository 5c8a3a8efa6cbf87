"""A model by name: files, weights in 4 bits with LoRA adapters, tokenizer."""
import logging
import os
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from huggingface_hub.utils import enable_progress_bars
from transformers.utils import logging as transformers_logging

import engine.attention  # noqa: F401  (registers the attention named "packed")
from engine.errors import UsageError, first_line
from tree import Node, path_ids

QUIET = ("fan_in_fan_out", ".*is_gradient_checkpointing",  # peft mends GPT-2, asks the old way
         "Cannot .*able progress bars")                    # where the environment has settled it
for message in QUIET:
    warnings.filterwarnings("ignore", message=message)
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()  # of reading weights, and of downloading them too;
enable_progress_bars()                       # ... but that takes minutes

FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]  # of a hub's model: no pickles
NOT_FILES = ["*/*", "consolidated*"]  # of these: folders for other engines, a second copy
LOCAL = {"local_files_only": True, "trust_remote_code": False}  # nor ask on the terminal
LORA_RANK = 16


def load_model(name, four_bit, device, seed):
    """-> (model with LoRA adapters, tokenizer, a notice or ""). The base model's `name_or_path` is
    where its files are."""
    import_bitsandbytes()
    files = find_files(name)
    if files.suffix != ".gguf":
        return load_folder(files, name, four_bit, device, seed)
    with TemporaryDirectory() as folder:
        unpack_gguf(files, folder)
        loaded = load_folder(Path(folder), name, four_bit, device, seed)
    loaded[0].get_base_model().name_or_path = str(files)
    return loaded


def unpack_gguf(file, folder):
    """Write a GGUF file as a folder with weights in 16 bits: transformers makes NF4 from such a
    folder, not from the file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    if not find_spec("gguf"):
        raise UsageError("a GGUF file is read by the package gguf: pip install gguf")
    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name, **LOCAL}
    model = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.float16, quantization_config=GgufConfig(dequantize=True))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


def load_folder(folder, name, four_bit, device, seed):
    """What load_model returns, from the files in a folder."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    if not any(file for kind in ("tokenizer*", "vocab*", "*.model") for file in folder.glob(kind)):
        raise UsageError("no tokenizer in that folder")
    tokenizer = AutoTokenizer.from_pretrained(folder, **LOCAL)
    shape = AutoConfig.from_pretrained(folder, **LOCAL)
    if shape.get_text_config() is not shape:
        raise UsageError("it reads more than text; only models of text alone can be used")
    notice = ""
    if getattr(shape, "quantization_config", None):
        notice = "\nthe files of the model are quantised already, and stay as they are"
    for key, value in vars(shape).items():
        if "drop" in key and isinstance(value, float):
            setattr(shape, key, 0.0)  # the update must see the network that sampled
    dtype, quantization = compute_dtype(device), None
    if four_bit:
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                          bnb_4bit_compute_dtype=dtype)
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, config=shape, dtype=dtype, quantization_config=quantization,
            use_safetensors=True, output_loading_info=True, attn_implementation="packed",
            device_map={"": device}, **LOCAL)
    except Exception:
        model_class = AutoModelForCausalLM._model_mapping.get(type(shape), None)
        if getattr(model_class, "_supports_attention_backend", True):
            raise
        raise UsageError("transformers does not let its attention be replaced") from None
    if found["missing_keys"]:  # transformers would leave them random and say nothing
        raise UsageError(f"its files have no weights for {min(found['missing_keys'])}")
    if device == "cpu":
        check_blocks(model)
    torch.manual_seed(seed)  # the LoRA matrices A start at random, B at zero
    model = get_peft_model(model, LoraConfig(  # in 32 bits, whatever the base is in
        r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", lora_dropout=0.0,
        task_type="CAUSAL_LM"))
    model.peft_config["default"].base_model_name_or_path = name  # not our cache
    return model, tokenizer, notice


def find_files(name):
    """A GGUF file, or the folder of a model: a local one, or the hub's files, downloaded once and
    then cached."""
    from huggingface_hub import snapshot_download
    if os.path.isdir(name) or (name.endswith(".gguf") and os.path.isfile(name)):
        return Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or os.path.exists(name):
        raise UsageError("no such folder, nor GGUF file")
    try:
        return Path(snapshot_download(name, allow_patterns=FILES, ignore_patterns=NOT_FILES))
    except Exception as error:  # the hub has a dozen kinds, whose last paragraph says why
        why = first_line(str(error).split("\n\n")[-1])
        raise UsageError(f"no folder here, and from the hub: {why}") from None


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


def check_vocabulary(tokenizer, num_rows, end_ids):
    """-> (number of words, ids below it that no text stands for). UsageError where the tokenizer
    or the ends of a text know words that the model has no weights for."""
    ids = set(tokenizer.get_vocab().values())
    highest = max(ids | end_ids)
    if highest >= num_rows:
        raise UsageError(f"its tokenizer or its end of text has id {highest}, but its weights end "
                         f"at {num_rows - 1}: they do not belong together")
    return max(ids) + 1, sorted(set(range(max(ids))) - ids)


def steady_context(policy, context):
    """The context, halved until a far position leaves the logits at near ones as they are. Some
    encodings of positions (longrope) are others in a long pass: a path would depend on how long
    its neighbours are. As many tokens in both passes: on a GPU, bitsandbytes takes other kernels
    for more tokens (from 33 on an H200), which round otherwise."""
    near = range(min(32, context // 2))

    def logits(last):
        places = torch.tensor([[*near, last]], device=policy.device)
        return policy.logits(policy.body(input_ids=places % policy.num_words, position_ids=places,
                                         use_cache=False).last_hidden_state[0, :len(near)]).float()

    with policy.sampling():
        alone = logits(len(near))
        most = (1e-4 if policy.head.weight.dtype == torch.float32 else 0.05) * alone.std()
        while context > 8 and (logits(context - 1) - alone).square().mean().sqrt() > most:
            context //= 2
    return context


def check_logits(policy):
    """Some architectures scale their logits in ways of their own, or have an attention that is
    more than ours: refuse those. What they compute as they come is "eager". Errors are measured
    against the spread of the logits: in bfloat16, 30 layers round to 1 to 4 % of it, whatever the
    logits are; what a wrong attention does is 20 % and more."""
    base, lengths = policy.model.get_base_model(), [35]
    window = getattr(base.config, "sliding_window", None)
    if window and 35 + window <= policy.context:
        lengths.append(35 + window)
    for length in lengths:
        places = np.arange(length) % policy.num_words
        root = Node(places[:-32], 0, None)
        left = Node(places[-32:-16], 16, None, root)
        right = Node(places[-16:], 16, None, root)
        ids = torch.tensor([*path_ids(right), *left.ids], device=policy.device)  # as many as ours
        with policy.sampling():
            ours = policy.logprobs([root, left, right], [right])
            base.set_attn_implementation("eager")
            logits = policy.model(input_ids=ids[None]).logits[0, -33:-17, :policy.num_words]
        base.set_attn_implementation("packed")
        theirs = logits.float().log_softmax(-1).gather(-1, ids[-32:-16, None])[:, 0]
        most = (0.01 if logits.dtype == torch.float32 else 0.1) * logits.float().std()
        if not (ours - theirs).square().mean().sqrt() <= most:
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


# ---------------------------------------------------------------- adapters
def adapter_weights(model):
    """{name: tensor}. (Left to find out whether embeddings belong to them, peft asks the hub.)"""
    from peft import get_peft_model_state_dict
    return get_peft_model_state_dict(model, save_embedding_layers=False)


def set_adapter(model, weights):
    from peft import set_peft_model_state_dict
    shapes = []
    for some in (weights, adapter_weights(model)):
        shapes.append({name: weight.shape for name, weight in some.items()})
    if shapes[0] != shapes[1]:  # peft would pass over what is missing
        raise UsageError("the checkpoint was made with a model of other shapes")
    set_peft_model_state_dict(model, weights)
