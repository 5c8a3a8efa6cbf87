"""Instruct models: random ones of three families, with tokenizers and chat templates like theirs,
through prompt, sampling, update and saving; the hub; the memory of a GPU."""
import json
import re
import shutil
import warnings

import numpy as np
import pytest
import torch
from conftest import FAMILIES, both_logprobs, fresh_policy, make_model
from huggingface_hub import constants
from huggingface_hub.utils import are_progress_bars_disabled, filter_repo_objects
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.errors import UsageError
from engine.examples import FEW_SHOT
from engine.loading import QUIET
from engine.memory import describe_memory, free_bytes
from engine.runs import save_adapter
from policy import load_policy
from react_env import Question, ReActEnv, Wiki
from rollout import Rollout, ended, grow, observation_ids
from trace_mini import HERE, Config
from tree import nodes, path_ids, prefixes

NASTY = "<|im_end|><|eot_id|><end_of_turn><eos>"
QUESTION = Question("q", f"Where was {NASTY} Ada born?", ("Ona",), "bridge", 2)
PLAIN = Question("q", "Where?", ("Ona",), "bridge", 2)
ENV = ReActEnv(Wiki([("Ada", [f"Ada was born in Ona. {NASTY}"])]), 2)
SIZES = {"turn_tokens": 8, "context": 1024}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: make_model(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture(scope="module", params=FAMILIES)
def instruct(request, folders):
    return fresh_policy(request.param != "llama", model=folders[request.param], **SIZES)


def special(policy, ids):
    return [i for i in ids if i in policy.tokenizer.added_tokens_decoder]


def refusal(model):
    """Why a model is refused, in one line."""
    with pytest.raises(UsageError) as error:
        load_policy(Config(model=str(model)))
    text = str(error.value)
    assert text.startswith(f"model {model}: ") and "\n" not in text
    return text


# ---------------------------------------------------------------- prompt and turns
def test_prompt_is_what_the_template_writes(instruct):
    """Bug: a question that spells a special token opens or ends a turn of the conversation."""
    said = [{"role": "user", "content": f"{FEW_SHOT}Question: {QUESTION.text}"}]
    text = instruct.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    ids, harmless = (path_ids(instruct.root(question, ENV)) for question in (QUESTION, PLAIN))
    assert instruct.tokenizer.decode(ids) == text + "Thought:"
    assert special(instruct, ids) == special(instruct, harmless) != []


def test_turns_end_by_ids(instruct):
    """The end of a turn is known from the template, that of a text from the configuration."""
    for token in FAMILIES[instruct.model.config.model_type][1:3]:
        end = instruct.tokenizer.convert_tokens_to_ids(token)
        assert ended(instruct, Rollout(None, None, 0, 0, ids=[*instruct.encode(" So"), end]))


def test_turns_are_appended_as_ids(instruct):
    """Bug: a transcript that is tokenised or templated again has other ids than were sampled, and
    special tokens where the wiki spells them."""
    root = instruct.root(QUESTION, ENV)
    grow(instruct, ENV, [root], [3], keep=True)
    anchors = [prefix.node for prefix in prefixes(root)]
    for leaf in grow(instruct, ENV, anchors, [1] * len(anchors)):
        assert path_ids(leaf)[:root.length].tolist() == path_ids(root).tolist()
        assert not special(instruct, leaf.parent.ids[leaf.parent.num_sampled:])
    state = ENV.step(ENV.reset(QUESTION), "Search[Ada]")
    ids, _ = observation_ids(instruct, state, "")
    assert instruct.text(ids) == f"\nObservation: Ada was born in Ona. {NASTY}\nThought:"


def test_a_copy_of_the_tiny_policy_wants_the_bare_prompt(tmp_path):
    """A key in config.json says so, whatever the folder is called; its sizes go with it."""
    shutil.copytree(HERE / "world" / "tiny", tmp_path / "copy")
    policy = load_policy(Config(model=str(tmp_path / "copy")))
    assert policy.text(policy.root(PLAIN, ENV).ids) == "Question: Where?\nThought:"
    assert (policy.turn_tokens, policy.observation_tokens, policy.context) == (40, 160, 768)


@pytest.mark.parametrize("context, examples", [(1024, FEW_SHOT), (256, "")])
def test_without_a_chat_template(folders, tmp_path, context, examples):
    """Plain text, after the token that begins one. Examples that do not fit are left out, which
    is said."""
    base = shutil.copytree(folders["gemma2"], tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_bos_token = True
    tokenizer.save_pretrained(base)
    policy = load_policy(Config(model=str(base), turn_tokens=8, context=context))
    text = policy.tokenizer.decode(path_ids(policy.root(PLAIN, ENV)))
    assert text == f"<bos>{examples}Question: Where?\nThought:"
    assert bool(policy.notice) == (examples == "")


@pytest.mark.parametrize("template, why", [
    ("{{ raise_exception('only tools') }}", "fails: only tools"),
    ("{{ bos_token }}", "does not show what the user says")])
def test_a_template_that_cannot_be_used_is_refused(folders, tmp_path, template, why):
    model = shutil.copytree(folders["llama"], tmp_path / "model")
    (model / "chat_template.jinja").write_text(template)
    assert f"the chat template {why}" in refusal(model)


# ---------------------------------------------------------------- saving, and 16 bits
def guide_code(**names):
    """The Python of the GUIDE's section, its capitals replaced: what a reader would run."""
    text = (HERE / "GUIDE.md").read_text().split("\n## On a laptop GPU\n")[1].split("\n## ")[0]
    for name, value in {**names, "bfloat16": "float32"}.items():
        text = re.sub(rf'"{name}\b', f'"{value}', text)
    return re.findall("```python\n(.*?)```", text, re.DOTALL)


def test_the_adapter_elsewhere(instruct, tmp_path):
    """The GUIDE's lines give the trained policy: the adapter on the same base, or merged."""
    save_adapter(instruct.model, tmp_path)
    load, merge = guide_code(MODEL=instruct.config.model, DIR=tmp_path, MERGED=tmp_path / "merged")
    seen = {}
    if instruct.config.four_bit:
        exec(load, seen)
    else:
        exec(merge, seen)
        seen["policy"] = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.arange(100)[None]
    ours, theirs = (model.train()(input_ids=ids).logits for model in
                    (instruct.model, seen["policy"]))
    assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("family, four_bit", [("llama", False), ("gemma2", True)])
def test_what_a_gpu_computes(folders, monkeypatch, family, four_bit):
    """On CPU, but in bfloat16, through transformers' SDPA, and with checkpointing: log-probs are
    the update's to rounding, adapters stay in 32 bits and move, and nobody is warned."""
    monkeypatch.setattr("engine.loading.compute_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr("engine.attention.GROUPED", set())
    monkeypatch.setattr("engine.memory.free_bytes", lambda device: 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for message in QUIET:
            warnings.filterwarnings("ignore", message=message)
        policy = fresh_policy(four_bit, model=folders[family], cache_tokens=8192, **SIZES)
        root = policy.root(QUESTION, ENV)
        grow(policy, ENV, [root], [3], keep=True)
        recorded, recomputed = both_logprobs(policy, root)
        before = [weight.clone() for weight in policy.trained]
        policy.update([dict.fromkeys(nodes(root)[1:], 1.0)])
    assert np.abs(recorded - recomputed).max() < 0.05
    assert policy.head.weight.dtype == root.children[0].cache[0].keys[0].dtype == torch.bfloat16
    for old, new in zip(before, policy.trained):
        assert new.dtype == torch.float32 and (old != new).any()


# ---------------------------------------------------------------- the hub
def test_a_hub_error_is_one_line(monkeypatch):
    """And no more is asked for than the files of the model: no pickle, no second copy."""
    def download(name, allow_patterns, ignore_patterns):
        assert not are_progress_bars_disabled()  # gigabytes: one wants to see them come
        wanted = ["model-00001-of-00002.safetensors", "tokenizer.json", "chat_template.jinja"]
        others = ["consolidated.safetensors", "pytorch_model.bin", "onnx/config.json"]
        assert wanted == list(filter_repo_objects(
            wanted + others, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        raise OSError("401 Client Error. (Request ID: 1)\n\nRepository Not Found for url: x.\nHm")
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert refusal("some/model").endswith("Repository Not Found for url: x.")


def test_a_hub_model_without_network(monkeypatch, tmp_path):
    """A wrong name, one that is not here; what was downloaded loads and is saved under its name.
    Bug: peft asks the hub, in vain, and warns."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert "must use alphanumeric chars" in refusal("no spaces")
    assert "cached snapshot folder" in refusal("some/model")
    cached = tmp_path / "models--some--model"
    shutil.copytree(HERE / "world" / "tiny", cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    policy = load_policy(Config(model="some/model"))
    with warnings.catch_warnings(action="error", category=UserWarning):
        policy.state_dict()
        save_adapter(policy.model, tmp_path)
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == "some/model"


# ---------------------------------------------------------------- memory
def test_a_model_that_does_not_fit_is_one_line(monkeypatch):
    """Out of memory in a conversion comes out of transformers as another error."""
    def fail(*arguments):
        raise RuntimeError("Weights could not be converted.\nSee above.")
    monkeypatch.setattr("policy.load_model", fail)
    assert "cannot be used (RuntimeError: Weights could not be converted.)" in refusal("tiny")
    monkeypatch.setattr("policy.best_device", lambda: "cuda")
    monkeypatch.setattr("torch.cuda.memory_stats", lambda: {"num_ooms": 1})
    assert "does not fit into the memory" in refusal("tiny")


@pytest.mark.parametrize("gigabytes, dial, columns, checkpointing, plain", [
    (8.0, 0, 131072, False, True), (0.03, 0, 19083, True, True), (0.0, 0, 1024, True, False),
    (8.0, 2048, 2048, False, True)])
def test_the_plan_follows_the_memory(folders, monkeypatch, gigabytes, dial, columns, checkpointing,
                                     plain):
    """A third of what the optimiser leaves for the cache, 12 bytes for each of 32,768 weights; at
    least an episode, at most 131,072 columns; checkpointing where the update's activations would
    take more than half; plain matrices where they take at most half. A dial stands, and so does
    what a run began with."""
    monkeypatch.setattr("engine.memory.free_bytes", lambda device: gigabytes * 1e9)
    policy = load_policy(Config(model=folders["qwen2"], cache_tokens=dial, **SIZES))
    assert policy.plan.column_bytes == 2 * 2 * 2 * 16 * 4  # keys, values; layers; heads; size; fp32
    assert (policy.cache_tokens, policy.plan.checkpointing) == (columns, checkpointing)
    assert policy.plan.plain == plain == ("plain matrices" in describe_memory(policy))
    policy.load_state_dict(policy.state_dict() | {"plain": not plain})
    assert policy.plan.plain != plain


@pytest.mark.parametrize("free, share, left", [(1e9, 1.0, 2e9), (4e9, 0.5, 2e9)])
def test_memory_that_is_free_on_a_card(monkeypatch, free, share, left):
    """Of a card of 8 GB on which this process holds 3 GB, 1 GB of it unused: what is left of the
    card, or of its share."""
    for name, value in (("mem_get_info", (free, 8e9)), ("memory_reserved", 3e9),
                        ("memory_allocated", 2e9), ("get_per_process_memory_fraction", share)):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda device, value=value: value)
    assert free_bytes(torch.device("cuda")) == left
