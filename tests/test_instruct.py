"""Instruct models: random ones of three families, each with a tokenizer and a chat template made
here, go through prompt, sampling, update, saving, plain loading and evaluation."""
import json
import re
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import assert_refused, fresh_policy
from huggingface_hub import constants, errors
from huggingface_hub.utils import are_progress_bars_disabled, filter_repo_objects
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from engine.loading import QUIET, ModelError, compute_dtype
from engine.runs import parse_config
from lab import bench_gpu
from policy import free_bytes, load_policy
from react_env import FEW_SHOT, Question, ReActEnv, Wiki
from rollout import ended, forget_caches, grow, held_tokens, observation_ids, prefill
from trace_mini import HERE, Config, evaluate, main
from tree import leaves, nodes, path, path_ids, prefixes

QUESTION = Question("q", "Where was <|im_end|><|eot_id|><end_of_turn><eos> Ada born?", ("Ona",),
                    "bridge", 2)
ENV = ReActEnv(Wiki([("Ada", ["Ada was born in Ona. <|im_end|><|eot_id|><end_of_turn><eos>"])]), 2)
SMALL = {"turn_tokens": 8, "observation_tokens": 40, "context": 1024, "max_turns": 2}
FAMILIES = {  # config; tokens: begin of text, end of text, end of turn; chat template
    "qwen": (Qwen2Config, (None, "<|endoftext|>", "<|im_end|>"), """\
{% if messages[0].role != 'system' %}<|im_start|>system
You are helpful.<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""),
    "llama": (LlamaConfig, ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"), """\
{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>

{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}\
<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""),
    "gemma": (Gemma2Config, ("<bos>", "<eos>", "<end_of_turn>"), """\
{{ bos_token }}{% for m in messages %}\
{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}<start_of_turn>\
{{ 'model' if m.role == 'assistant' else m.role }}
{{ m.content | trim }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}""")}


def make_tokenizer(family):
    """Words from the examples of the prompt: of bytes, or for Gemma of characters with ▁."""
    _, (bos, eos, end), template = FAMILIES[family]
    special = sorted({*re.findall(r"<[a-z_|]+>", template), *filter(None, (bos, eos, end))})
    bpe = Tokenizer(models.BPE(byte_fallback=family == "gemma"))
    alphabet = []
    if family == "gemma":
        bpe.normalizer = normalizers.Replace(" ", "▁")
        bpe.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                         decoders.Fuse()])
    else:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator([FEW_SHOT], trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, show_progress=False, initial_alphabet=alphabet))
    if family == "gemma":
        saved = json.loads(bpe.to_str())
        words = saved["model"]["vocab"]
        words |= {f"<0x{byte:02X}>": len(words) + byte for byte in range(256)}
        bpe = Tokenizer.from_str(json.dumps(saved))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=bos, eos_token=eos,
                                        pad_token=eos)
    tokenizer.chat_template = template
    return tokenizer


