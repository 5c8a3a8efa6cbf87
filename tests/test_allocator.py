"""The allocator against brute force over every integer allocation, Monte Carlo, and tables
worked by hand. In comments u stands for v (1−v).

Statistical tests compare at 6 standard errors, with fixed seeds: a false alarm has probability
2e-9 each.
"""
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allocator import (
    CAP,
    PREFIX_RULES,
    ROOT_RULES,
    Anchors,
    allocate_roots,
    equal_groups,
    expand_prefixes,
    expand_trees,
    flip_prob,
    mixed_prob,
    solve_roots,
)
from tree import Prefix

AWKWARD = [0.0, 1.0, 0.5, 0.3, 0.7, 1e-9, 1 - 1e-9, 0.05]  # 0.3 and 0.7 tie
chance = st.one_of(st.sampled_from(AWKWARD), st.floats(0, 1))


def assert_best(value, found, budget, most):
    """Of all integer allocations that the budget buys, single rollouts included, none is worth
    more than the one found."""
    rivals = np.array(list(product(range(most + 1), repeat=len(found))))
    rivals = rivals[rivals.sum(axis=1) <= budget]
    assert value(found).sum() >= value(rivals).sum(axis=1).max() - 1e-9
    assert found.sum() <= budget and (found >= 0).all() and (found <= most).all()


def random_anchors(n, seed=0):
    """Anchors with all that a rule may look at."""
    rng = np.random.default_rng(seed)
    return Anchors(rng.random(n), rng.integers(0, 2, n), 5 * rng.random(n), 5 * rng.random(n))


def apply(rule, anchors, budget, seed=0):
    return rule(anchors, budget, np.random.default_rng(seed))


# ---------------------------------------------------------------- what rollouts are worth
def test_mixed_prob_is_2u_3u_and_4u_minus_2u_squared():
    """Gains rise, then fall: a greedy that adds one rollout at a time stalls before it starts."""
    v = np.linspace(0, 1, 21)
    u = v * (1 - v)
    values = mixed_prob(v[:, None], np.arange(5)).T  # arrays broadcast
    np.testing.assert_allclose(values, [0 * u, 0 * u, 2 * u, 3 * u, 4 * u - 2 * u**2], atol=1e-15)


def test_flip_prob():
    """Nothing is tried; sure to repeat; thought impossible; a surprising failure; an expected
    success, twice."""
    found = flip_prob([0.9, 1.0, 0.0, 0.9, 0.9], [1, 1, 1, 0, 1], [0, 3, 1, 1, 2])
    assert found == pytest.approx([0, 0, 1, 0.9, 0.19], abs=1e-15)


# ---------------------------------------------------------------- stage 1
@settings(max_examples=150, deadline=None)
@given(st.lists(chance, min_size=1, max_size=4), st.integers(0, 22), st.integers(0, 5))
def test_roots_are_optimal_among_all_allocations(v, budget, cap):
    m = allocate_roots(v, budget, cap)
    assert_best(lambda m: mixed_prob(v, m), m, budget, cap)
    assert 1 not in m and not m[np.isin(v, (0, 1))].any(), "there is nothing to gain"


@pytest.mark.parametrize("v, budget, m", [
    ([0.5, 0.5], 3, [3, 0]),                # 3 on one, not 2 + 1
    ([0.5, 0.5, 0.5], 7, [3, 2, 2]),        # greedy by gain per rollout: 4 3 0
    ([0.3] * 6, 12, [3, 3, 3, 3, 0, 0]),    # ties with six pairs
    ([0.9, 0.7, 0.5], 6, [0, 3, 3]),        # small pool: the middle first,
    ([0.9, 0.7, 0.5], 10, [2, 4, 4]),       # then larger groups on it,
    ([0.9, 0.7, 0.5], 24, [12, 7, 5]),      # at last more on the edges
    ([0.2, 0.5, 0.0], 10**9, [16, 16, 0])])
def test_root_table(v, budget, m):
    assert allocate_roots(v, budget).tolist() == m


def test_ties_of_roots_do_not_depend_on_rounding():
    """3 + 3 and 2 + 2 + 2 are worth 6u each, but not in floating point."""
    for v in np.linspace(0.01, 0.99, 99):
        assert allocate_roots(np.full(90, v), 90).tolist() == [3] * 30 + [0] * 60


# ---------------------------------------------------------------- stage 2
@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(chance, st.integers(0, 1)), min_size=1, max_size=4),
       st.integers(0, 6), st.integers(0, 7))
def test_prefixes_are_optimal_among_all_allocations(prefixes, budget, cap):
    v, r = np.array(prefixes).T
    cap = None if cap == 7 else cap
    most = budget if cap is None else cap
    k = expand_prefixes(v, r, budget, cap)
    assert_best(lambda k: flip_prob(v, r, k), k, budget, most)
    assert k.sum() == min(budget, len(v) * most)


