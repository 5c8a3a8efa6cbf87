"""Targets and advantages on one small tree, worked by hand.

    root ─ a ─ b ─ c   R=1        bare rollout 1, expanded at a:
           └── d ─ e   R=0        continuation
           └── f       R=0        continuation
         ─ g ─ h       R=0        bare rollout 2
         ─ i           R=1        bare rollout 3

V̂: a = 1/3, b = c = 1, d = e = f = 0, g = h = 0, i = 1, root = (3·1/3 + 0 + 1) / 5 = 2/5.
"""
from types import SimpleNamespace

import numpy as np
import pytest

from tree import (
    ADVANTAGES,
    EPSILON,
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
    repeat_probs,
    sampled_tokens,
)


def turn(parent, first_id, reward=None, num_sampled=2, sample=0):
    state = SimpleNamespace(done=reward is not None, reward=reward or 0.0)
    ids = np.arange(first_id, first_id + num_sampled + (reward is None))  # one observation id
    return Node(ids.astype(np.int32), num_sampled, state, parent, sample=sample)


@pytest.fixture
def tree():
    root = Node(np.array([1, 2, 3], np.int32), 0, SimpleNamespace(done=False, reward=0.0))
    t = {"root": root, "a": turn(root, 10)}
    t["b"] = turn(t["a"], 20)
    t["c"] = turn(t["b"], 30, 1.0)
    t["g"] = turn(root, 70, sample=1)
    t["h"] = turn(t["g"], 80, 0.0, sample=1)
    t["i"] = turn(root, 90, 1.0, sample=2)
    t["owners"] = prefixes(root)
    t["d"] = turn(t["a"], 40, sample=3)
    t["e"] = turn(t["d"], 50, 0.0, sample=3)
    t["f"] = turn(t["a"], 60, 0.0, sample=4)
    backup(root)
    return t


def test_targets(tree):
    want = {"a": 1 / 3, "b": 1, "c": 1, "d": 0, "e": 0, "f": 0, "g": 0, "h": 0, "i": 1, "root": 0.4}
    assert {name: tree[name].value for name in want} == pytest.approx(want)
    assert [tree[name].num_leaves for name in ("root", "a", "b", "g", "i")] == [5, 3, 1, 1, 1]
    assert has_contrast(tree["root"])


@pytest.mark.parametrize("rule, want", [
    ("all", {"root": (2 / 5, 5), "a": (1 / 3, 3), "b": (1, 1), "d": (0, 1), "g": (0, 1)}),
    # bare leaves at the root; at a its two continuations; else the outcome of the own rollout
    ("fresh", {"root": (2 / 3, 3), "a": (0, 2), "b": (1, 1), "d": (0, 1), "g": (0, 1)})])
def test_targets_of_the_predictor_by_hand(tree, rule, want):
    targets = TARGETS[rule](tree["root"])
    assert set(targets) == set(nodes(tree["root"]))
    assert {name: targets[tree[name]] for name in want} == want


def test_fresh_targets_of_a_prefix_ignore_continuations_from_elsewhere(tree):
    """A success that started below a changes b, where it started, and neither a nor the root."""
    turn(turn(tree["b"], 100, sample=5), 110, 0.0, sample=5)
    targets = TARGETS["fresh"](tree["root"])
    assert [targets[tree[name]] for name in ("root", "a", "b", "c")] == [
        (2 / 3, 3), (0, 2), (0, 1), (1, 1)]


def test_structure(tree):
    root = tree["root"]
    assert [n.reward for n in leaves(root)] == [1, 0, 0, 0, 1]
    assert path(tree["e"]) == [root, tree["a"], tree["d"], tree["e"]]
    assert path_ids(tree["f"]).tolist() == [1, 2, 3, 10, 11, 12, 60, 61]
    assert tree["f"].length == 8 and tree["f"].depth == 2
    assert sampled_tokens(root) == 2 * 9
    # each non-terminal prefix of a bare rollout, with that rollout's own outcome
    assert tree["owners"] == [(tree["a"], 1), (tree["b"], 1), (tree["g"], 0)]


