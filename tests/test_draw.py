"""The pictures: what stands in them, and that nothing in them overlaps."""
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
from matplotlib.transforms import Bbox

from engine.draw import Picture, draw_curve, draw_cycle, draw_tree, read_metrics, tree_text
from tree import backup
from world.example import ENV, RIGHT, example_tree, play, wrote


def full_tree():
    """The worked example and a bare rollout that does not answer."""
    root = example_tree()
    play(str.encode, root, 6, *[" I only think."] * ENV.max_turns)
    backup(root)
    return root


def assert_apart(boxes, figure):
    """No two overlap by more than two pixels, and none leaves the figure."""
    for a, b in combinations([box.padded(-1) for box in boxes], 2):
        assert not a.overlaps(b)
    assert Bbox.union([figure.bbox, *boxes]).bounds == figure.bbox.bounds


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["caf\udce9", "日本\n", "$x^{$"])
def test_curve_of_a_folder_whose_name_cannot_be_drawn(tmp_path, name):
    """A name that is not UTF-8 ended a run at its first save."""
    folder = tmp_path / name
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(
        '{"sampled_tokens": 12000, "reward_mean": 0.3, "predictor_auroc": null}\n')
    (folder / "evals.jsonl").touch()
    assert draw_curve(folder).read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_drawn_is_replaced():
    figure = Picture()
    title = figure.suptitle("caf\udce9 日 é\n…")
    figure._repr_png_()
    assert title.get_text() == "caf� � é\n…"


def test_pyplot_stays_out():
    """pyplot would pick a backend, and could open a window."""
    code = "import engine.draw, sys; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_cycle_marks_the_present_steps():
    figure = draw_cycle(2, 4)
    figure._repr_png_()
    boxes = [text.get_bbox_patch() for text in figure.axes[0].texts]
    marked = [box.get_facecolor() != (1, 1, 1, 1) for box in boxes]
    assert np.flatnonzero(marked).tolist() == [4, 6], "drawn from the last step to the first"
    assert_apart([box.get_window_extent() for box in boxes], figure)


def test_tree_text():
    text = tree_text(full_tree(), wrote, width=38)
    assert text.startswith("""\
What is the birth year of the author of The Silent Bridge?
                                           Ṽ     V̂ leaves
─ (question)                            0.40  0.43      7
│  ◆ Search[The Silent Bridge]          0.40  0.67      3
│  │  ─ Search[Ada Velkan]              0.90  1.00      1
│  │  │  ✓ Finish[1834]
""")
    assert "\n│  ─ (no action)                              0.00      1\n" in text
    assert text.endswith("│  … (no action)\n✓ right   ✗ wrong   … no answer   ◆ expanded turn")
    assert "\n│  ◆ Search[T…  0.40" in tree_text(full_tree(), wrote, width=14)


@pytest.mark.parametrize("num_more", [3, 60])
def test_nothing_overlaps_in_a_tree(num_more):
    """Guards labels that ran into the next node, or into the row below."""
    names = "W" * 26, "The Silver Bridge of Belkan", "Velt", "", "$x^{$", "日"
    root = full_tree()
    starts = [root, *root.children[:2]]
    for sample in range(7, 7 + num_more):
        turn = f"Action: Search[{names[sample % 6]}]"
        play(str.encode, starts[sample % 3], sample, *[turn] * (sample % 5), RIGHT)
    backup(root)
    figure = draw_tree(root, wrote, "$ 1")
    figure._repr_png_()
    texts = [text for text in figure.axes[0].texts if text.get_text()]
    assert_apart([text.get_window_extent() for text in texts], figure)


def test_tree_shows_what_it_should():
    """Expanded turns and continuations by shape and by line: they must show in grey too."""
    first = draw_tree(full_tree(), wrote).axes[0]
    shown = {text.get_text() for text in first.texts}
    assert {".67", ".33", "Lookup\nauthor", "Invalid\n(no action)", "✗", "…"} <= shown
    expanded = [line.get_ydata()[0] for line in first.lines if line.get_marker() == "D"]
    assert sorted(expanded) == [3, 6], "rows, from the last leaf"
    assert [line.get_linestyle() for line in first.lines].count("--") == 8
    second = draw_tree(full_tree(), wrote, "title", "predicted").axes[0]
    assert {".40", ".90"} <= {text.get_text() for text in second.texts}


def test_the_reward_is_smoothed(tmp_path):
    """The first values, of which there are fewer before them, too."""
    rewards = [1.0] * 5 + [0.0] * 20
    (tmp_path / "metrics.jsonl").write_text(
        "".join(f'{{"reward_mean": {reward}}}\n' for reward in rewards))
    means = [row["smooth_reward"] for row in read_metrics(tmp_path)]
    assert means[:6] == [1.0] * 5 + [5 / 6]
    assert means[9:11] == [0.5, 0.4] and means[14:] == [0.0] * 11