@pytest.mark.parametrize("v, r, budget, k", [
    ([0.1, 0.5, 0.9], [0, 0, 0], 2, [0, 1, 1]),  # chases surprise, not v = 0.5
    ([0.5, 0.5], [0, 1], 5, [3, 2]),             # equal gains: earlier first
    ([1.0, 1.0, 1.0], [1, 1, 1], 7, [3, 2, 2]),  # nothing to gain: spread evenly
    ([0.0, 0.5], [1, 1], 4, [1, 3]),             # the first one flips it for sure
    ([1.0, 0.999], [1, 1], 5000, [0, 5000])])    # the least gain is more than none
def test_prefix_table(v, r, budget, k):
    assert expand_prefixes(v, r, budget).tolist() == k


# ---------------------------------------------------------------- errors
@pytest.mark.parametrize("name, function, arguments", [
    ("r", flip_prob, (0.5, 0.5, 2)),
    ("v", allocate_roots, ([0.5, np.nan], 4)),
    ("budget", allocate_roots, ([0.5], 4.0)),
    ("r", expand_prefixes, ([0.5, 0.5], [1], 4)),
    ("cap", expand_prefixes, ([0.5], [1], 4, -1))])
def test_errors_name_the_argument(name, function, arguments):
    with pytest.raises(ValueError, match=f"^{name} must be "):
        function(*arguments)


# ---------------------------------------------------------------- rules by name
SIZES = pytest.mark.parametrize("n, budget", [(0, 5), (5, 0), (5, 3), (12, 31), (5, 1000)])


@SIZES
@pytest.mark.parametrize("rule", ROOT_RULES)
def test_root_rules_keep_the_budget(rule, n, budget):
    m = apply(ROOT_RULES[rule], random_anchors(n), budget)
    assert m.shape == (n,) and m.dtype.kind == "i"
    assert m.sum() <= budget and set(m.tolist()) <= {0, *range(2, CAP + 1)}
    assert budget < 1000 or m.tolist() == [CAP] * n, "enough for all: every prompt is full"


@SIZES
@pytest.mark.parametrize("rule", PREFIX_RULES)
def test_prefix_rules_keep_the_budget(rule, n, budget):
    k = apply(PREFIX_RULES[rule], random_anchors(n), budget)
    assert k.shape == (n,) and k.dtype.kind == "i" and (k >= 0).all()
    assert k.sum() == (budget if n and rule != "none" else 0)


@pytest.mark.parametrize("budget, m", [
    (6, [2, 0, 4]), (14, [5, 4, 5]),
    (5, [0, 0, 4])])  # a lone rollout that is left over is dropped
def test_equal_groups_of_four(budget, m):
    """Lowest score first: the third prompt, then the first."""
    assert equal_groups(np.array([0.1, 0.4, 0.0]), budget, 4).tolist() == m


def test_uniform_visits_every_prompt_equally_often():
    """Binomial(2000, 1/5) for each of 10 prompts: six standard errors are 107."""
    rng, pool = np.random.default_rng(0), random_anchors(10)
    visits = sum(ROOT_RULES["uniform"](pool, 16, rng) > 0 for _ in range(2000))
    assert abs(visits - 400).max() <= 107


@pytest.mark.parametrize("rule, m", [
    ("pcl", [3, 0, 0]),  # by the prediction
    ("mopps", [0, 3, 0])])  # by the counts
def test_which_root_a_rule_prefers(rule, m):
    pool = Anchors(np.array([0.52, 0.95, 0.4]), successes=np.array([500.0, 250, 0]),
                   failures=np.array([0.0, 250, 500]))
    assert apply(ROOT_RULES[rule], pool, 3).tolist() == m


def test_the_rules_of_trace_are_the_optima():
    p = random_anchors(9)
    m = apply(ROOT_RULES["trace"], p, 20)
    k = apply(PREFIX_RULES["trace"], p, 20)
    assert (m == allocate_roots(p.v, 20)).all()
    assert (k == expand_prefixes(p.v, p.outcome, 20)).all()


def test_the_optimum_of_any_table():
    """Against all allocations of nine rollouts, of three rows that rise and fall."""
    for seed in range(20):
        values = np.random.default_rng(seed).random((3, 10))
        values[:, 0] = 0
        m = solve_roots(values, 9)
        assert_best(lambda m: values[np.arange(3), m], m, 9, 9)


# ---------------------------------------------------------------- a step
def test_expand_trees(monkeypatch):
    """Trees of 2, 3 and 3 bare rollouts. The second has no prefix and hands its share back: 2 x 8
    continuations go to the others in proportion 2 to 3. A rule sees the prefixes of its own tree
    alone."""
    seen = []

    def rule(p, budget, rng):
        seen.append((*p.v, *p.outcome, budget))
        return p.outcome
    monkeypatch.setitem(PREFIX_RULES, "mine", rule)
    found = [Prefix(None, 0), Prefix(None, 1)], [], [Prefix(None, 1)]
    k = expand_trees(found, np.array([0.9, 0.8, 0.5]), np.array([2, 3, 3]), 2, "mine", None)
    assert k.tolist() == [0, 1, 1]
    assert seen == [(0.9, 0.8, 0, 1, 6), (0,), (0.5, 1, 10)]
