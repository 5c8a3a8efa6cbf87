"""Shared by the tests: the toy world, the policy in the box, trees that it grew."""
import json
import os
from dataclasses import replace
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # numbers are compared in 32 bits; a GPU would take 16
# ruff: noqa: E402
import numpy as np
import pytest
import torch
from small_models import FAMILIES, make_model, make_tokenizer  # noqa: F401  (tests use them)

from policy import load_policy
from rollout import grow
from trace_mini import Config
from tree import backup, full_path, leaves, nodes, prefixes
from world.questions import load_data

torch.set_num_threads(1)  # two threads on work as small as this mostly wait for each other
TINY = ["--eval-questions=4", "--pool-size=2", "--budget=40", "--num-continuations=1",
        "--group-size=2"]  # of runs with many steps
ADAPTER = "adapter/adapter_model.safetensors"
SMALL = bool(os.environ.get("TRACE_MINI_SMALL"))  # the long tests in the size of .ci/run
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def data():
    return load_data(Config(eval_questions=40))


@pytest.fixture(scope="session")
def shared_data():
    if not SHARED.is_dir():
        pytest.skip(f"no sample data at {SHARED}")
    return SHARED


@pytest.fixture
def tell(capsys):
    """Print past pytest's capture: figures that a long test measured."""
    def tell(text):
        with capsys.disabled():
            print(text)
    return tell


# ---------------------------------------------------------------- policies and trees
def fresh_policy(four_bit=True, **dials):
    """The tiny policy with LoRA matrices that are not zero, so that adapters matter."""
    policy = load_policy(Config(four_bit=four_bit, **dials))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in policy.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.01)
    return policy


@pytest.fixture(scope="session", params=[True, False], ids=["nf4", "fp32"])
def policy(request):
    return fresh_policy(request.param)


def expanded(policy, data, num=2):
    """Backed-up trees: three bare rollouts and a continuation of every prefix. Their rewards are
    set by hand, in turn: there is contrast whatever the policy can do."""
    roots = [policy.root(question, data.env) for question in data.train[:num]]
    grow(policy, data.env, roots, [3] * num, keep=True)
    anchors = [prefix.node for root in roots for prefix in prefixes(root)]
    grow(policy, data.env, anchors, [1] * len(anchors))
    for root in roots:
        for i, leaf in enumerate(leaves(root)):
            leaf.state = replace(leaf.state, reward=float(i % 2))
        backup(root)
    return roots


@pytest.fixture(scope="session")
def trees(policy, data):
    return expanded(policy, data)


def gradient_of(policy):
    return torch.cat([weight.grad.flatten() for weight in policy.trained])


def both_logprobs(policy, root):
    """Of all sampled tokens of a tree: as sampling recorded them, and as the update sees them."""
    turns = nodes(root)[1:]
    policy.model.train()
    with torch.no_grad():
        recomputed = policy.logprobs(full_path(root)[:-1] + nodes(root), turns).numpy()
    return np.concatenate([turn.logprobs for turn in turns]), recomputed


# ---------------------------------------------------------------- runs
def metrics(folder):
    return [json.loads(line) for line in open(folder / "metrics.jsonl")]


def timeless(row):
    return {k: v for k, v in row.items() if not k.startswith(("time_", "memory_"))}


def assert_same_numbers(folder, other):
    """Of two runs: metrics, but for times and memory, evaluations, predictions, adapters."""
    assert list(map(timeless, metrics(folder))) == list(map(timeless, metrics(other)))
    for name in ("evals.jsonl", "predictions.json", ADAPTER):
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name


def assert_refused(main, arguments, word, capsys):
    """Bad input: exit code 2, and one line on stderr that names what is wrong."""
    try:
        code = main(arguments)
    except SystemExit as stop:  # argparse
        code = stop.code
    error = capsys.readouterr().err.strip()
    assert code == 2 and word in error and "\n" not in error, error
