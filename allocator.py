"""Where is the next rollout worth most? Allocation rules and their exact solvers. NumPy only.

    stage 1  roots     V_root(v, m) = 1 − v^m − (1−v)^m   not concave   allocate_roots
    stage 2  prefixes  V_pref(q, k) = 1 − q^k             concave       expand_prefixes

n anchors (roots, or prefixes of one prompt): v [n] predicted success probability, r [n] outcome
(0 or 1) of the bare rollout that owns a prefix, q [n] predicted chance that a continuation
repeats r, which is r v + (1−r)(1−v), m and k [n] numbers of rollouts. V_root is `mixed_prob`,
V_pref is `flip_prob`, and `flip` is 1 − q. A rule is a function (Anchors, budget, rng) -> int [n]
and one line in ROOT_RULES or PREFIX_RULES.
"""
import heapq
from dataclasses import dataclass

import numpy as np

CAP = 16     # most bare rollouts of one prompt
TIE = 1e-11  # values of roots this close, relative to the largest, count as equal


def check(name, ok, wanted):
    if not np.all(ok):
        raise ValueError(f"{name} must be {wanted}")


def check_counts(**counts):
    for name, x in counts.items():
        check(name, isinstance(x, (int, np.integer)) and x >= 0, "an integer >= 0")


# ---------------------------------------------------------------- what rollouts are worth
def mixed_prob(v, m):
    """V_root: chance that m rollouts are mixed, 1 − v^m − (1−v)^m; 0 if m is 0 or 1. Arrays
    broadcast."""
    v, m = np.asarray(v, float), np.asarray(m)
    check("v", (v >= 0) & (v <= 1), "in [0, 1]")  # NaN fails both
    return np.where(m > 1, np.maximum(0.0, 1 - v**m - (1 - v)**m), 0.0)


def flip_prob(v, r, k):
    """V_pref: chance that one of k continuations flips r, 1 − [r v + (1−r)(1−v)]^k. Arrays
    broadcast."""
    v, r, k = np.asarray(v, float), np.asarray(r), np.asarray(k)
    check("v", (v >= 0) & (v <= 1), "in [0, 1]")
    check("r", (r == 0) | (r == 1), "0 or 1")
    return 1 - np.where(r == 1, v, 1 - v) ** k


# ---------------------------------------------------------------- exact solvers
def allocate_roots(v, budget, cap=CAP):
    """m [n], each 0 or 2..cap, sum <= budget, maximising sum(mixed_prob(v, m)) exactly. Ties
    favour earlier prompts. ValueError names what is wrong: v not [n] in [0, 1], or budget or cap
    not an integer >= 0."""
    v = np.asarray(v, float)
    check("v", v.ndim == 1, "one-dimensional")
    check_counts(budget=budget, cap=cap)
    return solve_roots(mixed_prob(v[:, None], np.arange(cap + 1)), budget)


def solve_roots(values, budget):
    """m [n] maximising sum_i values[i, m_i] subject to sum_i m_i <= budget.

    values [n, cap + 1]: any table with values[:, 0] = 0. A grouped knapsack, by dynamic
    programming in n * cap * budget operations. Optimal to TIE per prompt; among equals the last
    prompt gets the fewest, then the one before it: a lone rollout, worth 0, is never given."""
    n, cap = len(values), values.shape[1] - 1
    wanted = values.argmax(axis=1)
    if wanted.sum() <= budget:
        return wanted
    best = np.zeros((n + 1, budget + 1))  # [i, b]: of the first i prompts, at most b spent
    for old, new, row in zip(best, best[1:], values):
        new[:] = old
        for m in range(1, min(cap, budget) + 1):
            np.maximum(new[m:], old[:budget + 1 - m] + row[m], out=new[m:])
    # Walk back. 3+3 and 2+2+2 rollouts at one v are both worth 6 v (1−v), but their sums in
    # floating point differ: the tolerance keeps ties ties.
    m, left, tie = np.zeros(n, int), budget, TIE * values.max()
    for i in reversed(range(n)):
        options = np.arange(min(cap, left) + 1)
        totals = best[i, left - options] + values[i, options]
        m[i] = np.argmax(totals >= best[i + 1, left] - tie)  # the first one, with the fewest
        left -= int(m[i])
    return m


def expand_prefixes(v, r, budget, cap=None):
    """k [n], sum == budget (less only if caps bind), maximising sum(flip_prob) exactly, by
    giving each to the largest gain. Ties go to the fewest so far, then to earlier prefixes.
    ValueError as allocate_roots, and if r is not [n] in {0, 1}."""
    v, r = np.asarray(v, float), np.asarray(r)
    check("v", v.ndim == 1, "one-dimensional")
    check("r", r.shape == v.shape, f"of v's shape {v.shape}, not {r.shape}")
    check_counts(budget=budget, cap=cap or 0)
    flip, k = flip_prob(v, r, 1), np.zeros(len(v), int)
    heap = [(-gain, 1, i) for i, gain in enumerate(flip)]  # equal gains: fewest so far, then i
    heapq.heapify(heap)
    while heap and budget > 0 and cap != 0:
        gain, j, i = heapq.heappop(heap)
        k[i] = j
        budget -= 1
        if j != cap:  # each gain is 1 − flip times the one before: never above it
            heapq.heappush(heap, (gain * (1 - flip[i]), j + 1, i))
    return k


