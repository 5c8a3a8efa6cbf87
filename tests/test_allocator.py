"""The allocator against brute force over every integer allocation, a heap greedy, Monte
Carlo, and hand-worked tables. u stands for v (1-v) throughout.

Statistical tests compare at 6 standard errors: a false alarm has probability 2e-9 each,
and their seeds are fixed.
"""
import heapq
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import allocator
from allocator import (
    PREFIX_RULES,
    ROOT_RULES,
    Anchors,
    allocate_roots,
    beta_moment,
    expand_prefixes,
    expected_flip_prob,
    expected_mixed_prob,
    flip_prob,
    mixed_prob,
)

AWKWARD = [0.0, 1.0, 0.5, 0.3, 0.7, 1e-9, 1 - 1e-9, 0.05]   # 0.3 and 0.7 tie
chance = st.one_of(st.sampled_from(AWKWARD), st.floats(0, 1))


def every_allocation(n, cap):
    """[(cap+1)^n, n]: all integer allocations, single rollouts included."""
    return np.array(list(product(range(cap + 1), repeat=n))).reshape(-1, n)


def root_objective(v, m):
    return mixed_prob(np.asarray(v), m).sum(-1)


def heap_greedy(first, ratio, budget):
    """The textbook solution of stage 2, one continuation at a time."""
    k = np.zeros(len(first), int)
    heap = [(-gain, 0, i) for i, gain in enumerate(first)]
    heapq.heapify(heap)
    for _ in range(budget):
        gain, j, i = heapq.heappop(heap)
        k[i] += 1
        heapq.heappush(heap, (gain * ratio(i, j + 1), j + 1, i))
    return k


# ---- what rollouts are worth ---------------------------------------------------------
def test_mixed_prob_is_2u_3u_and_4u_minus_2u_squared():
    v = np.linspace(0, 1, 21)
    u = v * (1 - v)
    by_m = {0: 0 * u, 1: 0 * u, 2: 2 * u, 3: 3 * u, 4: 4 * u - 2 * u**2}
    for m, expected in by_m.items():
        np.testing.assert_allclose(mixed_prob(v, m), expected, atol=1e-15)


def test_mixed_prob_increments_rise_once_then_fall():
    rise = np.diff(mixed_prob(0.5, np.arange(6)))
    assert rise.tolist() == [0, 0.5, 0.25, 0.125, 0.0625]   # 0, 2u, u, u - 2u^2, ...
    assert rise[1] > rise[0], "not concave: one-unit greedy stalls before it starts"


@pytest.mark.parametrize("v, r, k, expected", [
    (0.9, 1, 0, 0.0),       # no continuation flips nothing, whatever q is
    (1.0, 1, 3, 0.0),       # q = 1: the outcome is certain to repeat
    (0.0, 1, 1, 1.0),       # a success where none was thought possible: q = 0
    (0.9, 0, 1, 0.9),       # a surprising failure
    (0.9, 1, 1, 0.1),       # an expected success
    (0.9, 1, 2, 0.19),
])
def test_flip_prob(v, r, k, expected):
    assert flip_prob(v, r, k) == pytest.approx(expected, abs=1e-15)


def test_values_broadcast():
    v, r = np.array([0.2, 0.5, 0.8]), np.array([0, 1, 1])
    assert mixed_prob(v[:, None], np.arange(5)).shape == (3, 5)
    assert flip_prob(v[:, None], r[:, None], np.arange(5)).shape == (3, 5)
    assert expected_mixed_prob(v[:, None], 1.0, np.arange(5)).shape == (3, 5)
    assert expected_flip_prob(v[:, None], 1.0, r[:, None], np.arange(5)).shape == (3, 5)
    assert np.ndim(mixed_prob(0.5, 4)) == np.ndim(expected_mixed_prob(1, 1, 4)) == 0


# ---- the posterior -------------------------------------------------------------------
def test_unknown_is_worth_less_than_known_to_be_even():
    plug_in = mixed_prob(0.5, 4)
    unknown, known = expected_mixed_prob(1, 1, 4), expected_mixed_prob(11, 11, 4)
    assert (round(unknown, 3), round(known, 3), plug_in) == (0.600, 0.842, 0.875)


