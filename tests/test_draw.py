"""The pictures: what stands in them, and that nothing in a tree picture overlaps."""
import json
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from engine.draw import STEPS, draw_curve, draw_cycle, draw_tree, tree_text
from lab.pictures import draw_arms, mean_and_band
from lab.tables import student_t
from react_env import Episode, Question
from tree import Node, backup, nodes

PNG = b"\x89PNG"
QUESTION = Question("q", "In which country lies the birthplace of Ada Velt?", ("Gol",), "bridge", 2)


def grow(parent, *actions, reward=0.0, timeout=False):
    """A chain of turns below `parent`, the last one a leaf; -> its nodes. The text that the
    policy wrote rides in `cache`."""
    chain = []
    for i, action in enumerate(actions):
        last = i == len(actions) - 1
        state = Episode(QUESTION, done=last, reward=reward * last,
                        prediction=action[7:-1] if last and not timeout else None)
        parent = Node(np.zeros(3, np.int32), 3, state, parent,
                      cache=f" So.\nAction: {action}" if action else " I only think")
        chain.append(parent)
    return chain


def text_of(node):
    assert node.depth, "the policy wrote nothing at the root"
    return node.cache


def small_tree():
    """Two bare rollouts; the first turn of the first one is expanded once."""
    root = Node(np.zeros(9, np.int32), 0, Episode(QUESTION))
    first, *_ = grow(root, "Search[Velt]", "Search[Belkan]", "Finish[Gol]", reward=1.0)
    grow(root, "", "Lookup[born]", timeout=True)
    grow(first, "Finish[Dor]")
    backup(root)
    root.predicted, first.predicted = 0.4, 0.75
    return root


def random_tree(num_bare, num_more, seed):
    rng = np.random.default_rng(seed)
    names = ["W" * 26, "The Silver Bridge of Belkan", "Velt", "", "  ", "$x^{", "i" * 70]

    def actions():
        return [f"Search[{rng.choice(names)}]" for _ in range(rng.integers(1, 6))] + ["Finish[Gol]"]

    root = Node(np.zeros(9, np.int32), 0, Episode(QUESTION))
    turns = [t for _ in range(num_bare) for t in grow(root, *actions(), reward=1.0)[:-1]]
    for _ in range(num_more):
        grow(turns[rng.integers(len(turns))], *actions())
    backup(root)
    return root


def write_run(folder, num_steps, num_evals, auroc):
    rows = [{"sampled_tokens": 12000 * (i + 1), "reward_mean": 0.3, "effective_ratio": 0.5,
             "predicted_effective_ratio": 0.4, "predictor_auroc": auroc} for i in range(num_steps)]
    evals = [{"step": i, "sampled_tokens": 12000 * i, "em_first": 0.3} for i in range(num_evals)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "evals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in evals))


@pytest.mark.parametrize("num_steps, num_evals, auroc", [(3, 2, 0.6), (1, 0, None), (0, 1, None)])
def test_curve_is_written_whole(tmp_path, num_steps, num_evals, auroc):
    write_run(tmp_path, num_steps, num_evals, auroc)
    assert draw_curve(str(tmp_path)) == tmp_path / "curve.png"
    assert (tmp_path / "curve.png").read_bytes().startswith(PNG)
    assert not list(tmp_path.glob("*.part"))


def test_curve_of_an_empty_folder(tmp_path):
    assert draw_curve(tmp_path).exists()


def test_pyplot_stays_out():
    """pyplot would pick a backend, and could open a window."""
    code = "import draw, sys; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_band_is_the_t_interval():
    curves = [(np.array([0.0, 10.0]), np.array([a, a])) for a in (1.0, 2.0, 3.0)]
    curves[0] = (np.array([2.0, 8.0]), curves[0][1])
    x, mean, half = mean_and_band(curves)
    assert (x[0], x[-1]) == (2, 8), "only where all the seeds have been"
    np.testing.assert_allclose(mean, 2)
    np.testing.assert_allclose(half, 4.30265 * 1.0 / 3 ** 0.5, rtol=1e-5)
    assert not mean_and_band(curves[:1])[2].any()
    many = mean_and_band([curves[1], curves[2]] * 30)[2]  # t = 2.001 at 59 degrees of freedom
    np.testing.assert_allclose(many, 2.001 * (0.25 * 60 / 59 / 60) ** 0.5, rtol=1e-4)


@pytest.mark.parametrize("df, t", [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645),
                                   (9, 2.26216), (19, 2.09302), (30, 2.04227), (1000, 1.96234)])
