"""Predictors learn, are scored before they learn, and survive a checkpoint."""
import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from predictor import CLIP, PREDICTORS, Features, auroc, brier

WIDTH = 8
POLICY = SimpleNamespace(body=SimpleNamespace(config=SimpleNamespace(hidden_size=WIDTH)))
LEARNT = [name for name in PREDICTORS if name != "oracle"]


def batch(seed, num=200):
    """Anchors whose chance of success is written in the hidden state and in the plain features."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(num, WIDTH)).astype(np.float32)
    plain = np.stack([rng.integers(0, 6, num), rng.integers(0, 2, num), -rng.random(num)], 1)
    chance = 1 / (1 + np.exp(-2 * hidden[:, 0] + 2 * plain[:, 1] - 1))
    anchors = tuple(SimpleNamespace(depth=int(p[0]), state=SimpleNamespace(
        question=SimpleNamespace(id=str(i % 40)))) for i, p in enumerate(plain))
    wins = rng.binomial(4, chance)
    return Features(hidden, plain.astype(np.float32), anchors), wins / 4, np.full(num, 4.0)


@pytest.mark.parametrize("name", LEARNT)
def test_learns_and_stays_a_probability(name):
    predictor = PREDICTORS[name](policy=POLICY, seed=0)
    inputs, targets, weights = batch(0)
    before = brier(predictor.predict(inputs), targets, weights)
    losses = [predictor.update(*batch(seed)) for seed in range(1, 60)]
    predicted = predictor.predict(inputs)
    assert predicted.shape == (200,) and (predicted >= CLIP / 2).all() and (predicted <= 1).all()
    if name in ("head", "logistic"):
        assert brier(predicted, targets, weights) < before - 0.02
        assert losses[-1] < losses[0]
    if name == "head":
        assert auroc(predicted, targets, weights) > 0.75


@pytest.mark.parametrize("name", LEARNT)
def test_state_survives_a_checkpoint(name):
    """Through torch.save with weights_only: nothing but tensors and plain numbers."""
    first, second = (PREDICTORS[name](policy=POLICY, seed=s) for s in (0, 1))
    first.update(*batch(0))
    stream = io.BytesIO()
    torch.save(first.state_dict(), stream)
    second.load_state_dict(torch.load(io.BytesIO(stream.getvalue()), weights_only=True))
    for predictor in (first, second):
        predictor.update(*batch(1))
    assert np.array_equal(first.predict(batch(2)[0]), second.predict(batch(2)[0]))


def test_same_seed_same_head():
    a, b = (PREDICTORS["head"](policy=POLICY, seed=3) for _ in range(2))
    for predictor in (a, b):
        predictor.update(*batch(0))
    assert np.array_equal(a.predict(batch(1)[0]), b.predict(batch(1)[0]))


def test_scores_against_their_definitions():
    """Brier and AUROC over leaves, by brute force; None where one class is missing."""
    rng = np.random.default_rng(0)
    predicted = rng.integers(1, 9, 30) / 10
    weights = rng.integers(1, 5, 30)
    wins = rng.binomial(weights, predicted)
    pairs = [(p, 1) for p, w in zip(predicted, wins) for _ in range(w)]
    pairs += [(p, 0) for p, w, n in zip(predicted, wins, weights) for _ in range(n - w)]
    assert brier(predicted, wins / weights, weights) == pytest.approx(
        np.mean([(p - r) ** 2 for p, r in pairs]))
    beats = [(a > b) + (a == b) / 2 for a, x in pairs if x for b, y in pairs if not y]
    assert auroc(predicted, wins / weights, weights) == pytest.approx(np.mean(beats))
    assert auroc(predicted, np.ones(30), weights) is None
    assert auroc(predicted, np.zeros(30), weights) is None