@pytest.mark.parametrize("a, b", [(1, 1), (0.3, 2.5), (11, 11), (5, 0.5)])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 16])
def test_expectations_match_monte_carlo(a, b, count):
    v = np.random.default_rng(count).beta(a, b, 20_000)
    for draws, exact in [
            (mixed_prob(v, count), expected_mixed_prob(a, b, count)),
            (flip_prob(v, 0, count), expected_flip_prob(a, b, 0, count)),
            (flip_prob(v, 1, count), expected_flip_prob(a, b, 1, count))]:
        error = draws.std() / np.sqrt(len(draws))
        assert abs(draws.mean() - exact) <= 6 * error + 1e-12


def test_a_sure_posterior_is_the_plug_in():
    v, k = np.linspace(0, 1, 11), np.arange(9)[:, None]
    a, b = 1e9 * v, 1e9 * (1 - v)
    assert abs(expected_mixed_prob(a, b, k) - mixed_prob(v, k)).max() < 1e-6
    assert abs(expected_flip_prob(a, b, 0, k) - flip_prob(v, 0, k)).max() < 1e-6


@pytest.mark.parametrize("r", [0, 1])
def test_expected_flip_gains_fall_with_k(r):
    """Without this greedy would not be exact under the posterior."""
    gains = np.diff(expected_flip_prob(0.4, 1.7, r, np.arange(40)))
    assert (gains > 0).all() and (np.diff(gains) < 0).all()


# ---- stage 1 -------------------------------------------------------------------------
@settings(max_examples=150, deadline=None)
@given(st.lists(chance, min_size=1, max_size=4), st.integers(0, 22), st.integers(0, 5))
def test_roots_are_optimal_among_all_allocations(v, budget, cap):
    m = allocate_roots(v, budget, cap)
    everything = every_allocation(len(v), cap)
    affordable = everything[everything.sum(axis=1) <= budget]
    assert m.sum() <= budget and set(m.tolist()) <= {0, *range(2, cap + 1)}
    assert root_objective(v, m) >= root_objective(v, affordable).max() - 1e-9
    assert not m[np.isin(v, (0, 1))].any(), "a sure prompt gains nothing"


ROOT_TABLE = [
    # v, budget, cap, m
    ([0.5], 0, 16, [0]),
    ([0.5], 1, 16, [0]),                                # one rollout has no contrast
    ([0.5], 2, 16, [2]),
    ([0.5, 0.5], 3, 16, [3, 0]),                        # 3 on one, not 2 + 1
    ([0.5, 0.5, 0.5], 7, 16, [3, 2, 2]),
    ([0.3] * 6, 12, 16, [3, 3, 3, 3, 0, 0]),            # ties with six pairs
    ([0.9, 0.5, 0.2, 0.6, 0.1, 0.4], 9, 16, [0, 3, 0, 3, 0, 3]),    # large pool: threes
    ([0.9, 0.7, 0.5], 6, 16, [0, 3, 3]),                # small pool: the middle first,
    ([0.9, 0.7, 0.5], 10, 16, [2, 4, 4]),               # then larger groups on it,
    ([0.9, 0.7, 0.5], 24, 16, [12, 7, 5]),              # at last more on the edges
    ([0.5, 0.9], 9, 4, [4, 4]),                         # the cap binds
    ([0.0, 1.0, 0.5], 9, 4, [0, 0, 4]),
    ([0.2, 0.5, 0.0], 10**9, 16, [16, 16, 0]),
    ([], 5, 16, []),
    ([0.5, 0.5], 8, 1, [0, 0]),
]


@pytest.mark.parametrize("v, budget, cap, m", ROOT_TABLE)
def test_root_table(v, budget, cap, m):
    assert allocate_roots(v, budget, cap).tolist() == m


def test_large_pool_means_threes_on_the_prompts_nearest_one_half():
    v = np.random.default_rng(0).random(200)
    m = allocate_roots(v, 60)
    assert sorted(np.flatnonzero(m)) == sorted(np.argsort(abs(v - 0.5))[:20])
    assert set(m[m > 0]) == {3}


def test_two_first_then_one_by_one_is_not_optimal():
    """The tempting greedy: per step the best gain per rollout, opening costs two."""
    v, m = np.full(3, 0.5), np.zeros(3, int)
    while m.sum() < 7:
        step = np.where(m == 0, 2, 1)
        gain = (mixed_prob(v, m + step) - mixed_prob(v, m)) / step
        gain[m.sum() + step > 7] = -1       # unaffordable
        i = np.argmax(gain)
        m[i] += step[i]
    assert m.tolist() == [4, 3, 0] and root_objective(v, m) == 1.625
    assert root_objective(v, allocate_roots(v, 7)) == 1.75