def deal_evenly(units, room):
    """int [n] <= room [n], as even as it allows, earlier first; sum = units if they fit."""
    dealt = np.zeros(len(room), int)
    while units > 0 and (dealt < room).any():
        rows = np.flatnonzero(dealt < room)[:units]
        share = min(units // len(rows), (room - dealt)[rows].min())
        dealt[rows] += share
        units -= share * len(rows)
    return dealt


def deal_in_proportion(shares, total):
    """int [n] in proportion to `shares`, with sum `total`, by largest remainder; all 0 where
    nothing has a share."""
    if not shares.any():
        return shares
    exact = shares * total / shares.sum()
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[:total - counts.sum()]] += 1
    return counts


# ---------------------------------------------------------------- rules by name
@dataclass(frozen=True)
class Anchors:
    """What a rule may see of n roots, or of the n prefixes of one prompt."""
    v: np.ndarray                             # [n] predicted success probability
    outcome: np.ndarray | None = None         # [n] r of the bare rollout: prefixes only
    successes: np.ndarray | float = 0.0       # [n] counted at that prompt so far: roots only
    failures: np.ndarray | float = 0.0        # [n] likewise
    group_size: int = 8                       # bare rollouts per prompt where groups are equal


def equal_groups(score, budget, size):
    """m [n]: `size` rollouts each, at most CAP, from the lowest score up, then one smaller group
    (a lone leftover is dropped). What is left when all have one is dealt evenly, up to CAP."""
    n = len(score)
    m = np.clip(budget - size * np.arange(n), 0, size)
    m[m == 1] = 0
    m += deal_evenly(budget - size * n, CAP - m)
    return m[np.argsort(np.argsort(score, kind="stable"))]  # [n] by rank -> by prompt


def uniform_roots(pool, budget, rng):
    """Equal groups on random prompts (GRPO)."""
    return equal_groups(rng.random(len(pool.v)), budget, pool.group_size)


def pcl_roots(pool, budget, rng):
    """Equal groups where the predicted v is nearest 0.5 (PCL)."""
    return equal_groups(np.abs(pool.v - 0.5), budget, pool.group_size)


def mopps_roots(pool, budget, rng):
    """Equal groups where a Thompson draw from the prompt's own counts is nearest 0.5 (MoPPS)."""
    draw = rng.beta(1 + pool.successes, 1 + pool.failures, len(pool.v))
    return equal_groups(np.abs(draw - 0.5), budget, pool.group_size)


def trace_roots(pool, budget, rng):
    """Stage 1, exactly."""
    return allocate_roots(pool.v, budget)


def no_prefixes(prefixes, budget, rng):
    """No continuations."""
    return np.zeros(len(prefixes.v), int)


def random_prefixes(prefixes, budget, rng):
    """Each continuation starts at a uniformly random prefix of its own."""
    n = len(prefixes.v)
    return np.bincount(rng.integers(n, size=budget if n else 0), minlength=n)


def trace_prefixes(prefixes, budget, rng):
    """Stage 2, exactly."""
    return expand_prefixes(prefixes.v, prefixes.outcome, budget)


ROOT_RULES = {  # name: (pool, budget, rng) -> m [n]
    "uniform": uniform_roots, "pcl": pcl_roots, "mopps": mopps_roots, "trace": trace_roots}
PREFIX_RULES = {  # name: (prefixes of one prompt, budget, rng) -> k [n]
    "none": no_prefixes, "random": random_prefixes, "trace": trace_prefixes}


# ---------------------------------------------------------------- a step
def deal_roots(pool, budget, rule, rng):
    """Stage 1 over the step's pool -> m [n]. ValueError where a rule breaks the budget."""
    m = ROOT_RULES[rule](pool, budget, rng)
    check(f"the sum of what the rule {rule} deals", 0 < m.sum() <= budget, f"1 to {budget}")
    return m


def expand_trees(found, v, m, num_continuations, rule, rng):
    """Stage 2 over the step's trees -> k [n], for the n prefixes of all of them, tree by tree.

    found[i]: prefixes of tree i (with .outcome), m[i] its bare rollouts; v [n]. The
    num_continuations * sum(m) continuations are shared among the trees that have a prefix, in
    proportion to m; each spreads its share over its own prefixes."""
    num_prefixes = np.array([len(own) for own in found])
    shares = deal_in_proportion(np.where(num_prefixes > 0, m, 0), num_continuations * m.sum())
    k, begin = [], 0
    for own, share in zip(found, shares):
        end = begin + len(own)
        outcome = np.array([prefix.outcome for prefix in own], int)
        k.append(PREFIX_RULES[rule](Anchors(v[begin:end], outcome), int(share), rng))
        begin = end
    return np.concatenate(k)
