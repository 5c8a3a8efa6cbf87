"""The pictures, without pyplot: a run's curve, the cycle, the tree; the tree as text too."""
import io
import textwrap
from pathlib import Path

from matplotlib import font_manager, ticker
from matplotlib.figure import Figure
from matplotlib.text import Text

from engine.files import read_lines, write_aside
from react_env import parse_action, split_completion
from tree import nodes, path

ORANGE, BLUE, RED, GREY = "#E69F00", "#0072B2", "#D55E00", "gray"  # Okabe and Ito, and two more
COLOURS = "black", ORANGE, "#56B4E9", "#009E73", BLUE, RED, "#CC79A7", GREY, "sienna"
STYLES = "-o", "--s", "-.D", ":^", "-v", "--P", "-.X", ":*", "-p"
FONT = font_manager.get_font(font_manager.findfont("DejaVu Sans Mono"))  # comes with matplotlib


class Picture(Figure):
    """A Figure that a notebook shows although pyplot does not know it. Characters that the font
    does not have, such as lone surrogates in the name of a folder, are drawn as �."""
    def _repr_png_(self, dpi=100):
        for text in self.findobj(Text):
            text.set_text("".join(map(drawable, text.get_text())))
        stream = io.BytesIO()
        self.savefig(stream, dpi=dpi, pil_kwargs={"optimize": True})
        return stream.getvalue()

    def write(self, file, dpi=150):
        """Save as PNG, whole or not at all; -> Path."""
        with write_aside(file) as stream:
            stream.write(self._repr_png_(dpi))
        return Path(file)


def drawable(char):
    return char if char == "\n" or FONT.get_char_index(ord(char)) else "�"


def label_axes(axes, ylabel):
    axes.set(xlabel="sampled tokens since the start", ylabel=ylabel)
    axes.xaxis.set_major_formatter(ticker.EngFormatter())  # 50 k, 1 M
    axes.grid(alpha=0.3)
    legend = axes.legend(loc=(0, 1.01), frameon=False, handlelength=3.5)  # hides no data
    for text in legend.get_texts():
        text.set_parse_math(False)


# ---------------------------------------------------------------- a run
SMOOTH = 10  # steps whose mean reward is drawn
CURVES = (  # (panel, column, meaning)
    (0, "em_first", "held-out exact match, greedy"),
    (0, "smooth_reward", f"training: reward of bare rollouts, mean of {SMOOTH} steps"),
    (1, "effective_ratio", "Effective Ratio"),
    (1, "bare_effective_ratio", "Effective Ratio of the bare rollouts"),
    (1, "predicted_effective_ratio", "the same, predicted"),
    (1, "predictor_auroc", "predictor AUROC (0.5: chance)"))


def draw_curve(folder):
    """Write curve.png of a run folder, from metrics.jsonl and evals.jsonl; -> its Path."""
    folder = Path(folder)
    rows = read_metrics(folder) + read_lines(folder / "evals.jsonl")
    x = [row["sampled_tokens"] for row in rows]
    figure = Picture(figsize=(6.4, 7.5), layout="constrained")
    figure.suptitle(folder.resolve().name, parse_math=False)
    panels = figure.subplots(2, subplot_kw={"ylim": (-0.03, 1.03)})
    for i, (panel, column, meaning) in enumerate(CURVES):
        y = [row.get(column) for row in rows]  # None is a gap
        panels[panel].plot(x, y, STYLES[i], color=COLOURS[i], ms=4, label=meaning)
    label_axes(panels[0], "share of episodes")
    label_axes(panels[1], "share of prompts, or AUROC")
    return figure.write(folder / "curve.png")


def read_metrics(folder):
    """The rows of metrics.jsonl, with the mean reward of the last SMOOTH steps in each."""
    rows = read_lines(folder / "metrics.jsonl")
    for i, row in enumerate(rows):
        recent = [some["reward_mean"] for some in rows[max(0, i + 1 - SMOOTH):i + 1]]
        row["smooth_reward"] = sum(recent) / len(recent)
    return rows


# ---------------------------------------------------------------- the cycle
STEPS = ("1  draw a pool\nof questions", "2  stage 1:\nchoose questions",
         "3  sample rollouts\nfrom the start", "4  stage 2:\nchoose turns",
         "5  sample\ncontinuations", "6  average rewards\nup the tree",
         "7  teach\nthe predictor", "8  teach\nthe policy")
PLACES = 0.12, 0.37, 0.63, 0.88  # of the boxes, from left to right
RING = [*((x, 0.73) for x in PLACES), *((x, 0.27) for x in reversed(PLACES))]


def draw_cycle(*present, height=1.75):
    """The eight steps of TRACE in a ring, as a Figure; the steps of these numbers are marked."""
    figure, axes = _paper(6.4, height)
    for i in reversed(range(8)):  # a box hides the beginning of the arrow that leaves it
        box = {"boxstyle": "round,pad=0.6", "fc": ORANGE if i + 1 in present else "white"}
        axes.annotate(STEPS[i], RING[i - 1], RING[i], ha="center", va="center", fontsize=9.5,
                      bbox=box, arrowprops={"arrowstyle": "<|-", "fc": "black", "shrinkB": 22})
    return figure