def test_root_ties_do_not_depend_on_rounding():
    """3 + 3 and 2 + 2 + 2 are worth 6u each, but not in floating point."""
    for v in np.linspace(0.01, 0.99, 99):
        assert allocate_roots(np.full(90, v), 90).tolist() == [3] * 30 + [0] * 60


def test_root_solver_takes_any_table():
    rng = np.random.default_rng(1)
    for _ in range(60):
        values = rng.normal(size=(3, 5))
        values[:, 0] = 0
        budget = int(rng.integers(0, 14))
        m = allocator.solve_roots(values, budget)
        everything = every_allocation(3, 4)
        affordable = everything[everything.sum(1) <= budget]
        best = values[np.arange(3), affordable].sum(axis=1).max()
        assert m.sum() <= budget
        assert values[np.arange(3), m].sum() == pytest.approx(best, abs=1e-9)


# ---- stage 2 -------------------------------------------------------------------------
@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(chance, st.integers(0, 1)), min_size=1, max_size=4),
       st.integers(0, 6), st.one_of(st.none(), st.integers(0, 4)))
def test_prefixes_are_optimal_among_all_allocations(prefixes, budget, cap):
    v, r = np.array(prefixes).T
    k = expand_prefixes(v, r, budget, cap)
    most = budget if cap is None else cap
    everything = every_allocation(len(v), min(most, budget))
    affordable = everything[everything.sum(axis=1) <= budget]
    assert k.sum() == min(budget, len(v) * most) and (k <= most).all()
    best = flip_prob(v, r, affordable).sum(axis=1).max()
    assert flip_prob(v, r, k).sum() >= best - 1e-12


PREFIX_TABLE = [
    # v, r, budget, cap, k
    ([0.1, 0.5, 0.9], [1, 1, 1], 2, None, [1, 1, 0]),   # gains .9 .09 | .5 .25 | .1 .09
    ([0.1, 0.5, 0.9], [0, 0, 0], 2, None, [0, 1, 1]),   # chases surprise, not v = 0.5
    ([0.5, 0.5], [0, 1], 5, None, [3, 2]),              # equal gains: earlier first
    ([1.0, 1.0, 1.0], [1, 1, 1], 7, None, [3, 2, 2]),   # nothing to gain: spread evenly
    ([1.0, 0.0], [0, 1], 4, None, [2, 2]),              # q = 0: the first flips it
    ([0.0, 0.5], [1, 1], 4, None, [1, 3]),
    ([0.1, 0.9], [1, 1], 9, 3, [3, 3]),                 # caps bind: the rest stays
    ([0.5, 1.0], [1, 1], 5, 3, [3, 2]),
    ([0.3, 0.6], [1, 0], 0, None, [0, 0]),
    ([0.3], [1], 10**9, None, [10**9]),
    ([], [], 5, None, []),
]


@pytest.mark.parametrize("v, r, budget, cap, k", PREFIX_TABLE)
def test_prefix_table(v, r, budget, cap, k):
    assert expand_prefixes(v, r, budget, cap).tolist() == k


@pytest.mark.parametrize("n, budget", [(1, 50), (3, 400), (40, 40), (40, 1000),
                                       (2000, 700)])
@pytest.mark.parametrize("shape", [0.1, 1, 20])
def test_prefixes_equal_a_heap_greedy(n, budget, shape):
    """0.1: most v near 0 or 1, so a few prefixes take nearly all, far beyond an even
    share, which exercises the solver's doubling. Rounded v: hundreds of ties."""
    rng = np.random.default_rng(n + budget)
    for digits in (1, 15):
        v, r = rng.beta(shape, shape, n).round(digits), rng.integers(0, 2, n)
        flip = flip_prob(v, r, 1)
        expected = heap_greedy(flip, lambda i, j: 1 - flip[i], budget)
        k = expand_prefixes(v, r, budget)
        assert flip_prob(v, r, k).sum() == pytest.approx(
            flip_prob(v, r, expected).sum(), abs=1e-12)
        if (flip[k > 0] > 0).all() and (flip > 0).any() and k.max() < 300:
            assert k.tolist() == expected.tolist()


def test_many_prefixes_and_one_that_takes_nearly_all():
    v = np.r_[np.ones(5_000), 0.999]
    k = expand_prefixes(v, np.ones(5_001), 5_000)
    assert k[-1] == 5_000 and k.sum() == 5_000


