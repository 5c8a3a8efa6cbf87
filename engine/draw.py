"""The pictures, without pyplot: a run's curve, the arms of an ablation, the cycle, the tree."""
import io
import json
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import font_manager, ft2font, patches, ticker
from matplotlib.figure import Figure

from react_env import parse_action, split_completion
from tree import nodes, path

COLOURS = BLACK, ORANGE, SKY, GREEN, BLUE, RED, PURPLE, GREY, BROWN = (  # Okabe and Ito, and two
    "black", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "gray", "sienna")
STYLES = "-o", "--s", "-.D", ":^", "-v", "--P", "-.X", ":*", "-p"


class Picture(Figure):
    """A Figure that a notebook shows although pyplot does not know it."""
    def _repr_png_(self):
        self.savefig(stream := io.BytesIO(), format="png", dpi=100)
        return stream.getvalue()

    def write(self, file):
        """Save in the format of the file's suffix, whole or not at all; -> Path."""
        self.savefig(aside := Path(f"{file}.part"), format=Path(file).suffix[1:], dpi=150)
        return aside.replace(file)


def draw_curve(folder):
    """Write curve.png of a run folder, from metrics.jsonl and evals.jsonl; -> its Path."""
    steps, evals = ([json.loads(line) for line in file.open()] if file.exists() else []
                    for file in (Path(folder, "metrics.jsonl"), Path(folder, "evals.jsonl")))
    figure = Picture(figsize=(6.4, 7.5), layout="constrained")
    figure.suptitle(Path(folder).resolve().name, parse_math=False)
    top, low = figure.subplots(2, 1, sharex=True, subplot_kw={"ylim": (-0.03, 1.03)})
    for axes, rows, name, style, colour, label in (
            (top, steps, "reward_mean", ".-", SKY, "training: mean reward of bare rollouts"),
            (top, evals, "em_first", "--o", BLACK, "held-out exact match, greedy"),
            (low, steps, "effective_ratio", "-s", BLUE, "Effective Ratio, realised"),
            (low, steps, "predicted_effective_ratio", "--^", ORANGE, "Effective Ratio, predicted"),
            (low, steps, "predictor_auroc", ":x", BLACK, "predictor AUROC (0.5: chance)")):
        x, y = (np.array([row.get(n) for row in rows], float) for n in ("sampled_tokens", name))
        axes.plot(x, y, style, color=colour, lw=1.2, ms=5, label=label)  # None is nan now: a gap
    label_axes(top, "right answers (share of episodes)", "")
    label_axes(low, "share of prompts, or AUROC")
    return figure.write(Path(folder, "curve.png"))


def label_axes(axes, ylabel, xlabel="sampled tokens since the start", ncols=1):
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.xaxis.set_major_formatter(ticker.EngFormatter())  # 50 k, 1 M
    axes.grid(alpha=0.3)
    axes.legend(loc=(0, 1.01), frameon=False, handlelength=3.5, ncols=ncols)  # hides no data


STEPS = ("1  draw a pool\nof prompts", "2  stage 1:\nwhich prompts", "3  sample bare\nrollouts",
         "4  stage 2:\nwhich prefixes", "5  sample\ncontinuations", "6  targets,\nbottom up",
         "7  update the\npredictor", "8  update the\npolicy")


def draw_cycle(*present):
    """The eight steps of TRACE in a ring, as a Figure; the steps of these numbers are marked."""
    axes = (figure := Picture(figsize=(6.4, 1.75))).add_axes((0, 0, 1, 1))
    axes.axis((0, 6.4, 0, 1.75))  # data coordinates are inches
    axes.axis("off")
    at = [(0.82 + 1.59 * min(i, 7 - i), 1.3 if i < 4 else 0.45) for i in range(8)]
    for i, ((x, y), text) in enumerate(zip(at, STEPS)):
        marked = i + 1 in present
        axes.add_patch(patches.FancyBboxPatch(
            (x - 0.6, y - 0.22), 1.2, 0.44, "round,pad=0.06", lw=1.2, zorder=2,
            fc=BLUE if marked else "white", ec="black"))
        axes.text(x, y, text, ha="center", va="center", fontsize=9, zorder=3,
                  color="white" if marked else "black", weight="bold" if marked else "normal")
        axes.add_patch(patches.FancyArrowPatch(
            (x, y), at[(i + 1) % 8], arrowstyle="-|>", mutation_scale=12, lw=1.2, color="gray",
            shrinkA=49 if i % 4 < 3 else 21, shrinkB=49 if i % 4 < 3 else 21))
    return figure


def _action(node, text_of):
    return " ".join(split_completion(text_of(node))[1].split()) or "(no action)"


def _mark(node):
    """✓ right, ✗ wrong, … no answer; ◆ a prefix after which rollouts part, ─ another."""
    if node.is_leaf:
        answered = node.state.prediction is not None and not node.overflowed
        return "✓" if node.reward else "✗" if answered else "…"
    return "◆" if node.depth > 0 and len(node.children) > 1 else "─"


def tree_text(root, text_of, width=56):
    """A backed-up tree in plain text, a turn per line; `text_of(node)` is what the policy wrote
    there. Columns: Ṽ where predicted, V̂, leaves. Actions are cut to end at `width`."""
    lines = textwrap.wrap(root.state.question.text, 75) + [f"{'':{width}}     Ṽ     V̂ leaves"]
    for node in nodes(root):
        last = [n is n.parent.children[-1] for n in path(node)[1:]]
        line = "".join("   " if end else "│  " for end in last[:-1])
        line += f"{'├└'[last[-1]]}─{_mark(node)} {_action(node, text_of)}" if last else "(question)"
        line = line if len(line) <= width else line[:width - 1] + "…"
        value, num = (None, "") if node.is_leaf else (node.value, node.num_leaves)
        for chance in (node.predicted, value):
            line = f"{line:{width}}" + (" " * 6 if chance is None else f"{chance:6.2f}")
        lines.append(f"{line}{num:7}".rstrip())
    return "\n".join([*lines, "✓ right   ✗ wrong   … no answer   ◆ expanded prefix"])