def test_student_t_is_that_of_the_printed_tables(df, t):
    assert student_t(df) == pytest.approx(t, rel=1e-5)


def test_arms_are_drawn_with_gaps_and_strangers(tmp_path):
    rows = [{"arm": arm, "seed": seed, "sampled_tokens": 9 * i, "eval_em": 0.1 * i + 0.01 * seed}
            for arm, num_seeds in (("trace", 2), ("mine", 1), ("grpo", 3))
            for seed in range(num_seeds) for i in (2, 0, 1)]
    rows += [{"arm": "trace", "seed": 0, "sampled_tokens": 5}, {**rows[0], "eval_em": None}]
    assert draw_arms(rows, tmp_path / "arms.png").read_bytes().startswith(PNG)
    assert b"<svg" in draw_arms(rows, tmp_path / "arms.svg").read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {"arms.png", "arms.svg"}
    one, two = (int.from_bytes(draw_arms(some, tmp_path / "arms.png").read_bytes()[16:20])
                for some in (rows, [*rows, *({**row, "arm": row["arm"] + "@2"} for row in rows)]))
    assert two == 2 * one  # a panel per world


def test_the_cycle_marks_the_present_steps_and_cuts_no_label():
    figure = draw_cycle(2, 4)
    texts, renderer = figure.axes[0].texts, FigureCanvasAgg(figure).get_renderer()
    assert [t.get_text() for t in texts] == list(STEPS)
    assert [i for i, t in enumerate(texts, 1) if t.get_weight() == "bold"] == [2, 4]
    assert all(t.get_window_extent(renderer).width < 1.32 * figure.dpi
               for t in draw_cycle(*range(9)).axes[0].texts), "wider than its box, in inches"


def test_tree_text():
    lines = tree_text(small_tree(), text_of, width=30).split("\n")
    assert lines == [
        "In which country lies the birthplace of Ada Velt?",
        "                                   Ṽ     V̂ leaves",
        "(question)                      0.40  0.33      3",
        "├─◆ Search[Velt]                0.75  0.50      2",
        "│  ├── Search[Belkan]                 1.00      1",
        "│  │  └─✓ Finish[Gol]",
        "│  └─✗ Finish[Dor]",
        "└── (no action)                       0.00      1",
        "   └─… Lookup[born]",
        "✓ right   ✗ wrong   … no answer   ◆ expanded prefix"]
    assert "├─◆ Search[V…" in tree_text(small_tree(), text_of, width=13)


@pytest.mark.parametrize("num_bare, num_more", [(2, 3), (20, 40)])
def test_nothing_overlaps_in_a_tree(num_bare, num_more):
    """Guards labels that ran into the next node, or into the row below."""
    figure = draw_tree(random_tree(num_bare, num_more, seed=num_bare), text_of, title="$ 1")
    canvas, renderer = figure.bbox, FigureCanvasAgg(figure).get_renderer()
    boxes = [t.get_window_extent(renderer) for t in figure.axes[0].texts if t.get_text()]
    assert all(canvas.x0 <= b.x0 and b.x1 <= canvas.x1 and canvas.y0 <= b.y0 and b.y1 <= canvas.y1
               for b in boxes)
    x0, y0, x1, y1 = np.array([(b.x0, b.y0, b.x1, b.y1) for b in boxes]).T
    hits = ((x0[:, None] < x1 - 1) & (x0 + 1 < x1[:, None])
            & (y0[:, None] < y1 - 2) & (y0 + 2 < y1[:, None]))
    assert not np.triu(hits, 1).any()


def test_tree_shows_estimate_marks_and_actions():
    root = small_tree()
    def texts(**kwargs):
        return [t.get_text() for t in draw_tree(root, text_of, **kwargs).axes[0].texts]
    assert {".4", ".75", "Search", "Velt", "Invalid", "(no action)", "✓", "✗", "…"} <= set(texts())
    assert {".33", ".5", "0", "1"} <= set(texts(estimate="value"))
    assert draw_tree(root, text_of)._repr_png_().startswith(PNG)


def test_trees_before_any_rollout_and_before_backup():
    root = Node(np.zeros(9, np.int32), 0, Episode(QUESTION))
    assert "(question)" in tree_text(root, text_of) and draw_tree(root, text_of)
    grow(root, "Search[Velt]", "Finish[Gol]")
    root.predicted = np.float32(0.3)
    assert len(nodes(root)) == 3 and tree_text(root, text_of) and draw_tree(root, text_of)
