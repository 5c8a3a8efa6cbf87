"""The arms of an ablation over sampled tokens, and their differences."""
import numpy as np

from engine.draw import COLOURS, STYLES, Picture, label_axes
from lab.stats import interval, mean_and_band
from lab.tables import end, shared, sums


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


def draw_ends(done):
    """Where every run ends, a dot each, and the mean of each arm, as a Figure. `done` is that of
    lab/tables.py. What lies far to the left of the others is an arrow."""
    arms = list(dict.fromkeys(arm for arm, _ in done))
    low = 100 * np.quantile(list(map(end, done.values())), 0.05) - 3
    figure = Picture(figsize=(6.4, 0.8 + 0.4 * len(arms)), layout="constrained")
    axes = figure.subplots()
    for y, arm in enumerate(arms):
        ends = 100 * np.array(sums(shared(done, arm), [1], end))
        for x in ends:
            axes.plot(max(x, low), y, "<" if x < low else "o", color=COLOURS[4], alpha=0.5, mew=0)
        if ends.mean() > low:
            axes.plot(ends.mean(), y, "|", color="black", ms=18, mew=2)
    axes.set(xlabel="held-out exact match at the end in %: every seed a dot, a line at the mean",
             ylim=(len(arms) - 0.5, -0.5))
    axes.set_yticks(range(len(arms)), arms)
    axes.grid(axis="x", alpha=0.3)
    return figure


def draw_differences(gains, limit=16):
    """Points ahead of GRPO, {(row, label): one per seed}, as a Figure: every seed a dot, with mean
    and 95 % interval. What lies beyond the limit leaves the picture: one seed that broke down would
    flatten the rest."""
    rows, labels = [list(dict.fromkeys(names)) for names in zip(*gains)]
    figure = Picture(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for (row, label), points in gains.items():
        i, y = labels.index(label), rows.index(row)
        place = y + 0.35 * i
        axes.plot(points, np.full(len(points), place + 0.12), "k.", ms=4)
        mean, half = interval(points)
        axes.errorbar(mean, place, xerr=half, capsize=4, fmt="os^v"[i], color=COLOURS[4 * i],
                      label="" if y else label)
    axes.axvline(0, color="black", lw=1)
    axes.set(xlabel="points ahead of GRPO: mean, 95 % interval, dots: seeds",
             xlim=(-limit, limit), ylim=(len(rows), -0.5))
    axes.set_yticks(range(len(rows)), rows)
    axes.legend(loc=(0, 1.01), ncols=len(labels), frameon=False)
    return figure