ROW, COLUMN, BEND, LEFT, SIZE = 0.38, 1.7, 0.28, 0.35, 9.5  # inches; SIZE points
FONT = ft2font.FT2Font(font_manager.findfont("DejaVu Sans"))  # to measure text with
FONT.set_size(SIZE, 720)  # dots per inch
CMAP = matplotlib.colormaps["cividis"]  # its lightness alone orders it
LABELS = {"value": r"success $\hat V$: mean reward of the leaves below",
          "predicted": r"success $\tilde V$ as predicted (white: was not)"}


def draw_tree(root, text_of, title="", estimate="", label=""):
    """A backed-up tree as a Figure: turns from left to right, a row per leaf; `text_of(node)` is
    what the policy wrote there. Node colour and number: `estimate`, "predicted" (Ṽ) or "value"
    (V̂), explained by `label`; by default Ṽ if the root has one. Line width: rollouts through."""
    estimate = estimate or ("value" if root.predicted is None else "predicted")
    at = _layout(root)
    width = max(max(x for x, _ in at.values()) + 0.25, 5.6)
    head = [title] * bool(title) + textwrap.wrap(root.state.question.text, int(11.5 * width))
    height = 2 * at[root][1] + 0.2 * len(head) + 1.0
    axes = (figure := Picture(figsize=(width, height))).add_axes((0, 0, 1, 1))
    axes.axis((0, width, 0, height))  # data coordinates are inches
    axes.axis("off")
    for node, (x, y) in at.items():
        if node is not root:
            _draw_turn(axes, *at[node.parent], x, y, node.num_leaves, _action(node, text_of))
        _draw_node(axes, x, y, _mark(node), getattr(node, "reward" if node.is_leaf else estimate))
    for i, line in enumerate(head):
        axes.text(0.15, height - 0.1 - 0.2 * i, line, va="top", fontsize=10.5, parse_math=False,
                  weight="bold" if line is title else "normal")
    top = height - 0.2 * len(head) - 0.3
    bar = axes.inset_axes((0.2, top - 0.07, 1.4, 0.14), transform=axes.transData)
    figure.colorbar(matplotlib.cm.ScalarMappable(cmap=CMAP), bar, orientation="horizontal",
                    ticks=(0, 0.5, 1), format="{x:g}").ax.tick_params(labelsize=8, length=2, pad=1)
    axes.text(1.75, top, label or LABELS[estimate], fontsize=SIZE, va="center")
    axes.text(0.15, top - 0.42, "✓ right   ✗ wrong   … no answer   ring: expanded prefix"
              "   line width: rollouts", fontsize=SIZE)
    return figure


def _layout(root):
    """{node: (x, y)} in inches, y upwards, with the root in the middle."""
    at, num = {}, sum(not node.children for node in nodes(root))
    y = low = ROW / 2 + 0.05  # of the lowest leaf
    for node in reversed(nodes(root)):  # last leaf first; a bare rollout is a straight line
        at[node] = LEFT + node.depth * COLUMN, at[node.children[0]][1] if node.children else y
        y += 0 if node.children else ROW
    return at | {root: (LEFT, low + (num - 1) * ROW / 2)}


def _draw_turn(axes, x0, y0, x, y, num_leaves, action):
    """The line into a node, with the kind of the action above it and its argument below."""
    left, thick = x0 + BEND, min(0.5 + 0.8 * max(1, num_leaves), 7)  # inches, points
    line = matplotlib.path.Path([(x0, y0), (x0, y), (left, y), (x, y)], [1, 3, 3, 2])
    axes.add_patch(patches.PathPatch(line, fill=False, ec="#999999", lw=thick, zorder=1))
    kind, argument = parse_action(action)
    argument = _cut(argument[:60], x - left - 0.26)
    style = {"textcoords": "offset points", "parse_math": False}
    axes.annotate(kind.title(), (left, y), (2, thick / 2), fontsize=8, va="bottom", **style)
    axes.annotate(argument, (left, y), (2, -thick / 2 - 1), fontsize=SIZE, va="top", **style)


def _cut(text, room):
    """`text`, cut until it is at most `room` inches wide."""
    FONT.set_text(text)
    return text if FONT.get_width_height()[0] / 64 <= 720 * room else _cut(text[:-2] + "…", room)


def _draw_node(axes, x, y, mark, chance):
    """A turn: a circle with its chance. A leaf: a square with its mark, its chance the reward."""
    fill = "white" if chance is None else CMAP(chance)
    ink = "black" if chance is None or chance >= 0.5 else "white"
    number = "" if chance is None else f"{round(chance, 2):g}".replace("0.", ".")
    marker, size, points, text = ("s", 13, 10, mark) if mark in "✓✗…" else ("o", 17, 7, number)
    if mark == "◆":
        axes.plot(x, y, "o", ms=23, mfc="white", mec=RED, mew=2)
    axes.plot(x, y, marker, ms=size, mec="black", mfc=fill)
    axes.annotate(text, (x, y), ha="center", va="center", color=ink, fontsize=points)
