"""The worked example of the notebooks, by hand. Letters as in the docstring of example.py."""
import numpy as np
import pytest

from allocator import allocate_roots, expand_prefixes, flip_prob, mixed_prob
from react_env import exact_match
from tree import TARGETS, advantages, leaves, nodes, path, prefixes
from world.example import ENV, QUESTION, example_tree, wrote

ROOT2 = 2 ** 0.5  # the standard deviation under a1 and b1 is sqrt(2/9) = ROOT2 / 3


@pytest.fixture
def tree():
    """The root and every other node by its letter."""
    root = example_tree()
    a1, b1 = root.children
    (a2, c1, d1), (b2, e1, f1) = a1.children, b1.children
    return {"root": root, "a1": a1, "a2": a2, "a3": a2.children[0], "b1": b1, "b2": b2,
            "b3": b2.children[0], "c1": c1, "c2": c1.children[0], "d1": d1, "e1": e1,
            "e2": e1.children[0], "f1": f1, "f2": f1.children[0],
            "f3": f1.children[0].children[0]}


def test_it_is_the_tree_of_the_docstring(tree):
    assert set(nodes(tree["root"])) == set(tree.values())
    assert [leaf.sample for leaf in leaves(tree["root"])] == [0, 2, 3, 1, 4, 5]
    assert wrote(tree["a1"]) == wrote(tree["b1"])
    assert wrote(tree["f3"]) == " The birth year is 1834.\nAction: Finish[1834]"
    assert [leaf.reward for leaf in leaves(tree["root"])] == [1, 1, 0, 0, 0, 1]
    assert exact_match(tree["f3"].state.prediction, QUESTION.answers) == 1
    assert max(node.depth for node in tree.values()) == 4 <= ENV.max_turns


def test_values_and_targets(tree):
    assert [tree[n].num_leaves for n in ("root", "a1", "b1", "a2", "f1")] == [6, 3, 3, 1, 1]
    assert [tree[n].value for n in ("root", "a1", "b1", "a2", "b2", "f1")] == pytest.approx(
        [1 / 2, 2 / 3, 1 / 3, 1, 0, 1])
    fresh = TARGETS["fresh"](tree["root"])  # a1 and b1 are the same turn: so are their targets
    assert [fresh[tree[n]] for n in ("root", "a1", "b1", "a2")] == [
        (1 / 2, 2), (1 / 2, 2), (1 / 2, 2), (1, 1)]


def test_where_its_rollouts_went(tree):
    """V_root(.4, 2) = 2 (.4)(.6); continuations gain .6, .24 at a1, .4, .24 at b1, .1 elsewhere."""
    root = example_tree(expanded=False)
    assert mixed_prob(root.predicted, [2, 3]) == pytest.approx([0.48, 0.72])
    assert allocate_roots([root.predicted, 0.95], 2).tolist() == [2, 0]
    pairs = prefixes(root)
    assert [reward for _, reward in pairs] == [1, 1, 0, 0]
    v, r = np.array([(node.predicted, reward) for node, reward in pairs]).T
    k = expand_prefixes(v, r, 4)
    assert k.tolist() == [2, 0, 2, 0]
    assert flip_prob(v, r, k) == pytest.approx([0.84, 0, 0.64, 0])
    assert k.tolist() == [len(tree[name].children) - 1 for name in ("a1", "a2", "b1", "b2")]


THIRD = 1 / 3
HAND = {
    "root_value": {"a1": 1 / 6, "a2": 1 / 2, "d1": -1 / 2, "b1": -1 / 6, "f3": 1 / 2},
    "grpo": {"a1": THIRD, "a2": 1, "a3": 1, "c1": 1, "d1": -1, "b1": -THIRD, "b3": -1, "f1": 1},
    "tree_grpo": {"a1": THIRD, "a2": 1 + 1 / ROOT2, "d1": -1 - ROOT2, "b1": -THIRD,
                  "b2": -1 - 1 / ROOT2, "e2": -1 - 1 / ROOT2, "f2": 1 + ROOT2},
    "node_value": {"a1": 1 / 6, "a2": THIRD, "a3": 0, "c1": THIRD, "d1": -2 / 3, "b1": -1 / 6,
                   "b2": -THIRD, "e1": -THIRD, "f1": 2 / 3, "f2": 0, "f3": 0},
    "treepo": {"a1": 1 / 6, "a2": 5 / 12, "a3": 5 / 12, "c1": 5 / 12, "c2": 5 / 12, "d1": -7 / 12,
               "b1": -1 / 6, "b2": -5 / 12, "b3": -5 / 12, "e1": -5 / 12, "e2": -5 / 12,
               "f1": 7 / 12, "f2": 7 / 12, "f3": 7 / 12}}


@pytest.mark.parametrize("rule", HAND)
def test_advantages(tree, rule):
    scale = 1.0
    if rule == "treepo":  # divided by the std over all sampled tokens of the tree
        raw = np.repeat([*HAND[rule].values()], [tree[name].num_sampled for name in HAND[rule]])
        scale = raw.std()
    credit = advantages(tree["root"], rule)
    assert {name: credit[tree[name]] for name in HAND[rule]} == pytest.approx(
        {name: value / scale for name, value in HAND[rule].items()}, rel=1e-4)


def test_ids_of_a_policy(tree, data, policy):
    """With a policy's tokenizer it is the same tree, ready for the update."""
    root = example_tree(policy.encode)
    assert [policy.wrote(n) for n in nodes(root)[1:]] == [wrote(n) for n in nodes(tree["root"])[1:]]
    assert all(path(leaf)[0] is root for leaf in leaves(root))