# ---- errors --------------------------------------------------------------------------
@pytest.mark.parametrize("name, call", [
    ("v", lambda: mixed_prob(1.5, 2)),
    ("v", lambda: flip_prob(-0.1, 1, 2)),
    ("r", lambda: flip_prob(0.5, 0.5, 2)),
    ("r", lambda: expected_flip_prob(1, 1, 2, 3)),
    ("a and b", lambda: beta_moment(0, 0, 2)),
    ("v", lambda: allocate_roots([0.5, 1.01], 4)),
    ("v", lambda: allocate_roots([0.5, float("nan")], 4)),
    ("v", lambda: allocate_roots([[0.5]], 4)),
    ("v", lambda: allocate_roots(0.5, 4)),
    ("budget", lambda: allocate_roots([0.5], -1)),
    ("budget", lambda: allocate_roots([0.5], 4.0)),
    ("cap", lambda: allocate_roots([0.5], 4, cap=-2)),
    ("v", lambda: expand_prefixes([-0.1], [1], 4)),
    ("v", lambda: expand_prefixes([float("nan")], [1], 4)),
    ("r", lambda: expand_prefixes([0.5], [2], 4)),
    ("r", lambda: expand_prefixes([0.5], [float("nan")], 4)),
    ("r", lambda: expand_prefixes([0.5, 0.5], [1], 4)),
    ("budget", lambda: expand_prefixes([0.5], [1], -4)),
    ("budget", lambda: expand_prefixes([0.5], [1], 2.5)),
    ("cap", lambda: expand_prefixes([0.5], [1], 4, cap=-1)),
    ("floor", lambda: Anchors(np.array([0.5]), floor=1.5)),
    ("concentration", lambda: Anchors(np.array([0.5]), concentration=-1.0)),
    ("cost", lambda: Anchors(np.array([0.5]), cost=np.array([0.0]))),
    ("group_size and cap", lambda: Anchors(np.array([0.5]), group_size=1)),
])
def test_errors_name_the_argument(name, call):
    with pytest.raises(ValueError, match=f"^{name} must be "):
        call()


# ---- rules ---------------------------------------------------------------------------
def pool_of(n, seed=0, **dials):
    rng = np.random.default_rng(seed)
    return Anchors(rng.random(n), successes=5 * rng.random(n),
                   failures=5 * rng.random(n), **dials)


def prefixes_of(n, seed=0, **dials):
    rng = np.random.default_rng(seed)
    return Anchors(rng.random(n), outcome=rng.integers(0, 2, n),
                   cost=rng.uniform(20, 80, n), **dials)


VARIANTS = [{}, {"concentration": 5.0}, {"floor": 0.3}, {"floor": 1.0},
            {"concentration": 5.0, "floor": 0.3}]
SIZES = [(0, 5), (1, 1), (1, 7), (5, 0), (5, 3), (12, 31), (5, 1000)]


@pytest.mark.parametrize("rule", ROOT_RULES)
@pytest.mark.parametrize("dials", VARIANTS)
@pytest.mark.parametrize("n, budget", SIZES)
def test_root_rules_keep_the_budget(rule, dials, n, budget):
    m = ROOT_RULES[rule](pool_of(n, cap=12, **dials), budget, np.random.default_rng(0))
    assert m.shape == (n,) and m.dtype.kind == "i"
    assert m.sum() <= budget and set(m.tolist()) <= {0, *range(2, 13)}
    if budget == 1000:
        assert m.tolist() == [12] * n, "budget for all: every prompt reaches the cap"


@pytest.mark.parametrize("rule", PREFIX_RULES)
@pytest.mark.parametrize("dials", VARIANTS)
@pytest.mark.parametrize("n, budget", SIZES)
def test_prefix_rules_keep_the_budget(rule, dials, n, budget):
    prefixes = prefixes_of(n, **dials)
    k = PREFIX_RULES[rule](prefixes, budget, np.random.default_rng(0))
    assert k.shape == (n,) and k.dtype.kind == "i" and (k >= 0).all()
    assert k.sum() == (budget if n and rule != "none" else 0)


def test_equal_groups_by_hand():
    """group_size 4, and the order in which a rule serves the prompts is 2, 0, 1."""
    pool = Anchors(np.array([0.4, 0.9, 0.5]), group_size=4, cap=6)
    by_budget = {3: [0, 0, 3], 4: [0, 0, 4], 5: [0, 0, 4], 6: [2, 0, 4], 12: [4, 4, 4],
                 14: [5, 4, 5], 99: [6, 6, 6]}
    for budget, m in by_budget.items():     # 5: a lone leftover rollout is dropped
        assert ROOT_RULES["pcl"](pool, budget, None).tolist() == m


