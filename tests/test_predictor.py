"""Predictors learn, are scored before they learn, and see nothing privileged."""
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from allocator import expected_mixed_prob
from predictor import (
    CLIP,
    BetaPredictor,
    Features,
    HeadPredictor,
    OraclePredictor,
    auroc,
    brier,
    features,
    predict,
    score_and_update,
)
from rollout import grow
from tree import TARGETS, nodes

WIDTH = 8
POLICY = SimpleNamespace(body=SimpleNamespace(config=SimpleNamespace(hidden_size=WIDTH)))


def batch(seed):
    """-> (features, targets, weights) of 200 anchors whose chance of success is written in their
    hidden state."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(200, 2 * WIDTH)).astype(np.float32)
    plain = rng.random((200, 3)).astype(np.float32)
    wins = rng.binomial(4, 1 / (1 + np.exp(-2 * hidden[:, 0])))
    return Features(hidden, plain, (None,) * 200), wins / 4, np.full(200, 4.0)


# ---------------------------------------------------------------- learning
def test_the_head_learns_and_stays_a_probability():
    predictor, (inputs, targets, weights) = HeadPredictor(POLICY), batch(0)
    assert (predictor.predict(inputs) == 0.5).all()
    for seed in range(1, 30):
        predictor.update(*batch(seed))
    predicted = predictor.predict(inputs)
    assert predicted.min() >= CLIP and predicted.max() <= 1 - CLIP
    assert auroc(predicted, targets, weights) > 0.75
    assert brier(predicted, targets, weights) < 0.25 - 0.02  # of always saying one half


@pytest.mark.long
def test_beta_tells_unknown_from_even_odds():
    """Half of the anchors are a coin's toss, the others always right or always wrong, nobody can
    say which: the same mean, but groups of four on the others are never mixed."""
    rng, predictor = np.random.default_rng(0), BetaPredictor(POLICY)
    inputs, _, weights = batch(0)
    tossed = inputs.hidden[:, 0] > 0
    for _ in range(60):
        targets = np.where(tossed, rng.binomial(4, 0.5, 200) / 4, rng.integers(0, 2, 200))
        predictor.update(inputs, targets, weights)
    v, sure = predictor.predict(inputs), predictor.concentration(inputs)
    for half in (tossed, ~tossed):
        assert abs(v[half].mean() - 0.5) < 0.1
    mixed = expected_mixed_prob(sure * v, sure * (1 - v), 4)
    assert mixed[tossed].mean() > 0.7 and mixed[~tossed].mean() < 0.25


def test_a_gradient_that_is_not_finite_teaches_nothing():
    """Though the loss is. Bug: NaN in the weights, or in the lessons of all later steps."""
    predictor, (inputs, targets, weights) = HeadPredictor(POLICY), batch(0)
    predictor.update(inputs, targets, weights)
    before = predictor.predict(inputs)
    predictor.network[-1].weight.register_hook(lambda gradient: gradient * np.inf)
    assert np.isnan(predictor.update(inputs, targets, weights))
    assert np.array_equal(predictor.predict(inputs), before) and len(predictor.lessons[0]) == 200


# ---------------------------------------------------------------- scores
def test_scores_by_hand():
    """Five leaves: a success predicted at 0.9 and one at 0.5, failures at 0.5, 0.5 and 0.2. Of six
    pairs the success is above in four, level in two; None where one class is missing."""
    predicted, targets, weights = [0.9, 0.5, 0.5, 0.2], [1, 0.5, 0, 0], [1, 2, 1, 1]
    assert brier(predicted, targets, weights) == pytest.approx((0.01 + 3 * 0.25 + 0.04) / 5)
    assert auroc(predicted, targets, weights) == pytest.approx((4 + 2 / 2) / 6)
    assert auroc(predicted, [1] * 4, weights) is auroc(predicted, [0] * 4, weights) is None
    assert brier([], [], []) is None


@pytest.mark.parametrize("rule", TARGETS)
def test_scored_on_what_it_has_not_seen(rule, trees):
    """The score is that of what was predicted when the trees were grown, on the targets that are
    then learnt. Bug: the score of a predictor that has already learnt from them."""
    want, learnt = {}, {}
    for root in trees:
        for node, target in TARGETS[rule](root).items():
            if node.hidden is not None:  # what was never fed is no anchor
                want[node] = target
                node.predicted = len(want) % 10 / 10
    predicted, (targets, weights) = [node.predicted for node in want], np.array([*want.values()]).T

    def update(features, targets, weights):
        for node, target, weight in zip(features.anchors, targets, weights):
            learnt[node] = target, weight
            node.predicted = 0.5  # too late
        return 0.0
    scores = score_and_update(SimpleNamespace(targets=rule, update=update), trees)
    assert learnt == want
    assert scores["predictor_brier"] == brier(predicted, targets, weights)
    assert scores["predictor_auroc"] == auroc(predicted, targets, weights)


# ---------------------------------------------------------------- what it sees
def test_nothing_privileged_among_the_features(policy, data):
    """Other answers, gold titles, hops and kind, and with them other rewards: the same features."""
    questions = data.train[:4]
    others = [replace(question, answers=("nothing",), gold_titles=("Nowhere",), num_hops=99,
                      kind="unheard of") for question in questions]
    seen = []
    for some in (questions, others):
        roots = [policy.root(question, data.env) for question in some]
        grow(policy, data.env, roots, [2] * 4)
        anchors = [node for root in roots for node in nodes(root) if node.hidden is not None]
        seen.append(features(anchors))
    assert np.array_equal(seen[0].hidden, seen[1].hidden)
    assert np.array_equal(seen[0].plain, seen[1].plain)


def test_the_oracle_plays_on_copies(policy, data, trees):
    """V is counted, in thirds here, and the tree left as it was."""
    oracle, before = OraclePredictor(policy, data.env, num=3), nodes(trees[0])
    v, _ = predict(oracle, before[:2])
    assert set(v) <= {CLIP, 1 / 3, 2 / 3, 1 - CLIP} and nodes(trees[0]) == before
