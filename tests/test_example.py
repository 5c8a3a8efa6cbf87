"""The worked example of the notebooks, by hand. Letters as in the docstring of example.py."""
import pytest

from allocator import allocate_roots, expand_prefixes, flip_prob, mixed_prob
from tree import leaves, nodes, prefixes
from world.example import example_tree, wrote

NAMES = "root a1 a2 a3 c1 c2 d1 b1 b2 b3 e1 e2 f1 f2 f3".split()


@pytest.fixture
def tree():
    """{letter: its node}; the docstring read line by line."""
    return dict(zip(NAMES, nodes(example_tree()), strict=True))


def test_it_is_the_tree_of_the_docstring(tree):
    assert [node.sample for node in tree.values()] == [0] * 4 + [2, 2, 3, 1, 1, 1, 4, 4, 5, 5, 5]
    assert [leaf.reward for leaf in leaves(tree["root"])] == [1, 1, 0, 0, 0, 1]
    assert [tree[name].value for name in ("root", "a1", "b1")] == [1 / 2, 2 / 3, 1 / 3]
    assert wrote(tree["a1"]) == wrote(tree["b1"])
    assert wrote(tree["f3"]) == " The birth year is 1834.\nAction: Finish[1834]"


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
