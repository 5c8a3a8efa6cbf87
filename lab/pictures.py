"""The arms of an ablation over sampled tokens, and their differences seed by seed."""
import numpy as np

from engine.draw import COLOURS, STYLES, Picture, label_axes
from lab.stats import interval, mean_and_band


def draw_arms(rows, file):
    """Write the mean of em_first per arm over its seeds, from three seeds on with a 95 % t
    interval; -> Path. A row: {arm, seed, sampled_tokens, em_first}, a share from 0 to 1. Arms
    NAME@X share a panel with those @X only. The y axis spans the middle 90 % of the rows and 5
    points more: a seed that collapsed does not flatten the rest."""
    arms = {}  # {arm: {seed: [(tokens, y in %)]}}
    for row in rows:
        seeds = arms.setdefault(row["arm"], {})
        seeds.setdefault(row["seed"], []).append((row["sampled_tokens"], 100 * row["em_first"]))
    names = sorted({arm.partition("@")[0] for arm in arms})
    worlds = sorted({arm.partition("@")[2] for arm in arms})
    figure = Picture(figsize=(6.4, 4.2 * len(worlds)), layout="constrained")
    panels = figure.subplots(len(worlds), sharey=True, squeeze=False)[:, 0]
    low, high = np.quantile([100 * row["em_first"] for row in rows], (0.05, 0.95))
    panels[0].set_ylim(low - 5, high + 5)
    for arm, seeds in sorted(arms.items()):
        name, _, world = arm.partition("@")
        axes = panels[worlds.index(world)]
        i = names.index(name)  # styles and colours: 8 and 9 share no factor, so 72 looks
        x, mean, half = mean_and_band([np.array(sorted(curve)).T for curve in seeds.values()])
        axes.plot(x, mean, STYLES[i % 8], color=COLOURS[i % 9], markevery=(i, 10),
                  label=f"{arm}, seeds: {len(seeds)}")
        if len(seeds) > 2:  # t is 12.7 for two seeds: nothing else could be seen
            axes.fill_between(x, mean - half, mean + half, color=COLOURS[i % 9], alpha=0.15, lw=0)
    for axes in panels:
        label_axes(axes, "held-out exact match in %\n(mean and 95 % interval over seeds)")
    return figure.write(file)


def draw_differences(gains, limit=16):
    """Differences in points, {words: one per seed}, as a Figure: every seed a dot, and the mean
    with its 95 % interval. A seed beyond the limit is an arrow at the edge, and a mean leaves the
    picture: one that broke down would flatten the rest."""
    figure = Picture(figsize=(6.4, 0.8 + 0.4 * len(gains)), layout="constrained")
    axes = figure.subplots()
    for y, points in enumerate(map(np.array, gains.values())):
        for x in points:
            mark = "." if abs(x) < limit else "<" if x < 0 else ">"
            axes.plot(np.clip(x, -limit, limit), y + 0.15, mark, color=COLOURS[4], alpha=0.5, mew=0)
        if len(points):
            mean, half = interval(points)
            axes.errorbar(mean, y - 0.15, xerr=half, capsize=4, fmt="ko")
    axes.axvline(0, color="black", lw=1)
    axes.set(xlabel="difference in points of exact match",
             xlim=(-1.05 * limit, 1.05 * limit), ylim=(len(gains) - 0.5, -0.5))
    axes.set_yticks(range(len(gains)), gains)
    return figure
