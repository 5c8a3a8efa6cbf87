"""Targets and credits on one small tree, worked by hand.

    root ─ a ─ b ─ c   R=1        bare rollout 0, expanded at a:
           └── d ─ e   R=0        continuation, rollout 3
           └── f       R=0        continuation, rollout 4
         ─ g ─ h       R=0        bare rollout 1
         ─ i           R=1        bare rollout 2

V̂: a = 1/3, b = c = 1, d = e = f = 0, g = h = 0, i = 1, root = (3·1/3 + 0 + 1) / 5 = 2/5.
"""
from types import SimpleNamespace

import numpy as np
import pytest

from tree import (
    ADVANTAGES,
    TARGETS,
    Node,
    advantages,
    backup,
    has_contrast,
    leaves,
    nodes,
    path,
    path_ids,
    prefixes,
    sampled_tokens,
)


def play(t, start, names, sample, reward):
    """Add a rollout whose turns have these names. A turn is two sampled ids and one of an
    observation, the last one a single sampled id; every id is the letter's number."""
    node = t[start]
    for name in names:
        last = name == names[-1]
        ids = np.full(1 if last else 3, ord(name), np.int32)
        state = SimpleNamespace(done=last, reward=reward if last else 0.0)
        node = t[name] = Node(ids, 1 if last else 2, state, node, sample=sample)


@pytest.fixture
def prompt():
    """{name: node} of a tree without rollouts."""
    return {"root": Node(np.array([1, 2]), 0, SimpleNamespace(done=False, reward=0.0))}


@pytest.fixture
def t(prompt):
    """{name: node} of the tree above, backed up."""
    t = prompt
    play(t, "root", "abc", 0, 1.0)
    play(t, "root", "gh", 1, 0.0)
    play(t, "root", "i", 2, 1.0)
    t["prefixes"] = prefixes(t["root"])  # before the continuations
    play(t, "a", "de", 3, 0.0)
    play(t, "a", "f", 4, 0.0)
    backup(t["root"])
    return t


# ---------------------------------------------------------------- structure
def test_paths_and_leaves(t):
    assert path(t["e"]) == [t["root"], t["a"], t["d"], t["e"]]
    assert path_ids(t["f"]).tolist() == [1, 2, *map(ord, "aaaf")]
    assert (t["f"].length, t["f"].depth) == (6, 2)
    assert leaves(t["root"]) == [t[y] for y in "cefhi"]
    assert sampled_tokens(t["root"]) == 4 * 2 + 5


def test_prefixes_carry_the_outcome_of_their_rollout(t):
    assert t["prefixes"] == [(t["a"], 1), (t["b"], 1), (t["g"], 0)]


def test_what_is_no_success(t):
    """An episode that outgrew the context earns nothing; a prompt is no end."""
    t["c"].overflowed = True
    assert t["c"].is_leaf and t["c"].reward == 0 and not t["root"].is_leaf


# ---------------------------------------------------------------- targets
def test_backup(t):
    assert [t[y].value for y in "abcdefghi"] == [1 / 3, 1, 1, 0, 0, 0, 0, 0, 1]
    assert (t["root"].value, t["root"].num_leaves, t["a"].num_leaves) == (2 / 5, 5, 3)
    assert has_contrast(t["root"]) and not has_contrast(t["b"])


@pytest.mark.parametrize("rule, root, a", [
    ("all", (2 / 5, 5), (1 / 3, 3)),
    ("fresh", (2 / 3, 3), (0, 2))])  # the bare rollouts alone; the two continuations alone
def test_targets_of_the_predictor(t, rule, root, a):
    targets = TARGETS[rule](t["root"])
    assert list(targets) == nodes(t["root"]) and targets[t["root"]] == root
    assert [targets[t[y]] for y in "abdg"] == [a, (1, 1), (0, 1), (0, 1)]


def test_a_fresh_target_ignores_continuations_from_elsewhere(t):
    """A failure that started at b changes the target of b, and neither a's nor the root's."""
    play(t, "b", "xy", 5, 0.0)
    targets = TARGETS["fresh"](t["root"])
    assert targets[t["root"]] == (2 / 3, 3)
    assert [targets[t[y]] for y in "abc"] == [(0, 2), (0, 1), (1, 1)]


# ---------------------------------------------------------------- credit
ROOT = 0.24 ** 0.5  # std of the rewards under the root
CREDITS = {  # of a, b, d, g, i; c is like b, e and f like d, h like g, but for node_value
    "grpo": np.array([-1 / 15, 0.6, -0.4, -0.4, 0.6]) / ROOT,
    # means over root and a, times 30, scaled by their std over all 13 tokens
    "treepo": np.array([-2, 19, -11, -12, 18]) / np.std(
        [-2, -2, 19, 19, 19, -11, -11, -11, -11, -12, -12, -12, 18]),
    "node_value": [-1 / 15, 2 / 3, -1 / 3, -0.4, 0.6],
    "root_value": [-1 / 15, 0.6, -0.4, -0.4, 0.6],
}


@pytest.mark.parametrize("rule", ADVANTAGES)
def test_credits(t, rule):
    credit = advantages(t["root"], rule)
    assert list(credit) == nodes(t["root"])[1:]
    assert [credit[t[y]] for y in "abdgi"] == pytest.approx(CREDITS[rule], abs=1e-4)
    alone = 0 if rule == "node_value" else credit[t["b"]]  # c is the only child of b
    assert credit[t["c"]] == pytest.approx(alone)


@pytest.mark.parametrize("rule", ADVANTAGES)
@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_no_contrast_no_credit(prompt, rule, reward):
    """Guards a division by a standard deviation of zero."""
    play(prompt, "root", "ab", 0, reward)
    play(prompt, "root", "c", 1, reward)
    backup(prompt["root"])
    assert advantages(prompt["root"], rule) == {}
