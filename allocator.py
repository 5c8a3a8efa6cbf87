"""Where is the next rollout worth most? Allocation rules and their exact solvers.

    stage 1  roots     V_root(v, m) = 1 - v^m - (1-v)^m   not concave   solve_roots
    stage 2  prefixes  V_pref(q, k) = 1 - q^k             concave       solve_prefixes

n anchors (roots or prefixes), v [n] predicted success probability, r [n] outcome (0 or
1) of the bare rollout that owns a prefix, q [n] predicted chance that a continuation
repeats r, m and k [n] rollouts. A rule is one function (Anchors, budget, rng) -> [n]
and one line in ROOT_RULES or PREFIX_RULES. The oracle is "trace" with Monte-Carlo v.
"""
from dataclasses import dataclass

import numpy as np

TIE = 1e-11     # root values this close, relative to the largest, count as equal
TINY = np.finfo(float).tiny     # gains below this count as 0: they stop shrinking


def check(name, ok, rule):
    if not np.all(ok):
        raise ValueError(f"{name} must be {rule}")


def check_counts(**counts):
    for name, x in counts.items():
        check(name, isinstance(x, (int, np.integer)) and x >= 0, "an integer >= 0")


# ---- what rollouts are worth: arrays broadcast, m and k are integers >= 0 ------------
def mixed_prob(v, m):
    """V_root: chance that m rollouts are mixed: 1 - v^m - (1-v)^m, 0 if m is 0 or 1."""
    v, m = np.asarray(v, float), np.asarray(m)
    check("v", (v >= 0) & (v <= 1), "in [0, 1]")    # NaN fails both
    return np.maximum(0.0, (1 - v**m - (1 - v)**m) * (m > 1))


def flip_prob(v, r, k):
    """V_pref: chance that one of k continuations flips r, 1 - [r v + (1-r)(1-v)]^k."""
    v, r, k = np.asarray(v, float), np.asarray(r), np.asarray(k)
    check("v", (v >= 0) & (v <= 1), "in [0, 1]")
    check("r", (r == 0) | (r == 1), "0 or 1")
    return 1 - np.where(r == 1, v, 1 - v) ** k


def beta_moment(a, b, k):
    """E[x^k] for x ~ Beta(a, b): product over i < k of (a+i) / (a+b+i)."""
    a, b, k = np.asarray(a, float), np.asarray(b, float), np.asarray(k)
    check("a and b", (a >= 0) & (b >= 0) & (a + b > 0), ">= 0 and not both 0")
    moment = np.ones(np.broadcast_shapes(a.shape, b.shape, k.shape))
    for i in range(int(k.max(initial=0))):
        moment = moment * np.where(i < k, (a + i) / (a + b + i), 1.0)
    return moment


def expected_mixed_prob(a, b, m):
    """E[mixed_prob(v, m)] for v ~ Beta(a, b): unknown is worth less than even odds."""
    return (1 - beta_moment(a, b, m) - beta_moment(b, a, m)) * np.greater(m, 1)


def expected_flip_prob(a, b, r, k):
    """E[flip_prob(v, r, k)] for v ~ Beta(a, b)."""
    check("r", np.isin(r, (0, 1)), "0 or 1")
    success = np.equal(r, 1)    # then q = v, else q = 1 - v ~ Beta(b, a)
    return 1 - beta_moment(np.where(success, a, b), np.where(success, b, a), k)


def predicted_mixed_prob(v, m, concentration=0.0, wins=0.0, losses=0.0):
    """mixed_prob(v, m), or with a concentration c > 0 its expectation for a Beta(c v, c (1-v))
    that has also seen these wins and losses."""
    c = np.asarray(concentration, float)
    if not c.any():
        return mixed_prob(v, m)
    return expected_mixed_prob(c * v + wins, c * (1 - v) + losses, m)


def allocate_roots(v, budget, cap=16):
    """m [n], each 0 or 2..cap, sum <= budget, maximising sum(mixed_prob(v, m)) exactly.
    Ties favour earlier prompts. ValueError names what is wrong: v not [n] in [0, 1], or
    budget or cap not an integer >= 0."""
    v = np.asarray(v, float)
    check("v", v.ndim == 1, "one-dimensional")
    check_counts(budget=budget, cap=cap)
    return solve_roots(mixed_prob(v[:, None], np.arange(cap + 1)), budget)


def expand_prefixes(v, r, budget, cap=None):
    """k [n], sum == budget (less only if caps bind), maximising sum(flip_prob) exactly.
    Ties go to fewest so far, then to earlier prefixes; gains of 0 are spread evenly.
    ValueError as allocate_roots, and if r is not [n] in {0, 1}."""
    v, r = np.asarray(v, float), np.asarray(r)
    check("v", v.ndim == 1, "one-dimensional")
    check("r", r.shape == v.shape, f"of v's shape {v.shape}, not {r.shape}")
    cap = budget if cap is None else cap
    check_counts(budget=budget, cap=cap)
    flip = flip_prob(v, r, 1)
    return solve_prefixes(flip, lambda rows, j: 1 - flip[rows], budget, cap)