def _paper(width, height):
    """-> (figure, axes) without margins or frame; sizes in inches."""
    figure = Picture(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    return figure, axes


# ---------------------------------------------------------------- the tree
LOOKS = {  # of a node: marker and fill, light enough for black ink
    "◆": ("D", ORANGE), "─": ("o", "white"), "✓": ("s", "lightgreen"), "✗": ("s", "white"),
    "…": ("s", "lightgray")}
LEGEND = ("◆ expanded turn: continuations start here   ○ other turn",
          "── bare rollout, from the question on   ╌╌ continuation",
          "✓ right answer   ✗ wrong answer   … no answer")
NUMBERS = {"value": "Numbers: V̂, the mean reward of the leaves below",
           "predicted": "Numbers: Ṽ, the predicted chance of success"}


def mark_of(node):
    """The key of the node's look. Expanded is a turn after which rollouts part."""
    if not node.is_leaf:
        return "◆" if node.depth > 0 and len(node.children) > 1 else "─"
    if node.reward:
        return "✓"
    return "…" if node.overflowed or node.state.prediction is None else "✗"


def _action(node, text_of):
    if node.parent is None:
        return "(question)"
    return " ".join(split_completion(text_of(node))[1].split()) or "(no action)"


def _cut(text, num_chars):
    return text if len(text) <= num_chars else text[:num_chars - 1] + "…"


def _number(chance):
    return "" if chance is None else f"{chance:.2f}"


def tree_text(root, text_of, width=56):
    """A backed-up tree in plain text, a turn per line; `text_of(node)` is what the policy wrote
    there. Columns: Ṽ where predicted, V̂, leaves. Actions are cut to end at `width`."""
    lines = textwrap.wrap(root.state.question.text, 75)
    lines.append(f"{'':{width}}     Ṽ     V̂ leaves")
    for node in nodes(root):
        line = f"{'│  ' * node.depth}{mark_of(node)} {_action(node, text_of)}"
        line = f"{_cut(line, width):{width}}{_number(node.predicted):>6}"
        if not node.is_leaf:
            line += f"{_number(node.value):>6}{node.num_leaves:7}"
        lines.append(line.rstrip())
    lines.append("✓ right   ✗ wrong   … no answer   ◆ expanded turn")
    return "\n".join(lines)


def draw_tree(root, text_of, title="", estimate="value", label=""):
    """A backed-up tree as a Figure: turns from left to right, a row per leaf; `text_of(node)` is
    what the policy wrote there. The numbers in the nodes are their `estimate`, "value" (V̂) or
    "predicted" (Ṽ), or what `label` says that they are."""
    rows = _rows(root)
    depth = max(3, *(node.depth for node in rows))
    question = textwrap.wrap(root.state.question.text, 20 * depth)
    head = [title, *question, label or NUMBERS[estimate], *LEGEND]
    height = 2 * rows[root] + len(head) / 2 + 2  # in rows
    figure, axes = _paper(1.75 * depth + 0.7, 0.42 * height)
    axes.axis((-0.2, depth + 0.2, -0.6, height - 0.6))
    axes.text(-0.12, height - 0.9, "\n".join(head), va="top", linespacing=1.5, parse_math=False)
    for node, row in rows.items():
        if node is not root:
            _draw_turn(axes, node, rows, _action(node, text_of))
        mark = mark_of(node)
        marker, fill = LOOKS[mark]
        number = _number(getattr(node, estimate)).lstrip("0")
        axes.plot(node.depth, row, marker, ms=21, mec="black", mfc=fill)
        axes.text(node.depth, row, mark if node.is_leaf else number, ha="center", va="center",
                  fontsize=8.5)
    return figure


def _rows(root):
    """{node: its row}, upwards from the last leaf. A bare rollout is a straight line."""
    rows = {}
    ends = [node for node in nodes(root) if not node.children]
    for row, end in enumerate(reversed(ends)):
        rows |= dict.fromkeys(path(end), row)  # of several children the first counts
    rows[root] = row / 2
    return rows


def _draw_turn(axes, node, rows, action):
    """The line into a node, with what was done above it and to what below it."""
    continued = node.sample != path(node)[1].sample
    row = rows[node]
    bend = node.depth - 0.83
    axes.plot([node.depth - 1, bend, node.depth], [rows[node.parent], row, row], lw=2, zorder=1,
              ls="--" if continued else "-", color=RED if continued else GREY)
    kind, argument = parse_action(action)
    axes.text(bend, row, f"{kind.title()}\n{_cut(argument, 17)}", va="center", linespacing=1.5,
              family="monospace", fontsize=8.5, parse_math=False)
