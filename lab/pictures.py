"""The arms of an ablation over sampled tokens."""
import numpy as np
from matplotlib import ticker

from engine.draw import COLOURS, STYLES, Picture, label_axes


def draw_arms(rows, file, y="eval_em", ylabel="held-out exact match"):
    """Write the mean of `y` per arm over its seeds, from three seeds on with a 95 % t interval;
    -> Path. A row: {arm, seed, sampled_tokens, y}, where y is a share, 0 to 1; rows without y
    are passed over. Arms NAME@X share a panel with those @X only."""
    points = {}  # {arm: {seed: [(tokens, y)]}}
    for row in (row for row in rows if row.get(y) is not None):
        seeds = points.setdefault(row["arm"], {})
        seeds.setdefault(row["seed"], []).append((row["sampled_tokens"], row[y]))
    bands = {arm: mean_and_band([np.array(sorted(curve)).T for curve in seeds.values()])
             for arm, seeds in points.items()}
    names = {arm: arm.partition("@") for arm in bands}  # (name, "@", X)
    own = dict.fromkeys(name for name, _, _ in names.values())
    known = [*dict.fromkeys(["grpo", "pcl", "treepo", "root", "prefix", "trace", "oracle", *own])]
    known = known if len(known) <= len(STYLES) else list(own)
    worlds = sorted({world for _, _, world in names.values()}) or [""]
    figure = Picture(figsize=(6.4 * len(worlds), 5), layout="constrained")
    panels = figure.subplots(1, len(worlds), squeeze=False)[0]
    for arm in sorted(bands, key=lambda arm: -bands[arm][1][-1]):
        (x, mean, half), (name, _, world) = bands[arm], names[arm]
        axes, i = panels[worlds.index(world)], known.index(name) % 9  # alike in all figures
        axes.plot(x, mean, STYLES[i], color=COLOURS[i], markevery=(i, 10),
                  label=f"{arm}, seeds: {len(points[arm])}")
        if len(points[arm]) > 2:  # t is 12.7 for two seeds: nothing else could be seen
            axes.fill_between(x, mean - half, mean + half, color=COLOURS[i], alpha=0.15, lw=0)
    for axes in panels:
        axes.yaxis.set_major_formatter(ticker.PercentFormatter(1))
        label_axes(axes, ylabel + " (mean, 95 % interval)" if axes is panels[0] else "", ncols=2)
    return figure.write(file)


def mean_and_band(curves, num=50):
    """(x, mean, half of its 95 % t-interval), [num] each, of curves [(x, y)] on their common x."""
    x = np.linspace(max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves), num)
    y, n = np.array([np.interp(x, *curve) for curve in curves]), len(curves)  # [curves, num]
    half = student_t(n - 1) * y.std(0, ddof=1) / n ** 0.5 if n > 1 else np.zeros(num)
    return x, y.mean(0), half


def student_t(df):
    """t with P(|T| < t) = 0.95 at `df` degrees of freedom, to 5 digits: T = sqrt(df) tan(angle),
    and the density of the angle goes with cos(angle)^(df - 1)."""
    angle = np.linspace(0, np.pi / 2, 20001)
    density = np.cos(angle) ** (df - 1)
    below = np.append(0, np.cumsum(density[1:] + density[:-1]))
    return float(df ** 0.5 * np.tan(np.interp(0.95 * below[-1], below, angle)))