def solve_roots(values, budget):
    """m [n] maximising sum_i values[i, m_i] subject to sum_i m_i <= budget.

    values [n, cap+1]: any table with values[:, 0] = 0. Grouped knapsack by dynamic
    programming: n * cap * budget steps, 8 n * budget bytes. Optimal to TIE per prompt;
    among equals the last prompt gets the fewest, then the one before it, and so on, so a
    lone rollout (value 0) is never given."""
    n, cap = len(values), values.shape[1] - 1
    free = values.argmax(axis=1)
    if free.sum() <= budget:
        return free
    best = np.zeros((n + 1, budget + 1))    # [i, b]: first i prompts, at most b spent
    trial = np.empty(budget + 1)
    for old, new, row in zip(best, best[1:], values.tolist()):
        new[:] = old
        for m in range(1, min(cap, budget) + 1):
            np.add(old[:budget + 1 - m], row[m], out=trial[m:])
            np.maximum(new[m:], trial[m:], out=new[m:])
    # Walk back. The tolerance keeps ties ties: 3+3 and 2+2+2 rollouts at one v are both
    # worth 6 v (1-v), yet their floating-point sums differ.
    m, left, tie = np.zeros(n, int), budget, TIE * values.max()
    for i in reversed(range(n)):
        options = np.arange(min(cap, left) + 1)
        totals = best[i, left - options] + values[i, options]
        m[i] = np.argmax(totals >= best[i + 1, left] - tie)     # the first = the fewest
        left -= int(m[i])
    return m


def solve_prefixes(first, ratio, budget, cap=np.iinfo(int).max, cost=1.0):
    """k [n] taking the largest gains first until the budget is spent.

    first [n]: gain (per unit of cost) of continuation 1. ratio(rows, j) in [0, 1]: gain
    of j+1 over gain of j, so gains never rise and greedy is exact: no k of the same
    total cost gains more. The last one is taken if half of it fits; cost 1 meets an
    integer budget exactly. Ties: lower j, then index. Time and memory ~ n + budget."""
    n, cost = len(first), np.broadcast_to(cost, len(first))
    rows, head, j = np.arange(n), first, 1      # head: gain of continuation j
    gains, owners = np.empty(0), np.empty(0, int)
    width = 4 + min(1000, int(4.0 * budget / max(cost.sum(), 1)))     # 4x even
    while len(rows) and j <= cap:
        width = min(width, cap - j + 1)
        block = np.empty((width + 1, len(rows)))    # gains of j .. j + width
        block[0], block[1:] = head, ratio(rows, np.arange(j, j + width)[:, None])
        np.cumprod(block, axis=0, out=block)
        useful = block[:-1] > TINY
        # Listed by j, then index; the stable sort keeps that order among equals.
        gains = np.concatenate([gains, block[:-1][useful]])
        owners = np.concatenate([owners, rows[np.nonzero(useful)[1]]])
        order = np.argsort(-gains, kind="stable")
        price = cost[owners[order]]
        taken = np.searchsorted(np.cumsum(price) - price / 2, budget, side="right")
        bar = gains[order[taken]] if taken < len(order) else TINY
        gains, owners = gains[order[:taken]], owners[order[:taken]]
        alive = block[-1] >= bar    # only their next gain can still change the answer
        rows, head, j, width = rows[alive], block[-1][alive], j + width, 2 * width
    k = np.bincount(owners, minlength=n)
    return k + deal_evenly(int((budget - k @ cost) / cost.max(initial=1)), cap - k)


def deal_evenly(units, room):
    """int [n] <= room, as even as it allows, earlier first; sum = units if they fit."""
    dealt = np.zeros(len(room), int)
    while units > 0 and (dealt < room).any():
        rows = np.flatnonzero(dealt < room)[:units]
        share = min(units // len(rows), (room - dealt)[rows].min())
        dealt[rows] += share
        units -= share * len(rows)
    return dealt


def deal_in_proportion(shares, total):
    """int [n] proportional to `shares`, summing to `total` (by largest remainder); all zero
    where nothing has a share."""
    if not shares.any():
        return shares
    exact = shares * total / shares.sum()
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[:total - counts.sum()]] += 1
    return counts


