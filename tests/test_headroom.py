"""What allocation could win: the estimates against the formulas, and the command."""
import json

import numpy as np
import pytest
from conftest import assert_refused

from allocator import mixed_prob
from lab.headroom import (
    BARE,
    PER_BARE,
    expected_random,
    headroom_of_prefixes,
    headroom_of_roots,
    main,
    mixed,
)


def test_the_estimate_of_a_mix_has_no_bias():
    """Over 20,000 binomial draws, to five standard errors."""
    rng = np.random.default_rng(0)
    for v, m in ((0.1, 2), (0.3, 8), (0.5, 16)):
        found = mixed(rng.binomial(32, v, 20000), 32, np.full(20000, m))
        assert abs(found.mean() - mixed_prob(v, m)) < 5 * found.std() / 20000 ** 0.5


def test_headroom_by_hand():
    """Half of the prompts are even, the others never solved: at two rollouts per prompt equal
    groups of eight reach one prompt in four, half of them in vain. The optimum deals all to the
    even ones: four each, which are mixed 7/8 of the time. Where all are even, and eight rollouts
    are there for each, equal groups are the optimum."""
    wins = np.tile([16] * 8 + [0] * 8, (2, 1))
    even = mixed(np.array([16]), 32, np.array([8]))[0]
    four = mixed(np.array([16]), 32, np.array([4]))[0]
    assert headroom_of_roots(wins, 32, 2) == pytest.approx(8 * four / (16 / 4 * even / 2))
    assert headroom_of_roots(np.full((2, 16), 16), 32, 8) == pytest.approx(1)


def test_random_prefixes_flip_as_often_as_they_do():
    """The estimate from 32 continuations has no bias: over 4,000 draws of them, to five standard
    errors, against random prefixes played out."""
    repeat, budget = np.array([0.2, 0.9, 0.9]), PER_BARE * BARE
    rng, flips, found = np.random.default_rng(0), [], []
    for _ in range(4000):
        k = np.bincount(rng.integers(3, size=budget), minlength=3)
        flips.append((1 - repeat ** k).sum())
        found.append(expected_random(rng.binomial(32, repeat), 32))
    error = (np.var(flips) / 4000 + np.var(found) / 4000) ** 0.5
    assert abs(np.mean(flips) - np.mean(found)) < 5 * error


def test_headroom_of_prefixes_by_hand():
    """One prefix leaves nothing to choose. Of two, one of which never flips, random ones waste half
    of the six continuations: (1 - 1/2^6) over the mean of 1 - (3/4)^6."""
    one = np.full((2, 1), 16)
    assert headroom_of_prefixes([(one, np.ones(1, int))], 32) == pytest.approx(1)
    two = np.tile([16000, 32000], (2, 1))
    assert headroom_of_prefixes([(two, np.ones(2, int))], 32000) == pytest.approx(
        (1 - 0.5 ** 6) / (1 - 0.75 ** 6), rel=1e-3)
    assert np.isnan(headroom_of_prefixes([(np.full((2, 1), 32), np.ones(1, int))], 32))


def test_the_command(capsys, tmp_path):
    file = tmp_path / "found.json"
    assert main(f"--questions 2 --rollouts 32 --context 120 --json {file}".split()) == 0
    printed = capsys.readouterr().out
    assert json.loads(file.read_text())["questions"] == 2
    for word in ("dead", "Effective Ratio of groups of eight", "stage 1, 8", "stage 2", "minutes"):
        assert word in printed
    assert_refused(main, ["--rollouts", "8"], "--rollouts", capsys)
    assert_refused(main, ["--cold-start", "4"], "--cold-start", capsys)
    assert_refused(main, ["--modle", "x"], "modle", capsys)
