"""One run on several processes: how work is dealt, and real processes that talk by gloo."""
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import metrics

from engine.errors import UsageError
from engine.launched import Team
from engine.runs import checkpoint_files
from trace_mini import HERE
from tree import Node, leaves, nodes
from world.example import example_tree

FLAGS = ("--budget 900 --eval-questions 6 --pool-size 12 --checkpoint-every 1 "
         "--predictor probe --out").split()


class One(Team):
    """The process `rank` of two, whose partner has told `told`."""

    def __init__(self, rank, told=None):
        self.rank, self.count, self.told = rank, 2, told

    def gather(self, thing):
        return [thing, self.told] if self.rank == 0 else [self.told, thing]


def test_trees_are_dealt_whole_the_heaviest_first():
    """5 and 3 + 3 are as even as it gets; what somebody has already stays there and counts."""
    roots = [example_tree() for _ in range(4)]
    anchors = [*roots[:3], roots[1].children[0]]
    assert One(0).deal(anchors, [3, 2, 3, 3]) == roots[:3]
    assert [root.owner for root in roots[:3]] == [1, 0, 1]
    One(1).deal(roots, [3, 5, 3, 1])
    assert [root.owner for root in roots] == [1, 0, 1, 0]
    assert [One(1).owns(root) for root in roots] == [True, False, True, False]


def test_a_tree_is_told_whole_and_without_caches():
    """Caches stay where they are; that of the preamble, which trees share, too."""
    trees, told = [example_tree() for _ in range(2)], []
    preamble = Node(np.arange(3), 0, None)
    for node in [preamble, *nodes(trees[0]), *nodes(trees[1])]:
        node.cache = object(), 0  # it could not be told
    trees[0].preamble = trees[1].preamble = preamble
    crew = One(0)
    crew.gather = lambda own: told.append(pickle.dumps(own)) or [own, {}]
    crew.exchange(trees, [])
    assert all(node.cache for node in [preamble, *nodes(trees[0]), *nodes(trees[1])])
    assert len(nodes(pickle.loads(told[0])[1])) == len(nodes(trees[1]))


def test_a_tree_arrives():
    """Below the root that is known there: nodes, hidden states, ends of rollouts; parents hold.
    One of another question is refused."""
    theirs, here = example_tree(), example_tree()
    here.children, here.owner, theirs.owner = [], 1, 1
    rollout = SimpleNamespace(anchor=here, node=here, sample=3)
    for node in nodes(theirs):
        node.hidden = node.middle = np.full(4, node.depth)
    One(0, {0: theirs}).exchange([here], [rollout])
    assert len(nodes(here)) == len(nodes(theirs)) and here.middle[0] == 0
    assert all(leaf.parent and leaf.hidden[0] == leaf.depth for leaf in leaves(here))
    assert rollout.node.sample == 3 and rollout.node.is_leaf
    assert here.children[0].parent is here
    here.state = replace(here.state, question=replace(here.state.question, id="another"))
    with pytest.raises(UsageError, match="do not agree"):
        One(0, {0: theirs}).exchange([here], [])


@pytest.mark.parametrize("ours, theirs", [(None, None), (1.0, 2.0), (None, 2.0)])
def test_gradients_add_up_and_none_stays_none(ours, theirs):
    """A gradient of zeros would let Adam's momentum move the weights."""
    def all_reduce(work, flat):
        if theirs is not None:
            flat += torch.tensor([theirs, theirs, theirs, theirs, 10.0, 1.0])
    crew, weights = One(0), [torch.zeros(3), torch.zeros(1)]
    crew.together = all_reduce
    for weight in weights:
        weight.grad = None if ours is None else torch.full_like(weight, ours)
    assert crew.add_up(weights, 0.5) == (0.5 if theirs is None else 10.5)
    for weight in weights:
        if ours is theirs is None:
            assert weight.grad is None
        else:
            assert (weight.grad == (ours or 0) + theirs).all()


# ---------------------------------------------------------------- real processes
def launch(num, *flags):
    """A running command on `num` processes."""
    command = [sys.executable, "trace_mini.py"]
    if num > 1:
        command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu",
                   "--num_processes", str(num), "--main_process_port", "0", "trace_mini.py"]
    return subprocess.Popen([*command, *map(str, flags)], cwd=HERE, stderr=subprocess.PIPE,
                            stdout=subprocess.DEVNULL, text=True, start_new_session=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def run(num, *flags):
    process = launch(num, *flags)
    error = process.communicate(timeout=600)[1]
    assert process.returncode == 0, error


@pytest.mark.long
def test_two_processes_make_the_run_of_one(tmp_path):
    """The first step to the last digit, but for rounding in loss and gradient; the next ones as
    far as rounding goes."""
    for num in (1, 2):
        run(num, "--steps", 3, *FLAGS, tmp_path / str(num))
    one, two = metrics(tmp_path / "1"), metrics(tmp_path / "2")
    for row in one + two:
        row["pool"] = sum(row["pool"], [])
    for step, (ours, theirs) in enumerate(zip(one, two, strict=True)):
        for name, value in ours.items():
            if not name.startswith(("time_", "memory_")):
                exact = step == 0 and name not in ("loss", "grad_norm", "predictor_loss")
                assert theirs[name] == (value if exact else pytest.approx(value, abs=1e-4)) or (
                    step and name == "predictor_auroc"), (step, name)  # ranks of near ties
    assert (tmp_path / "1" / "predictions.json").read_text() == (
        tmp_path / "2" / "predictions.json").read_text()


@pytest.mark.long
def test_a_process_without_a_prompt_of_its_own(tmp_path):
    run(2, "--steps", 2, "--budget", 60, "--pool-size", 1, "--eval-questions", 1, "--out", tmp_path)
    assert [row["active_prompts"] for row in metrics(tmp_path)] == [1, 1]


@pytest.mark.long
def test_a_killed_process_ends_all_and_the_run_goes_on_with_another_number(tmp_path):
    process = launch(2, "--steps", 40, *FLAGS, tmp_path)
    deadline = time.time() + 300
    while len(checkpoint_files(tmp_path)) < 2:
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.05)
    workers = subprocess.run(["pgrep", "-f", "--", f"--out {tmp_path}"], capture_output=True,
                             text=True, check=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    began = time.time()
    error = process.communicate(timeout=60)[1]
    assert process.returncode and time.time() - began < 60
    assert error.count("another process of this run has ended; --resume") == 1
    done = len(metrics(tmp_path))
    run(1, "--resume", tmp_path, "--steps", done + 2)
    run(2, "--resume", tmp_path, "--steps", done + 3)
    assert [row["step"] for row in metrics(tmp_path)] == list(range(1, done + 4))