@dataclass(frozen=True)
class Anchors:
    """What a rule may see: n roots, or the n prefixes of one prompt; and settings."""
    v: np.ndarray                           # [n] predicted success probability
    outcome: np.ndarray | None = None       # [n] r of the owning bare rollout: prefixes
    successes: np.ndarray | float = 0.0     # [n] decayed count at that prompt: roots
    failures: np.ndarray | float = 0.0      # [n] likewise
    cost: np.ndarray | float = 1.0          # [n] expected sampled tokens: prefixes
    group_size: int = 8                     # m of the equal-m rules, at least 2
    cap: int = 16                           # largest m; continuations have no cap
    concentration: np.ndarray | float = 0.0     # [n] trace: pseudo-counts of v's Beta; 0 = off
    floor: float = 0.0                      # trace: share of budget spread uniformly
    cost_aware: bool = False                # trace prefixes: budget in tokens, not rollouts

    def __post_init__(self):
        check("floor", 0 <= self.floor <= 1, "in [0, 1]")
        some = np.greater(self.concentration, 0)
        check("concentration", np.all(some) or np.all(np.equal(self.concentration, 0)),
              "> 0, or 0 everywhere")
        check("group_size and cap", min(self.group_size, self.cap) >= 2, ">= 2")
        check("cost", np.greater(self.cost, 0), "> 0")


def equal_groups(pool, score, budget, size=None):
    """m [n]: group_size each from the lowest score up, then one smaller group (a lone
    leftover is dropped); budget beyond n * group_size is dealt evenly up to cap."""
    n, size = len(score), min(size or pool.group_size, pool.cap)
    m = np.clip(budget - size * np.arange(n), 0, size)
    m[m == 1] = 0
    m += deal_evenly(budget - size * n, pool.cap - m)
    return m[np.argsort(np.argsort(score, kind="stable"))]   # [n] by rank -> by prompt


def trace_roots(pool, budget, rng):
    """Stage 1, exact given the floor: pairs (more if all have one) on random prompts."""
    v, c, wins, losses = (np.reshape(x, (-1, 1)) for x in (
        pool.v, pool.concentration, pool.successes, pool.failures))
    m = np.arange(pool.cap + 1)
    values = predicted_mixed_prob(v, m, c, wins, losses)    # [n, cap+1]
    base = equal_groups(pool, rng.random(len(v)), round(pool.floor * budget), size=2)
    later = np.minimum(base[:, None] + m, pool.cap)     # base + 0, 1, .. more
    gains = (np.take_along_axis(values, later, axis=1)
             - np.take_along_axis(values, base[:, None], axis=1))
    return base + solve_roots(gains, budget - base.sum())


def trace_prefixes(prefixes, budget, rng):
    """Stage 2, exact given the floor, which is spread evenly. Cost-aware: largest gains
    per token, to within half a continuation of budget * mean cost tokens. With a
    concentration c, q ~ Beta(c q, c (1-q)): gains still fall, so greedy stays exact."""
    n = len(prefixes.v)
    c = np.broadcast_to(prefixes.concentration, n)
    units = round(prefixes.floor * budget)
    base = rng.permutation(deal_evenly(units, np.full(n, units)))
    flip = flip_prob(prefixes.v, prefixes.outcome, 1)
    if not c.any():
        first = flip * (1 - flip)**base

        def ratio(rows, j):
            return 1 - flip[rows]
    else:       # seeing `base` repeats would turn Beta(a, b) into Beta(a + base, b)
        a, total = c * (1 - flip) + base, c + base
        first = beta_moment(c * (1 - flip), c * flip, base) * c * flip / total

        def ratio(rows, j):
            return (a[rows] + j - 1) / (total[rows] + j)
    cost = np.broadcast_to(prefixes.cost if prefixes.cost_aware else 1.0, n)
    tokens = budget * cost.sum() / max(n, 1) - base @ cost
    return base + solve_prefixes(first / cost, ratio, tokens, cost=cost)


def random_prefixes(prefixes, budget, rng):
    """Each continuation starts at its own uniformly random prefix."""
    n = len(prefixes.v)
    return np.bincount(rng.integers(n, size=budget if n else 0), minlength=n)


ROOT_RULES = {      # name: (pool, budget, rng) -> m [n]
    # Equal groups on random prompts (GRPO); where the predicted v is nearest 0.5 (PCL);
    # where a Thompson draw from the prompt's own counts is nearest 0.5 (MoPPS).
    "uniform": lambda p, budget, rng: equal_groups(p, rng.random(len(p.v)), budget),
    "pcl": lambda p, budget, rng: equal_groups(p, np.abs(p.v - 0.5), budget),
    "mopps": lambda p, budget, rng: equal_groups(p, np.abs(
        rng.beta(1 + p.successes, 1 + p.failures, len(p.v)) - 0.5), budget),
    # Exact optimum of mixed_prob * v (1-v)^2, which leans to hard prompts: the value of
    # Knapsack RL (Li et al. 2025).
    "knapsack": lambda p, budget, rng: solve_roots(mixed_prob(
        p.v[:, None], np.arange(p.cap + 1)) * (p.v * (1 - p.v)**2)[:, None], budget),
    "trace": trace_roots}
PREFIX_RULES = {    # name: (prefixes of one prompt, budget, rng) -> k [n]
    "none": lambda p, budget, rng: np.zeros(len(p.v), int),
    "random": random_prefixes, "trace": trace_prefixes}
