"""Shared fixtures: the toy world, and the embedded policy in 4 bits and not."""
import json
import os
from pathlib import Path

import pytest
import torch

from policy import load_policy
from trace_mini import Config
from world.questions import load_data

torch.set_num_threads(1)  # two threads on work as small as this mostly wait for each other
SMALL = bool(os.environ.get("TRACE_MINI_SMALL"))  # the long tests in the size of .ci/run
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def data():
    return load_data(Config(eval_questions=40))


def fresh_policy(four_bit=True, **dials):
    """The tiny policy with LoRA matrices that are not zero, so that adapters matter."""
    policy = load_policy(Config(four_bit=four_bit, **dials))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in policy.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.01, generator=generator)
    return policy


@pytest.fixture(scope="session", params=[True, False], ids=["nf4", "fp32"])
def policy(request):
    return fresh_policy(request.param)


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


def metrics(folder):
    return [json.loads(line) for line in open(folder / "metrics.jsonl")]


def timeless(row):
    return {k: v for k, v in row.items() if not k.startswith(("time_", "memory_"))}


def assert_refused(main, arguments, word, capsys):
    """Bad input: exit code 2, and one line on stderr that names what is wrong."""
    try:
        code = main(arguments)
    except SystemExit as stop:  # argparse
        code = stop.code
    error = capsys.readouterr().err.strip()
    assert code == 2 and word in error and "\n" not in error, (arguments, code, error)