def test_uniform_visits_every_prompt_equally_often():
    """Binomial(2000, 1/5) for each of 10 prompts, at 6 standard errors."""
    rng, pool = np.random.default_rng(0), pool_of(10)
    visits = sum(ROOT_RULES["uniform"](pool, 16, rng) > 0 for _ in range(2000))
    assert (abs(visits - 400) <= 6 * np.sqrt(2000 * 0.2 * 0.8)).all()


def test_mopps_goes_by_counts_and_not_by_the_predictor():
    pool = Anchors(np.array([0.5, 0.5, 0.0]), successes=np.array([0.0, 500.0, 250.0]),
                   failures=np.array([500.0, 0.0, 250.0]), group_size=8)
    assert ROOT_RULES["mopps"](pool, 8, np.random.default_rng(0)).tolist() == [0, 0, 8]


def test_knapsack_prefers_the_hard_prompt_and_trace_has_no_preference():
    pool = Anchors(np.array([0.75, 0.25]))
    assert ROOT_RULES["knapsack"](pool, 3, None).tolist() == [0, 3]
    assert ROOT_RULES["trace"](pool, 3, np.random.default_rng(0)).tolist() == [3, 0]


def test_trace_rules_are_the_exact_solvers():
    pool, prefixes, rng = pool_of(30), prefixes_of(30), np.random.default_rng(0)
    assert (ROOT_RULES["trace"](pool, 50, rng) == allocate_roots(pool.v, 50)).all()
    assert (PREFIX_RULES["trace"](prefixes, 50, rng)
            == expand_prefixes(prefixes.v, prefixes.outcome, 50)).all()


def test_posterior_roots_are_optimal_and_prefer_the_known_prompt():
    counts = np.array([0.0, 10.0])      # Beta(1, 1) and Beta(11, 11), both v = 0.5
    pool = Anchors(np.array([0.5, 0.5]), successes=counts, failures=counts,
                   concentration=2.0)
    rng, plug_in = np.random.default_rng(0), replace(pool, concentration=0.0)
    assert ROOT_RULES["trace"](pool, 3, rng).tolist() == [0, 3]
    assert ROOT_RULES["trace"](plug_in, 3, rng).tolist() == [3, 0]
    for seed in range(20):
        pool = pool_of(3, seed, concentration=3.0, cap=6)
        a, b = 3 * pool.v + pool.successes, 3 * (1 - pool.v) + pool.failures
        everything = every_allocation(3, 6)
        totals = expected_mixed_prob(a, b, everything).sum(axis=1)
        m = ROOT_RULES["trace"](pool, 9, rng)
        assert expected_mixed_prob(a, b, m).sum() == pytest.approx(
            totals[everything.sum(axis=1) <= 9].max(), abs=1e-9)


@pytest.mark.parametrize("concentration", [0.0, 3.0])
@pytest.mark.parametrize("floor, units", [(0.0, 0), (0.4, 1), (0.9, 2)])
def test_prefixes_are_optimal_given_their_floor(concentration, floor, units):
    """The floor is `units` for each of three prefixes, of 7 continuations."""
    feasible = every_allocation(3, 7)
    feasible = feasible[(feasible.sum(axis=1) == 7) & (feasible.min(axis=1) >= units)]
    for seed in range(20):
        p = prefixes_of(3, seed, concentration=concentration, floor=floor)

        def value(k):
            if not concentration:
                return flip_prob(p.v, p.outcome, k).sum(-1)
            return expected_flip_prob(3 * p.v, 3 * (1 - p.v), p.outcome, k).sum(-1)

        k = PREFIX_RULES["trace"](p, 7, np.random.default_rng(0))
        assert k.min() >= units
        assert value(k) == pytest.approx(value(feasible).max(), abs=1e-12)


def test_repeats_flip_nothing():
    """Best of all 36 allocations of 7 where a continuation that departs flips as predicted; a
    prefix from which nothing departs gets none."""
    feasible = every_allocation(3, 7)
    feasible = feasible[feasible.sum(axis=1) == 7]
    for seed in range(20):
        repeat = np.random.default_rng(seed).random(3)
        p = replace(prefixes_of(3, seed), repeat=repeat)

        def value(k):
            return (1 - (1 - (1 - repeat) * flip_prob(p.v, p.outcome, 1)) ** k).sum(-1)
        k = PREFIX_RULES["trace"](p, 7, np.random.default_rng(0))
        assert value(k) == pytest.approx(value(feasible).max(), abs=1e-12)
        sure = replace(p, repeat=np.array([0.0, 1.0, 0.5]))
        assert PREFIX_RULES["trace"](sure, 7, np.random.default_rng(0))[1] == 0