def test_repeat_probs_by_hand(tree):
    """One turn each of chance 1/2 (two tokens of log-prob ln(1/2) / 2): behind a stand b and c."""
    for node in nodes(tree["root"]):
        node.logprobs = np.log(0.5) * np.ones(node.num_sampled) / 2
    for name in "def":  # before the continuations
        node = tree[name]
        node.parent.children.remove(node)
    assert [node for node, _ in prefixes(tree["root"])] == [tree[name] for name in "abg"]
    assert repeat_probs(tree["root"]) == pytest.approx([1 / 4, 1 / 2, 1 / 2])


STD_ROOT, STD_A = (0.4 * 0.6) ** 0.5, (1 / 3 * 2 / 3) ** 0.5
HAND = {
    "grpo": {"a": (1 / 3 - 0.4) / STD_ROOT, "b": 0.6 / STD_ROOT, "d": -0.4 / STD_ROOT,
             "g": -0.4 / STD_ROOT, "i": 0.6 / STD_ROOT},
    "tree_grpo": {"a": (1 / 3 - 0.4) / STD_ROOT, "b": 0.6 / STD_ROOT + (2 / 3) / STD_A,
                  "d": -0.4 / STD_ROOT - (1 / 3) / STD_A, "g": -0.4 / STD_ROOT,
                  "i": 0.6 / STD_ROOT},
    "node_value": {"a": 1 / 3 - 0.4, "b": 2 / 3, "c": 0, "d": -1 / 3, "e": 0, "f": -1 / 3,
                   "g": -0.4, "h": 0, "i": 0.6},
    "root_value": {"a": 1 / 3 - 0.4, "b": 0.6, "c": 0.6, "d": -0.4, "f": -0.4, "g": -0.4, "i": 0.6},
}


@pytest.mark.parametrize("rule", HAND)
def test_advantages_by_hand(tree, rule):
    credit = advantages(tree["root"], rule)
    for name, value in HAND[rule].items():
        assert credit[tree[name]] == pytest.approx(value, abs=1e-4), name
    assert set(credit) == set(nodes(tree["root"])) - {tree["root"]}


def test_treepo_by_hand(tree):
    """Ancestors with more than one leaf: root for all, and a for what is below it."""
    raw = {"a": 1 / 3 - 0.4, "b": (0.6 + 2 / 3) / 2, "c": (0.6 + 2 / 3) / 2,
           "d": (-0.4 - 1 / 3) / 2, "e": (-0.4 - 1 / 3) / 2, "f": (-0.4 - 1 / 3) / 2,
           "g": -0.4, "h": -0.4, "i": 0.6}
    scale = np.std(list(raw.values())) + EPSILON  # every turn here has two sampled tokens
    credit = advantages(tree["root"], "treepo")
    for name, value in raw.items():
        assert credit[tree[name]] == pytest.approx(value / scale), name


def test_a_shared_turn_gets_the_mean_over_its_leaves(tree):
    """The shortcut through V̂ equals the definition: leaf advantages averaged per node."""
    rewards = np.array([leaf.reward for leaf in leaves(tree["root"])])
    of_leaf = {leaf: (leaf.reward - rewards.mean()) / (rewards.std() + EPSILON)
               for leaf in leaves(tree["root"])}
    for node, value in advantages(tree["root"], "grpo").items():
        assert value == pytest.approx(np.mean([of_leaf[leaf] for leaf in leaves(node)]))


@pytest.mark.parametrize("rule", ADVANTAGES)
@pytest.mark.parametrize("rewards", [[1.0], [0.0], [1.0, 1.0, 1.0], [0.0, 0.0]])
def test_no_contrast_no_credit(rule, rewards):
    root = Node(np.array([1], np.int32), 0, SimpleNamespace(done=False, reward=0.0))
    for reward in rewards:
        turn(turn(root, 10), 20, reward)
    backup(root)
    assert advantages(root, rule) == {}
