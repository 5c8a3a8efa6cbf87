"""Gradients of arms on a policy that stands still: the estimators, and a run of the command."""
import numpy as np
import pytest
from conftest import assert_refused

from lab.gradients import compare, main
from lab.tables import read_rows
from trace_mini import main as train
from tree import ADVANTAGES


def test_measures_are_those_of_a_known_distribution():
    """Gradients mean + noise in 400 dimensions, the mean at a known angle to a noisy reference:
    every estimate within five standard errors of its definition (false alarms: under 1e-5)."""
    rng = np.random.default_rng(0)
    true, other = np.zeros(400), np.zeros(400)
    true[0] = other[1] = 1.0
    mean = 0.8 * true + 0.6 * other
    gradients = mean + rng.normal(0, 0.1, (60, 400))     # |noise|² is 4: snr 0.25
    halves = true + rng.normal(0, 0.03, (2, 400))        # |noise|² is 0.36
    found = compare(gradients, halves)
    exact = {"snr": 0.25, "agreement": 0.8, "cosine_1": 0.8 * (0.25 / 1.25) ** 0.5,
             "cosine_10": 0.8 * (2.5 / 3.5) ** 0.5}
    for name, value in exact.items():
        estimate, error = found[name]
        assert abs(estimate - value) < 5 * error + 0.02 and error < 0.1, name


@pytest.mark.long
def test_the_command_measures_and_changes_nothing(tmp_path, capsys):
    run, out = str(tmp_path / "run"), tmp_path / "gradients.csv"
    assert train(["--steps", "1", "--budget", "400", "--eval-questions", "4", "--articles", "300",
                  "--out", run]) == 0
    saved = (tmp_path / "run/checkpoint/step-000001.pt").read_bytes()
    assert main([run, "--batches", "3", "--warm", "1", "--prompts", "40", "--budget", "2000",
                 "--arms", "grpo; trace", "--out", str(out)]) == 0
    rows = read_rows(out)
    assert [(row["arm"], row["advantage"]) for row in rows] == [
        (arm, rule) for arm in ("grpo", "trace") for rule in ADVANTAGES]
    assert all(0 < row["loss_share"] <= 1 and row["batches"] == 3 for row in rows)
    assert all(np.isfinite(row["cosine_1"]) for row in rows)
    assert (tmp_path / "run/checkpoint/step-000001.pt").read_bytes() == saved
    assert "grpo" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, word", [
    (["nowhere"], "nowhere"), (["nowhere", "--arms", "chance"], "chance"),
    (["nowhere", "--batches", "1"], "--batches"),
    (["nowhere", "--out", "no/where.csv"], "no/where")])
def test_bad_input_is_one_line_and_exit_code_2(arguments, word, capsys):
    assert_refused(main, arguments, word, capsys)
