"""The command that measures the predictor: its objective by hand, and the whole, shrunk."""
import csv

import numpy as np
import pytest
from conftest import assert_refused

from lab import score_predictor
from lab.score_predictor import BARE, PER_BARE, Sample, main, objective, reliability, scores
from trace_mini import main as train


def sample_of(depth, truth, guesses, owner=None, outcome=None):
    n = len(depth)
    return Sample(np.array(depth), np.ones(n, int), np.arange(n) if owner is None else
                  np.array(owner), np.zeros(n, int) if outcome is None else np.array(outcome),
                  np.array([truth, truth]), {k: np.array([v, v]) for k, v in guesses.items()})


def test_objective_by_hand():
    """Two roots, M = 4: known, all four go to the even one, 1 - 2/16; believed, to the other."""
    sample = sample_of([0, 0], [0.5, 0.0], {})
    rows, right, wrong = np.arange(2), np.array([0.5, 0.0]), np.array([0.0, 0.5])
    assert objective(sample, rows, right, right) == pytest.approx(7 / 8)
    assert objective(sample, rows, wrong, right) == 0
    # prompt 0: a success that never comes again, every continuation flips it; prompt 1: the
    # failure at depth 2 flips half the time, the one at depth 1 never; all six go there
    assert PER_BARE * BARE == 6
    sample = sample_of([1, 1, 2], [0.0, 0.0, 0.5], {}, owner=[0, 1, 1], outcome=[1, 0, 0])
    rows, right = np.arange(3), np.array([0.0, 0.0, 0.5])
    assert objective(sample, rows, right, right) == pytest.approx(1 + 1 - 0.5 ** 6)


def test_scores_close_the_gap_from_the_constant_to_the_truth():
    truth = np.tile([0.5, 0.0, 1.0, 0.4], 6)
    sample = sample_of([0] * 24, truth, {
        "truth": truth, "good": 0.9 * truth + 0.05, "constant": np.full(24, 0.4),
        "inverted": np.where(abs(truth - 0.5) < 0.2, 0.0, 0.5)})
    rows = {row["predictor"]: row for row in scores(sample) if row["group"] == "roots"}
    assert rows["truth"]["closed"] == 1 and rows["constant"]["closed"] == 0
    assert rows["good"]["closed"] == pytest.approx(1, abs=0.05)
    assert rows["inverted"]["closed"] < -1 and rows["inverted"]["anchors"] == 24
    assert rows["good"]["bias"] == pytest.approx(np.mean(0.05 - 0.1 * truth))
    assert rows["constant"]["auroc"] == 0.5 < rows["good"]["auroc"] == rows["truth"]["auroc"]
    assert rows["truth"]["brier"] == pytest.approx(np.mean(truth * (1 - truth)))
    assert rows["truth"]["brier"] < rows["good"]["brier"] < rows["constant"]["brier"]


def test_reliability_bins_by_hand():
    sample = sample_of([0, 0, 1], [0.2, 0.4, 1.0], {"head": [0.31, 0.39, 1.0]})
    assert list(reliability(sample)) == [
        {"predictor": "head", "depth": 0, "bin": 3, "anchors": 2, "predicted": pytest.approx(0.35),
         "true": pytest.approx(0.3)},
        {"predictor": "head", "depth": 1, "bin": 9, "anchors": 1, "predicted": 1.0, "true": 1.0}]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scored") / "run"
    assert train(["--steps", "2", "--budget", "300", "--articles", "100", "--eval-questions", "6",
                  "--pool-size", "6", "--max-turns", "3", "--out", str(folder)]) == 0
    return folder


@pytest.mark.long
def test_the_command(finished, tmp_path, capsys, monkeypatch):
    """It repeats the run to the number, and scores every predictor at every point."""
    spent, samples, step, draw = [], [], score_predictor.train_step, score_predictor.draw_sample

    def spy(*args):
        trees, row = step(*args)
        spent.append(row["sampled_tokens"])
        return trees, row

    monkeypatch.setattr(score_predictor, "train_step", spy)
    monkeypatch.setattr(score_predictor, "draw_sample",
                        lambda *args: samples.append(draw(*args)) or samples[-1])
    assert main([str(finished), "--anchors", "12", "--continuations", "4", "--points", "2",
                 "--out", str(tmp_path / "results")]) == 0
    assert spent == [int(line.split('"sampled_tokens": ')[1].split(",")[0])
                     for line in open(finished / "metrics.jsonl")]
    for sample in samples:  # no half is scored against itself
        assert np.array_equal(sample.guesses["truth"], sample.truth[::-1])
        assert sample.depth[:6].tolist() == [0] * 6 and (sample.depth[6:] > 0).all()
        assert sample.truth.shape == sample.guesses["head"].shape == (2, len(sample.depth))
    rows = list(csv.DictReader(open(tmp_path / "results" / "predictor.csv")))
    names = {"truth", "head", "head, fresh", "head, repeats", "beta", "logistic", "counts",
             "constant"}
    for group in ("roots", "prefixes"):
        assert {(row["step"], row["predictor"]) for row in rows if row["group"] == group} == {
            (step, name) for step in "12" for name in names}
    assert all(0 <= float(row["brier"]) <= 1 for row in rows)
    assert {row["anchors"] for row in rows if row["group"] == "roots"} == {"6"}
    bins = list(csv.DictReader(open(tmp_path / "results" / "predictor_reliability.csv")))
    for name in names:
        depths = [int(row["anchors"]) for row in bins if row["predictor"] == name
                  and row["depth"] == "0" and row["step"] == "2"]
        assert sum(depths) == 6
    for name in ("predictor", "predictor_reliability"):
        assert (tmp_path / "results" / f"{name}.png").stat().st_size > 1000
    assert "step 1" in (out := capsys.readouterr().out) and "logistic" in out


@pytest.mark.long
def test_bad_input_is_one_line_and_exit_code_2(finished, tmp_path, capsys):
    cases = [([str(tmp_path)], "config.json"), ([str(finished), "--anchors", "1"], "--anchors"),
             ([str(finished), "--continuations", "3"], "even"),
             ([str(finished), "--points", "0"], "--points"),
             ([str(finished), "--anchors", "14"], "holds out"),
             ([str(finished), "--what"], "--what")]
    for arguments, word in cases:
        assert_refused(main, arguments, word, capsys)
