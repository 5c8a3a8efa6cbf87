"""The worked example of the notebooks, by hand. Letters as in the docstring of example.py."""
import numpy as np
import pytest

from allocator import allocate_roots, expand_prefixes, flip_prob, mixed_prob
from tree import TARGETS, advantages, leaves, nodes, prefixes
from world.example import example_tree, wrote

NAMES = "root a1 a2 a3 c1 c2 d1 b1 b2 b3 e1 e2 f1 f2 f3".split()
ROOT2 = 2 ** 0.5  # the standard deviation under a1 and b1 is sqrt(2/9) = ROOT2 / 3


@pytest.fixture
def tree():
    """{letter: its node}; the docstring read line by line."""
    return dict(zip(NAMES, nodes(example_tree()), strict=True))


def test_it_is_the_tree_of_the_docstring(tree):
    assert [node.sample for node in tree.values()] == [0] * 4 + [2, 2, 3, 1, 1, 1, 4, 4, 5, 5, 5]
    assert [leaf.reward for leaf in leaves(tree["root"])] == [1, 1, 0, 0, 0, 1]
    assert wrote(tree["a1"]) == wrote(tree["b1"])
    assert wrote(tree["f3"]) == " The birth year is 1834.\nAction: Finish[1834]"


def test_values_and_targets(tree):
    found = [(tree[name].value, tree[name].num_leaves) for name in ("root", "a1", "b1", "a2")]
    assert found == [(1 / 2, 6), (2 / 3, 3), (1 / 3, 3), (1, 1)]
    fresh = TARGETS["fresh"](tree["root"])  # a1 and b1 are the same turn: so are their targets
    assert fresh[tree["root"]] == fresh[tree["a1"]] == fresh[tree["b1"]] == (1 / 2, 2)
    assert fresh[tree["a2"]] == (1, 1)


def test_where_its_rollouts_went(tree):
    """V_root(.4, 2) = 2 (.4)(.6); continuations gain .6, .24 at a1, .4, .24 at b1, .1 elsewhere."""
    assert mixed_prob(0.4, [2, 3]) == pytest.approx([0.48, 0.72])
    assert allocate_roots([0.4, 0.95], 2).tolist() == [2, 0]
    found = prefixes(example_tree(expanded=False))
    v = [prefix.node.predicted for prefix in found]
    r = [prefix.outcome for prefix in found]
    k = expand_prefixes(v, r, 4)
    assert k.tolist() == [2, 0, 2, 0]
    assert flip_prob(v, r, k) == pytest.approx([0.84, 0, 0.64, 0])
    assert k.tolist() == [len(tree[name].children) - 1 for name in ("a1", "a2", "b1", "b2")]


THIRD = 1 / 3
HAND = {  # rule: of a1, a2, d1, f2
    "root_value": [1 / 6, 1 / 2, -1 / 2, 1 / 2],
    "grpo": [THIRD, 1, -1, 1],
    "tree_grpo": [THIRD, 1 + 1 / ROOT2, -1 - ROOT2, 1 + ROOT2],
    "node_value": [1 / 6, THIRD, -2 / 3, 0],
    "treepo": [1 / 6, 5 / 12, -7 / 12, 7 / 12]}


@pytest.mark.parametrize("rule", HAND)
def test_advantages(tree, rule):
    credit = advantages(tree["root"], rule)
    if rule == "treepo":  # divided by its std over the sampled tokens
        num_sampled = [node.num_sampled for node in credit]
        assert np.repeat([*credit.values()], num_sampled).std() == pytest.approx(1, rel=1e-4)
        credit = {node: value / credit[tree["a1"]] / 6 for node, value in credit.items()}
    found = [credit[tree[name]] for name in ("a1", "a2", "d1", "f2")]
    assert found == pytest.approx(HAND[rule], rel=1e-4)
    assert credit[tree["b1"]] == pytest.approx(-found[0]), "half of the answers are right"


def test_ids_of_a_policy(tree, policy):
    """With a policy's tokenizer it is the same tree, ready for the update."""
    turns = nodes(example_tree(policy.encode))[1:]
    assert [policy.wrote(turn) for turn in turns] == [wrote(tree[name]) for name in NAMES[1:]]
