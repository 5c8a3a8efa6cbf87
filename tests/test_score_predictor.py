"""The command that measures the predictor: what it computes by hand, and the whole, shrunk."""
import numpy as np
import pytest
from conftest import assert_refused, metrics

from lab import score_predictor
from lab.score_predictor import MAKERS, main, objective, scores
from lab.tables import read_rows
from trace_mini import main as train
from trace_mini import train_step


def sample_of(kind, depth, true, pool="", outcome=0, **guesses):
    """A sample of anchors of one kind, as draw_sample makes them."""
    columns = {"kind": kind, "hops": f"1 hops, {kind}", "depth": f"depth {depth}", "pool": pool,
               "outcome": outcome, "true": true, **guesses}
    return np.rec.fromarrays(np.broadcast_arrays(*columns.values()), names=list(columns))


def test_worth_by_hand():
    """Roots, M = 4: all four go to the even one, 1 - 2/16. Prefixes: prompt a is a success that
    never comes again, so that a continuation flips it; of prompt b's failures one flips half the
    time, and all six continuations go there."""
    roots = sample_of("roots", 0, [0.5, 0.0], right=[0.5, 0.0])
    assert objective(roots, "right") == pytest.approx(7 / 8)
    ends = [0.0, 0.0, 0.5]
    some = sample_of("prefixes", 1, ends, ["a", "b", "b"], [1, 0, 0], right=ends)
    assert objective(some, "right") == pytest.approx(1 + 1 - 0.5 ** 6)


def test_scores_by_hand():
    true = np.tile([0.5, 0.0, 1.0, 0.4], 6)
    sample = sample_of("roots", 0, true, truth=true, constant=0.4, low=true / 2)
    truth, constant, low = (next(scores(sample, name, 1)) for name in ("truth", "constant", "low"))
    assert truth["closed"] == 1 > low["closed"] > constant["closed"] == 0
    assert low["bias"] == pytest.approx(-np.mean(true) / 2)
    assert constant["auroc"] == 0.5 < low["auroc"] == truth["auroc"]
    assert truth["brier"] == pytest.approx(np.mean(true * (1 - true)))


def test_bins_by_hand():
    sample = sample_of("prefixes", 2, [0.2, 0.4, 1.0], truth=0.5, constant=0.5,
                       head=[0.31, 0.39, 1.0])
    rows = {row["group"]: row for row in scores(sample, "head", 1)}
    low = rows["bins of depth 2: 3"]
    assert low["anchors"] == 2 and rows["bins of depth 2: 9"]["anchors"] == 1
    assert low["predicted"] == pytest.approx(0.35) and low["true"] == pytest.approx(0.3)
    assert low["closed"] is None  # an allocation spans all depths


@pytest.mark.long
def test_the_command(tmp_path, monkeypatch, capsys):
    """It repeats the run to the number, and scores all predictors on the same anchors."""
    run, spent = str(tmp_path), []
    assert train(["--steps", "2", "--budget", "300", "--eval-questions", "6", "--pool-size", "6",
                  "--out", run]) == 0

    def spy(*args):
        trees, row = train_step(*args)
        spent.append(row["sampled_tokens"])
        return trees, row
    monkeypatch.setattr(score_predictor, "train_step", spy)
    monkeypatch.setattr(score_predictor, "HALF", 4)
    assert main([run, "--anchors", "12", "--points", "2", "--out", run]) == 0
    assert spent == [row["sampled_tokens"] for row in metrics(tmp_path)]
    rows = read_rows(tmp_path / "predictor.csv")
    mine = [row for row in rows if (row["group"], row["step"]) == ("prefixes", 2)]
    assert {row["predictor"] for row in mine} == {"truth", "ceiling", *MAKERS} - {"oracle"}
    assert len({row["true"] for row in mine}) == 1
    halves = [row["predicted"] != row["true"] for row in rows if row["predictor"] == "truth"]
    assert any(halves)  # none is scored against itself
    for name in ("predictor.png", "predictor_reliability.png"):
        assert (tmp_path / name).stat().st_size > 10000  # drawn
    capsys.readouterr()
    for flags in (["--anchors", "1"], ["--points", "0"]):
        assert_refused(main, [run, *flags], flags[0], capsys)