def make_model(folder, family, make=None, **changed):
    """Random weights; the generation config does not know the end of a turn."""
    _, (bos, eos, _), _ = FAMILIES[family]
    make = make or FAMILIES[family][0]
    tokenizer = make_tokenizer(family)
    ids = tokenizer.convert_tokens_to_ids
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(make(**dict(
        vocab_size=len(tokenizer) + 8, bos_token_id=bos and ids(bos), eos_token_id=ids(eos),
        pad_token_id=ids(eos), hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=4096,
        head_dim=32) | changed)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: make_model(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture(scope="module", params=[(family, four_bit) for family in FAMILIES
                                        for four_bit in (True, False)],
                ids=lambda param: f"{param[0]}-{'nf4' if param[1] else 'fp32'}")
def instruct(request, folders):
    family, four_bit = request.param
    return load_policy(Config(model=folders[family], four_bit=four_bit, **SMALL))


def special(policy, ids):
    return [i for i in ids if i in policy.tokenizer.added_tokens_decoder]


def test_prompt_is_what_the_template_writes(instruct):
    said = [{"role": "user", "content": f"{FEW_SHOT}Question: {QUESTION.text}"}]
    text = instruct.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    ids = instruct.root(QUESTION, ENV).ids
    assert instruct.tokenizer.decode(ids) == text + "Thought:" and not instruct.notice
    harmless = instruct.root(Question("q", "Where?", ("Ona",), "bridge", 2), ENV).ids
    assert special(instruct, ids) == special(instruct, harmless) != []


def test_turns_end_by_ids(instruct):
    """The end of a turn is known from the template, that of a text from the configuration."""
    for token in FAMILIES[instruct.model.config.model_type.rstrip("2")][1][1:]:
        turn = (instruct.encode(" So") + [instruct.tokenizer.convert_tokens_to_ids(token)], [0.0])
        assert instruct.may_end[turn[0][-1]] and ended(instruct, turn) and len(turn[0]) > 1


def test_turns_are_appended_as_ids(instruct):
    """Whatever the template would do, a path begins with its prefix, id for id; nothing in it is
    special but what the prompt holds and the policy sampled; and its log-probs are the update's."""
    roots = [instruct.root(QUESTION, ENV)]
    grow(instruct, ENV, roots, [3], (0, 0))
    anchors = [node for node, _ in prefixes(roots[0])]
    found = leaves(roots[0]) + grow(instruct, ENV, anchors, [1] * len(anchors), (0, 1))
    instruct.model.train()
    for leaf in found:
        assert path_ids(leaf)[:roots[0].length].tolist() == roots[0].ids.tolist()
        with torch.no_grad():
            again = instruct.logprobs([(path(leaf), path(leaf)[1:])]).numpy()
        assert np.abs(np.concatenate([n.logprobs for n in path(leaf)[1:]]) - again).max() < 1e-4
    packed, alone = (torch.cat([instruct.logprobs([row]) for row in rows]).detach() for rows in (
        [(nodes(roots[0]), nodes(roots[0])[1:])], [(path(n), [n]) for n in nodes(roots[0])[1:]]))
    assert (packed - alone).abs().max() < 1e-4
    for node in nodes(roots[0])[1:]:
        assert not special(instruct, node.ids[node.num_sampled:])
    state = ENV.step(ENV.reset(QUESTION), "Search[Ada]")
    ids, cut = observation_ids(instruct, state, "Action: Search[Ada]")
    assert "<eos>" in state.observation and not special(instruct, ids)
    assert cut or instruct.text(ids) == f"\nObservation: {state.observation}\nThought:"


def trained(policy):
    """Three updates on a tree whose turns get advantages 1 and -1; -> its root."""
    root = policy.root(QUESTION, ENV)
    grow(policy, ENV, [root], [4], (0, 0))
    grow(policy, ENV, [n for n, _ in prefixes(root)], [1] * 4, (0, 1))
    credit = {node: 1.0 - 2 * (i % 2) for i, node in enumerate(nodes(root)[1:])}
    before = [p.detach().clone() for p in policy.trained]
    for _ in range(3):
        result = policy.update([credit])
        assert not result["update_skipped"] and result["grad_norm"] > 0
    assert all((a != b).any() for a, b in zip(before, policy.trained))
    return root


def readme_code(**names):
    """The Python of the README's section, with its capitals replaced: what a reader would run."""
    text = (HERE / "README.md").read_text().split("## On a laptop GPU")[1].split("\n## ")[0]
    for name, value in {**names, "bfloat16": "float32"}.items():
        text = re.sub(rf'"{name}\b', f'"{value}', text)
    return re.findall("```python\n(.*?)```", text, re.DOTALL)


def test_update_save_load_merge_evaluate(instruct, tmp_path):
    """The README's lines give the trained policy: the adapter on the same base, merged or not;
    merged into 4 bits, more than a tenth of what was learnt is lost to rounding."""
    trained(instruct)
    instruct.save_adapter(tmp_path / "adapter")
    load, merge = readme_code(MODEL=instruct.config.model, DIR=tmp_path, MERGED=tmp_path / "merged")
    assert len(load.strip().split("\n")) == 5
    ids = torch.tensor(instruct.root(QUESTION, ENV).ids, dtype=torch.long)[None]

    def logits(model):
        with torch.no_grad():
            return model.train()(input_ids=ids).logits
    ours, seen = logits(instruct.model), {}
    if instruct.config.four_bit:
        exec(load, seen)
        plain = seen["policy"]
        assert (logits(plain) - ours).abs().max() < 1e-4
        with plain.disable_adapter():
            learnt = logits(plain) - ours
        lost = logits(plain.merge_and_unload()) - ours
        assert lost.norm() > 0.1 * learnt.norm() > 0
    else:
        exec(merge, seen)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert (logits(merged) - ours).abs().max() < 1e-4
    result = evaluate(instruct, ENV, [QUESTION])
    assert set(result["predictions"]) == {"q"} and 0 <= result["em"] <= result["f1"] <= 1


@pytest.mark.parametrize("family, four_bit", [("qwen", True), ("llama", False), ("gemma", True)])
def test_what_a_gpu_computes(folders, monkeypatch, family, four_bit):
    """On CPU, but in bfloat16, through transformers' SDPA, and with checkpointing: adapters stay
    in 32 bits, log-probs are the update's to rounding, and nobody is warned of anything."""
    monkeypatch.setattr("engine.loading.compute_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr("engine.attention.GROUPED", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for message in QUIET:
            warnings.filterwarnings("ignore", message=message)
        policy = load_policy(Config(model=folders[family], four_bit=four_bit, learning_rate=1e-3,
                                    gradient_checkpointing=True, **SMALL))
        root = trained(policy)
    assert {p.dtype for p in policy.trained} == {torch.float32}
    assert policy.head.weight.dtype == torch.bfloat16
    assert policy.column_bytes == 2 * 2 * 1 * 32 * 2  # keys, values; layers; heads; size; bf16
    fresh = policy.root(QUESTION, ENV)
    leaf = grow(policy, ENV, [fresh], [1], (0, 2))[0]
    assert fresh.cache[0].keys[0].dtype == torch.bfloat16
    with torch.no_grad():
        again = policy.logprobs([(path(leaf), path(leaf)[1:])])
        packed = policy.logprobs([(nodes(root), nodes(root)[1:])])
        alone = torch.cat([policy.logprobs([(path(n), [n])]) for n in nodes(root)[1:]])
    recorded = torch.tensor(np.concatenate([n.logprobs for n in path(leaf)[1:]]))
    assert (recorded - again).abs().max() < 0.05 and (packed - alone).abs().max() < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_compute_something_else_are_refused(tmp_path, monkeypatch, dtype):
    """Granite divides its logits, GPT-OSS attends to sinks as well. But 28 layers that round to
    16 bits are no reason: that once refused every model on every modern card."""
    monkeypatch.setattr("engine.loading.compute_dtype", lambda device: dtype)
    for make, changed in ((GraniteConfig, {"logits_scaling": 4.0}),
                          (GptOssConfig, {"num_local_experts": 2, "num_experts_per_tok": 1}),
                          (Qwen2Config, {"num_hidden_layers": 28, "initializer_range": 0.12})):
        model = make_model(tmp_path / make.model_type, "qwen", make, **changed)
        config = Config(model=model, four_bit=False, **SMALL)
        if make is Qwen2Config:
            assert load_policy(config).head.weight.dtype == dtype
        else:
            with pytest.raises(ModelError, match="not supported"):
                load_policy(config)


def test_a_copy_of_the_tiny_policy_wants_the_bare_prompt(folders, tmp_path):
    """A key in config.json says so, under any name; its sizes go with it."""
    shutil.copytree(HERE / "world" / "tiny", tmp_path / "tiny")
    tiny, copy, other = (Config(model=name) for name in
                         ("tiny", str(tmp_path / "tiny"), folders["llama"]))
    sizes = [(c.bare_prompt, c.turn_tokens, c.observation_tokens, c.context)
             for c in (tiny, copy, other)]
    assert sizes == [(True, 40, 160, 768)] * 2 + [(False, 128, 256, 4096)]
    policy = load_policy(copy)
    assert policy.text(policy.root(QUESTION, ENV).ids) == f"Question: {QUESTION.text}\nThought:"
    assert policy.model.config.trace_mini_prompt == "bare"


def test_a_template_that_cannot_be_used_is_refused(folders, tmp_path):
    for template, why in (("{{ raise_exception('only tools') }}", "only tools"),
                          ("{{ bos_token }}", "what the user says")):
        shutil.copytree(folders["llama"], tmp_path / "model", dirs_exist_ok=True)
        (tmp_path / "model" / "chat_template.jinja").write_text(template)
        with pytest.raises(ModelError, match=f"tmp.*model: the chat template .*{why}"):
            load_policy(Config(model=str(tmp_path / "model")))


# ---------------------------------------------------------------- evaluation of a file
def write_questions(file, first, num=6):
    file.write_text(json.dumps([
        {"_id": f"{first}{i}", "question": f"Where was {first} {i} born?", "answer": "Ona",
         "type": "bridge", "supporting_facts": [], "context": [[f"{first} {i}", ["In Ona."]]]}
        for i in range(num)]))
    return str(file)


def test_eval_only_before_and_after_training(folders, tmp_path, capsys):
    """Exact match, F1 and the official file for every question, of the model as it is, of a
    run on its own file, and of a run on another file, into a folder of its own."""
    some, other = (write_questions(tmp_path / f"{name}.json", name) for name in ("Ada", "Bo"))
    flags = [word for name, value in SMALL.items()
             for word in (f"--{name.replace('_', '-')}", str(value))]
    run, before, after = (tmp_path / name for name in ("run", "before", "after"))
    model = ["--model", folders["qwen"], *flags]

    def scored(arguments, folder, first):
        assert main(arguments) == 0
        assert re.search(r"6 questions: exact match \d+\.\d %, F1 \d+\.\d %",
                         capsys.readouterr().out)
        saved = json.loads((folder / "predictions.json").read_text())
        assert set(saved) == {"answer", "sp", "evidence"}
        assert set(saved["answer"]) == {f"{first}{i}" for i in range(6)}
        assert 0 <= json.loads((folder / "eval.json").read_text())["em"] <= 1
    scored([*model, "--eval-only", "--data", other, "--out", str(before)], before, "Bo")
    assert main([*model, "--data", some, "--eval-data", other, "--steps", "1", "--budget", "20",
                 "--pool-size", "2", "--out", str(run)]) == 0
    out = capsys.readouterr().out
    assert "live episodes" in out and "gradient checkpointing off" in out
    scored(["--resume", str(run), "--eval-only"], run, "Bo")  # what it was evaluated on
    scored(["--resume", str(run), "--eval-only", "--data", some, "--out", str(after)], after, "Ada")
    assert json.loads((after / "config.json").read_text())["resume"] == str(run)

    split = tmp_path / "split"  # without a file of its own: the fifth that was held out, no more
    assert main([*model, "--data", write_questions(tmp_path / "all.json", "Cy", 30), "--steps", "1",
                 "--budget", "20", "--pool-size", "2", "--out", str(split)]) == 0
    held_out = json.loads((split / "predictions.json").read_text())["answer"]
    assert main(["--resume", str(split), "--eval-only"]) == 0
    assert 0 < len(held_out) < 15
    assert json.loads((split / "predictions.json").read_text())["answer"].keys() == held_out.keys()
    capsys.readouterr()
    for arguments, word in ((["--eval-only", "--data", some], "--out"), (["--data", some], "data"),
                            (["--eval-only", "--eval-data", some], "eval-data"),
                            (["--eval-only", "--data", some, "--out", str(after)], "holds a run")):
        assert_refused(main, ["--resume", str(run), *arguments], word, capsys)


# ---------------------------------------------------------------- the hub
def test_hub_errors_are_one_line(monkeypatch, tmp_path, capsys):
    """A wrong name, a gated model, no network; and what was downloaded loads without one."""
    for kind, word in ((errors.RepositoryNotFoundError, "neither a folder"),
                       (errors.GatedRepoError, "gated: accept its terms"),
                       (OSError, "No space left")):
        def download(name, kind=kind, allow_patterns=None, ignore_patterns=None):
            assert not are_progress_bars_disabled()  # gigabytes: one wants to see them come
            weights = ["model-00001-of-00002.safetensors", "tokenizer.json", "chat_template.jinja"]
            assert weights == list(filter_repo_objects(
                [*weights, "consolidated.safetensors", "pytorch_model.bin", "onnx/config.json"],
                allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
            raise kind.__new__(kind, "No space left\nTraceback")  # without a response of the hub
        with monkeypatch.context() as patch:
            patch.setattr("huggingface_hub.snapshot_download", download)
            assert_refused(main, ["--model", "some/model", "--out", str(tmp_path / "out")], word,
                           capsys)
    assert_refused(main, ["--model", "no spaces", "--out", str(tmp_path / "out")], "neither",
                   capsys)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert_refused(main, ["--model", "some/model", "--out", str(tmp_path / "out")],
                   "cannot be reached", capsys)
    cached = tmp_path / "models--some--model"
    shutil.copytree(HERE / "world" / "tiny", cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    policy = load_policy(Config(model="some/model"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft warns when it asked the hub in vain
        policy.state_dict()
        policy.save_adapter(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == "some/model"


# ---------------------------------------------------------------- memory
@pytest.mark.parametrize("num_ooms, why", [(1, "does not fit"), (0, "cannot be used .Weights")])
def test_a_model_that_does_not_fit_is_one_line(monkeypatch, num_ooms, why):
    """Out of memory in a conversion comes out of transformers as another error."""
    def fail(config):
        raise RuntimeError("Weights could not be converted.\nSee above.")
    monkeypatch.setattr("policy.load_model", fail)
    monkeypatch.setattr("torch.cuda.memory_stats", lambda: {"num_ooms": num_ooms})
    config = Config()
    config.device = "cuda"
    with pytest.raises(ModelError, match=f"model tiny: {why}"):
        load_policy(config)


@pytest.fixture(scope="module")
def fp32():
    return fresh_policy(False)


@pytest.fixture
def tiny(fp32, data):
    """The tiny policy as it was planned, whatever the test before did to its sizes."""
    fp32.cache_tokens = fp32.planned_tokens
    return fp32, data


def played(policy, data):
    """Rollouts, then continuations -> (roots, ids of all paths, sorted)."""
    roots = [policy.root(question, data.env) for question in data.train[:4]]
    prefill(policy, roots)
    grow(policy, data.env, roots, [3] * 4, (0, 0))
    anchors = [node for root in roots for node, _ in prefixes(root)]
    grow(policy, data.env, anchors, [2] * 6 + [0] * (len(anchors) - 6), (0, 1))
    return roots, sorted(path_ids(leaf).tobytes() for root in roots for leaf in leaves(root))


@pytest.fixture(scope="module")
def want(fp32, data):
    fp32.cache_tokens = fp32.planned_tokens
    return played(fp32, data)


@pytest.mark.parametrize("calls", [
    range(1), pytest.param(range(2), marks=pytest.mark.long), range(40, 500)],
    ids=["once", "prefill", "grow"])
def test_out_of_memory_halves_and_goes_on(tiny, want, calls, monkeypatch):
    """More than three rows fail during some of the calls of the network. Once is mended by
    letting caches go; after that fewer live episodes from then on, said once, no half-done
    rollout in the trees, and the same episodes."""
    policy, data = tiny
    forward, seen = policy.forward, []

    def failing(ids, *args):
        seen.append(len(ids))
        if len(seen) - 1 in calls and len(ids) > 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
        return forward(ids, *args)
    monkeypatch.setattr(policy, "forward", failing)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        roots, found = played(policy, data)
    said = [str(warning.message) for warning in said]
    assert len(said) == (len(calls) > 1) and all("halving" in text for text in said)
    assert (policy.cache_tokens < policy.planned_tokens) == (len(calls) > 1)
    assert len(found) == len(want[1]) == 4 * 3 + 6 * 2
    assert sum(a != b for a, b in zip(want[1], found)) <= 1  # a draw within rounding of a boundary
    assert all(node.is_leaf or node.children for root in roots for node in nodes(root))


def test_a_single_episode_out_of_memory_is_one_line(tiny, monkeypatch, tmp_path, capsys):
    def failing(*args, **kwargs):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.\nMore")
    policy, data = tiny
    monkeypatch.setattr(policy, "forward", failing)
    with pytest.raises(torch.cuda.OutOfMemoryError), pytest.warns(UserWarning, match="halving"):
        played(policy, data)
    monkeypatch.setattr("trace_mini.grow", failing)
    assert_refused(main, ["--out", str(tmp_path), "--articles", "100", "--eval-questions", "1"],
                   "--micro-batch-tokens", capsys)


@pytest.mark.long
def test_kept_caches_stay_within_the_plan(tiny, want):
    """Trees hold at most `cache_tokens` columns between calls; what was let go is computed again
    where an episode continues from there, to the same episodes."""
    policy, data = tiny
    policy.cache_tokens = 2 * policy.context
    assert held_tokens(want[0]) > policy.cache_tokens  # nothing was let go
    roots, found = played(policy, data)
    assert held_tokens(roots) <= policy.cache_tokens
    assert sum(a != b for a, b in zip(want[1], found)) <= 1
    forget_caches(roots)
    assert held_tokens(roots) == 0


def test_a_path_is_kept_once(tiny):
    """Rows are copied whenever a third of the episodes has ended; the copies do not add up."""
    policy, data = tiny
    roots = [policy.root(question, data.env) for question in data.train[:4]]
    prefill(policy, roots)
    start = held_tokens(roots)
    found = grow(policy, data.env, roots, [6] * 4, (0, 0))
    fed = [leaf.parent.length // 64 * 64 + 64 for leaf in found]  # room comes in 64 columns
    assert max(leaf.depth for leaf in found) > 1 + min(leaf.depth for leaf in found)
    assert held_tokens(roots) - start <= 1.25 * sum(fed)  # rows of one cache are equally wide


@pytest.mark.long
def test_gradient_checkpointing_changes_no_gradient(data):
    """Packs and paths; off while sampling, where the cache is needed."""
    policy = fresh_policy()
    roots = played(policy, data)[0]

    def gradient():
        seen = {}
        policy.optimizer.step = lambda: seen.update(
            grad=torch.cat([p.grad.flatten() for p in policy.trained]))
        policy.update([{node: 1.0 - 2 * (i % 2) for i, node in enumerate(nodes(root)[1:])}
                       for root in roots[:2]])
        return seen["grad"]
    want = gradient()
    policy.config.gradient_checkpointing = True
    policy.plan_memory()
    kept = policy.kept_bytes
    assert policy.checkpointing and "checkpointing on" in policy.memory_line()
    assert (gradient() - want).norm() < 1e-5 * want.norm()
    policy.plan_memory()
    assert policy.kept_bytes < kept / 3  # it does what it is for
    assert played(policy, data)[1] == sorted(
        path_ids(leaf).tobytes() for root in roots for leaf in leaves(root))


@pytest.mark.parametrize("gigabytes, checkpointing", [(8.0, False), (0.1, False), (0.03, True),
                                                      (0.0, True)])
def test_sizes_follow_the_memory(folders, monkeypatch, gigabytes, checkpointing):
    """A third of what is free for the cache, at least an episode, at most 131,072; checkpointing
    where the update's activations would take more than half; a dial that is given stands."""
    monkeypatch.setattr("policy.free_bytes", lambda device: gigabytes * 1e9)
    policy = load_policy(Config(model=folders["qwen"], **SMALL))
    assert policy.column_bytes == 2 * 2 * 1 * 32 * 4  # keys, values; layers; heads; size; fp32
    adam = 12 * sum(p.numel() for p in policy.trained)
    columns = int((gigabytes * 1e9 - adam) / 3 / policy.column_bytes)
    assert policy.cache_tokens == sorted([1024, columns, 131072])[1]
    assert policy.checkpointing == checkpointing
    given = Config(model=folders["qwen"], **SMALL, cache_tokens=2048, gradient_checkpointing=True)
    policy = load_policy(given)
    assert policy.cache_tokens == 2048 and policy.checkpointing
    assert "2 live episodes of at most 1,024 tokens" in policy.memory_line()


def test_dtype_follows_the_card(monkeypatch):
    assert compute_dtype("cpu") == torch.float32
    for has_it, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **how: has_it)
        assert compute_dtype("cuda") == dtype


def test_memory_that_is_free_on_a_card(monkeypatch):
    """What is left to this process of the card or of its share, and what it holds unused."""
    for free, share, left in ((4e9, 1.0, 5e9), (4e9, 0.5, 2e9), (1e9, 1.0, 2e9)):
        for name, value in (("mem_get_info", (free, 8e9)), ("memory_reserved", 3e9),
                            ("memory_allocated", 2e9), ("get_per_process_memory_fraction", share)):
            monkeypatch.setattr(f"torch.cuda.{name}", lambda device, value=value: value)
        assert free_bytes(torch.device("cuda")) == left


# ---------------------------------------------------------------- bench_gpu.py
@pytest.mark.long
def test_gpu_bench_runs_through(tmp_path, capsys):
    """A case of the script, shrunk and on CPU; what is done is not run again; without a GPU the
    real ones say so."""
    file = tmp_path / "gpu.json"
    assert bench_gpu.main(["--shape", "test", "--out", str(file)]) == 0
    rows = json.loads(file.read_text())
    assert [(row["weights"], row["fits"], row["stage"]) for row in rows] == [("nf4", True, "done")]
    for name in ("sampled_tok_s", "forked_tok_s", "update_32k_s", "prefilled_tok_s", "paths_32k_s"):
        assert rows[0][name] > 0
    assert capsys.readouterr().out.count("| test | nf4 | 6 | yes |") == 1
    assert bench_gpu.main(["--shape", "test", "--out", str(file)]) == 0
    assert json.loads(file.read_text()) == rows
    if not torch.cuda.is_available():
        assert_refused(bench_gpu.main, [], "NVIDIA GPU", capsys)


def test_gpu_bench_caps_memory(monkeypatch, tmp_path):
    """A 6 GiB card on one of 24: its share, and a case that does not fit is a row."""
    share, gib = [], 2 ** 30
    (tmp_path / "tokenizer.json").touch()
    for name, value in (("is_available", True), ("empty_cache", None), ("get_device_name", "card"),
                        ("reset_peak_memory_stats", None), ("max_memory_reserved", 4 * gib)):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda value=value: value)
    monkeypatch.setattr("torch.cuda.set_per_process_memory_fraction", share.append)
    monkeypatch.setattr("torch.cuda.get_device_properties",
                        lambda device: SimpleNamespace(total_memory=24 * gib))

    def measure(row, folder):
        row["stage"] = "updating"
        raise kind("model x: does not fit into the memory of the GPU")
    monkeypatch.setattr(bench_gpu, "measure", measure)
    for kind in (torch.cuda.OutOfMemoryError, ModelError):
        row = bench_gpu.cases("3B", 24)[3]
        bench_gpu.capped(row, tmp_path)
        assert (row["fits"], row["card_gib"], share.pop()) == (False, 6, 5.4 / 24)
        assert "| 3B | nf4 | 6 | no (updating) | 4.6 |" in bench_gpu.describe(row)
    kind = RuntimeError
    with pytest.raises(RuntimeError):
        bench_gpu.capped(row, tmp_path)


def test_gpu_bench_of_runs_at_once(monkeypatch, tmp_path):
    """The speeds of all runs added up, each without its first step: 60 tokens in 3 + 1 s, twice."""
    def start(command, **how):
        config = parse_config(Config, "", [str(word) for word in command[2:]])  # flags that exist
        assert config.steps > 1 and how["env"]["OMP_NUM_THREADS"]
        Path(config.out).mkdir()
        (Path(config.out) / "metrics.jsonl").write_text("".join(
            json.dumps({"sampled_tokens": tokens, "time_sample_s": 3.0, "time_update_s": 1.0,
                        "step": step}) + "\n" for step, tokens in ((1, 40), (2, 100))))
        return SimpleNamespace(wait=lambda: 0)
    monkeypatch.setattr("subprocess.Popen", start)
    row = bench_gpu.cases("tiny", 24)[1] | {"runs": 2}
    bench_gpu.at_once(row, tmp_path)
    assert row["sampled_tok_s"] == 2 * 60 / 4 and bench_gpu.describe(row)
