"""Small random models of any architecture, and tokenizers with chat templates like the real ones.

There are three families of tokenizers; architectures outside them borrow Qwen's.
"""
import json
import re

import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, GemmaTokenizer, Qwen2Tokenizer

from engine.examples import FEW_SHOT

FAMILIES = {  # tokens: begin of text, end of text, end of turn; chat template
    "qwen2": (None, "<|endoftext|>", "<|im_end|>", """\
{% if messages[0].role != 'system' %}<|im_start|>system
You are helpful.<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""),
    "llama": ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", """\
{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>

{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}\
<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""),
    "gemma2": ("<bos>", "<eos>", "<end_of_turn>", """\
{{ bos_token }}{% for m in messages %}\
{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}<start_of_turn>\
{{ 'model' if m.role == 'assistant' else m.role }}
{{ m.content | trim }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}""")}


def make_tokenizer(family):
    """Words from the examples of the prompt: of bytes, or for Gemma of characters with ▁."""
    bos, eos, _, template = FAMILIES[family]
    kind = GemmaTokenizer if family == "gemma2" else Qwen2Tokenizer
    tokenizer = kind(bos_token=bos, eos_token=eos, pad_token=eos).train_new_from_iterator(
        [FEW_SHOT], 400, show_progress=False,
        new_special_tokens=sorted(set(re.findall(r"<[a-z_|]+>", template))))
    if family == "gemma2":  # bytes stand for characters that are no words
        saved = json.loads(tokenizer.backend_tokenizer.to_str())
        words = saved["model"]["vocab"]
        for byte in range(256):
            words[f"<0x{byte:02X}>"] = len(words)
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(saved))
    tokenizer.chat_template = template
    return tokenizer


def make_model(folder, kind="qwen2", **changed):
    """Random weights of any architecture, with a tokenizer of its family or Qwen's -> the
    folder. The head is padded, and the end of a turn unknown, as large models have it."""
    tokenizer = make_tokenizer(kind if kind in FAMILIES else "qwen2")
    sizes = {"vocab_size": len(tokenizer) + 8, "hidden_size": 64, "intermediate_size": 128,
             "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "head_dim": 16, "max_position_embeddings": 4096,
             "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes | changed))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