def test_floor_reaches_every_prompt():
    """Guards against starvation: without a floor, hopeless prompts are never visited.
    With 2 of 10 visited per step, a prompt is missed 150 times with chance 3e-15."""
    pool = Anchors(np.r_[np.full(5, 0.5), np.full(5, 1e-6)])
    rng = np.random.default_rng(0)
    starved = sum(ROOT_RULES["trace"](pool, 16, rng) for _ in range(5))
    pool = replace(pool, floor=0.25)    # 4 of 16 rollouts: two pairs
    steps = [ROOT_RULES["trace"](pool, 16, rng) for _ in range(150)]
    assert not starved[5:].any() and (sum(steps) > 0).all()
    assert all(m.sum() == 16 for m in steps)


def test_floor_of_one_is_uniform():
    pool, rng = pool_of(6, floor=1.0), np.random.default_rng(0)
    assert ROOT_RULES["trace"](pool, 24, rng).tolist() == [4] * 6
    prefixes = prefixes_of(6, floor=1.0)
    assert PREFIX_RULES["trace"](prefixes, 24, rng).tolist() == [4] * 6


def test_roots_are_optimal_given_their_floor():
    """The floor of 4 puts a pair on two of three prompts; the rest is still exact."""
    everything = every_allocation(3, 6)
    everything = everything[everything.sum(axis=1) <= 10]
    for seed in range(20):
        pool = pool_of(3, seed, floor=0.4, cap=6)
        m = ROOT_RULES["trace"](pool, 10, np.random.default_rng(seed))
        order = np.random.default_rng(seed).random(3)
        forced = allocator.equal_groups(pool, order, 4, size=2)
        feasible = everything[(everything >= forced).all(axis=1)]
        assert (m >= forced).all()
        assert root_objective(pool.v, m) == pytest.approx(
            root_objective(pool.v, feasible).max(), abs=1e-9)


# ---- cost-aware ----------------------------------------------------------------------
def test_equal_costs_change_nothing():
    rng, rule = np.random.default_rng(0), PREFIX_RULES["trace"]
    plain = replace(prefixes_of(9), cost=np.full(9, 37.3))
    for budget in (0, 1, 5, 20):
        aware = rule(replace(plain, cost_aware=True), budget, rng)
        assert (aware == rule(plain, budget, rng)).all()


def test_cheap_prefixes_get_more():
    """Two prefixes alike but for their cost, 30 and 10 tokens; 4 even ones cost 80."""
    prefixes = Anchors(np.array([0.5, 0.5]), outcome=np.array([1, 1]),
                       cost=np.array([30.0, 10.0]), cost_aware=True)
    # Gain per token, times 2: 1/30 1/60 1/120 | 1/10 1/20 1/40 1/80, in order
    # cheap, cheap, dear, cheap = 60 tokens; of the next, a dear one, half still fits.
    k = PREFIX_RULES["trace"](prefixes, 4, np.random.default_rng(0))
    assert k.tolist() == [2, 3]


def test_cost_aware_prefixes_are_optimal_for_the_tokens_they_spend():
    everything = every_allocation(3, 12)
    for seed in range(30):
        p = prefixes_of(3, seed, cost_aware=True)
        k = PREFIX_RULES["trace"](p, 6, np.random.default_rng(0))
        assert abs(k @ p.cost - 6 * p.cost.mean()) <= p.cost.max() / 2 + 1e-9
        rivals = everything[everything @ p.cost <= k @ p.cost + 1e-9]
        best = flip_prob(p.v, p.outcome, rivals).sum(axis=1).max()
        assert flip_prob(p.v, p.outcome, k).sum() >= best - 1e-12


@pytest.mark.parametrize("shares, total, want", [
    ([1, 1, 1], 6, [2, 2, 2]), ([3, 1, 0], 8, [6, 2, 0]), ([1, 1, 1], 4, [2, 1, 1]),
    ([0, 0], 5, [0, 0]), ([5], 0, [0])])
def test_deal_in_proportion(shares, total, want):
    """A prompt without a share gets nothing; the rest sums to the total, earlier first."""
    assert allocator.deal_in_proportion(np.array(shares), total).tolist() == want
