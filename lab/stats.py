"""Statistics over seeds: intervals, an exact test, and what several settings say together."""
from math import lcm

import numpy as np

UNIT = 1 / 12000  # differences of exact match are multiples of this: means of three times 1,000
                  # questions, or of 2,000, and halves of them


def student_t(df):
    """t with P(|T| < t) = 0.95 at `df` degrees of freedom, to 5 digits: T = sqrt(df) tan(angle),
    and the density of the angle goes with cos(angle)^(df - 1)."""
    angle = np.linspace(0, np.pi / 2, 20001)
    density = np.cos(angle) ** (df - 1)
    below = np.append(0, np.cumsum(density[1:] + density[:-1]))
    return float(df ** 0.5 * np.tan(np.interp(0.95 * below[-1], below, angle)))


def interval(values):
    """Over the first axis -> (mean, half of its 95 % t interval; nan for one value)."""
    n = len(values)
    half = student_t(n - 1) * np.std(values, 0, ddof=1) / n ** 0.5 if n > 1 else np.nan
    return np.mean(values, 0), half


def summary(groups):
    """Of several groups of values, one per setting -> (mean of their means, half of its 95 % t
    interval, with the degrees of freedom of Welch and Satterthwaite)."""
    squares = np.array([np.var(group, ddof=1) / len(group) for group in groups])
    freedom = np.array([len(group) - 1 for group in groups])
    df = squares.sum() ** 2 / (squares ** 2 / freedom).sum()
    half = student_t(df) * squares.sum() ** 0.5 / len(groups)
    return np.mean([np.mean(group) for group in groups]), half


def sign_flip(groups):
    """Exact two-sided p that paired differences are symmetric about 0: the share of all ways to
    choose their signs in which the mean of the groups' means is at least as far from 0 as it is.

    Every value is a multiple of UNIT, so that ties are seen as ties. The ways are counted sum by
    sum, one value after the other."""
    common = lcm(*map(len, groups))
    steps = []
    for group in groups:
        steps.extend(common // len(group) * np.rint(np.divide(group, UNIT)).astype(int))
    reach = sum(map(abs, steps))
    chances = np.zeros(2 * reach + 1)  # of the sums from -reach to reach
    chances[reach] = 1.0
    for step in map(abs, steps):
        chances = (np.roll(chances, step) + np.roll(chances, -step)) / 2
    sums = np.arange(-reach, reach + 1)
    return float(chances[abs(sums) >= abs(sum(steps))].sum())


def mean_and_band(curves, num=50):
    """(x, mean, half of its 95 % t interval), [num] each, of curves [(x, y)] on their common x;
    half is one nan for one curve."""
    x = np.linspace(max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves), num)
    return x, *interval([np.interp(x, *curve) for curve in curves])
