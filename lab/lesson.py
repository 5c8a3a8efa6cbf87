"""What the notebooks share: charts in one call, and a check of exercises."""
import os
from typing import NamedTuple

import numpy as np

from engine.draw import COLOURS, GREY, STYLES, Picture, draw_cycle  # noqa: F401

SMALL = "TRACE_MINI_SMALL" in os.environ  # less of everything, to test a notebook


class Panel(NamedTuple):
    """One picture of a chart."""
    curves: dict           # by label: the pair (x [n], y [n])
    ylabel: str = ""
    xlabel: str = ""
    title: str = ""
    ylim: tuple = (None, None)
    bars: float = 0.0      # their width where y are bars, hollow those of the label ""


def chart(*panels, width=6, height=3.2, stacked=False):
    """The panels as a Figure, side by side or one below the other. A curve with many points has few
    markers, so that each kind of line can be told without colours."""
    shape = (len(panels), 1) if stacked else (1, len(panels))
    figure = Picture(figsize=(width, height), layout="constrained")
    for axes, panel in zip(figure.subplots(*shape, squeeze=False).flat, panels):
        for i, (label, (x, y)) in enumerate(panel.curves.items()):
            if panel.bars:
                axes.bar(x, y, panel.bars, color=COLOURS[4] if label else "white",
                         edgecolor="black", label=label or None)
            else:
                axes.plot(x, y, STYLES[i], color=COLOURS[i], ms=4, label=label,
                          markevery=max(1, len(x) // 12))
        axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel, ylim=panel.ylim)
        axes.set_title(panel.title, fontsize="medium")
        if any(panel.curves):
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1.06 if panel.title else 1.0),
                        frameon=False, ncols=2, fontsize="small")
    return figure


def check(given, want):
    """Say how an exercise stands: None, also within a list, is not solved yet."""
    if np.any(np.equal(given, None)):
        print("not solved yet")
    elif np.shape(given) == np.shape(want) and np.allclose(given, want, 1e-4):
        print("solved")
    else:
        print(f"not yet: got {given}")


def draw_levels(shares, levels):
    """How often the weights are which share of the largest of their block, and the NF4 levels."""
    figure = Picture(figsize=(6, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.hist(shares, 120, color=GREY)
    axes.vlines(levels, 0, axes.get_ylim()[1], color=COLOURS[4], lw=1.2)
    axes.set(xlabel="weight / largest of its block", ylabel="weights",
             title="Weights (grey bars) and the sixteen NF4 levels (lines)")
    return figure


def draw_who_sees_whom(sees, names):
    """A grid of turns: sees [n, n] is true where the turn of a row sees that of a column."""
    figure = Picture(figsize=(5.2, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.pcolormesh(sees, cmap="Greys", vmax=1.4, edgecolor="lightgray", lw=0.5)
    places = np.arange(len(names)) + 0.5
    axes.set_yticks(places, [f"{i}: {name}" for i, name in enumerate(names, 1)])
    axes.set_xticks(places, range(1, len(names) + 1))
    axes.set(xlabel="sees row number", title="A tree as one sequence")
    axes.invert_yaxis()
    return figure


def draw_calibration(predicted, true, curves):
    """Predictions against what is true: every anchor in grey, and by label the means of five bins
    of a pair (predicted [n], true [n]). On the dotted line predictions come true."""
    binned = {}
    for label, (v, truth) in curves.items():
        bins = (v * 5).clip(0, 4).astype(int)
        points = [(v[bins == b].mean(), truth[bins == b].mean()) for b in np.unique(bins)]
        binned[label] = tuple(np.array(points).T)
    figure = chart(Panel(binned, "true success (Monte Carlo)", "predicted"), width=5, height=4.6)
    axes = figure.axes[0]
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    axes.plot([0, 1], [0, 1], ":", color=GREY)
    axes.scatter(predicted, true, s=12, color=GREY, alpha=0.6, zorder=1)
    return figure
