"""Predictors learn, are scored before they learn, and survive a checkpoint."""
import io
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from allocator import predicted_mixed_prob
from predictor import (
    CLIP,
    PREDICTORS,
    Features,
    auroc,
    brier,
    concentrations,
    features,
    lessons,
    predict,
    score_and_update,
)
from rollout import grow
from tree import all_targets, backup, fresh_targets, nodes, prefixes

WIDTH = 8
POLICY = SimpleNamespace(body=SimpleNamespace(config=SimpleNamespace(hidden_size=WIDTH)))
LEARNT = [name for name in PREDICTORS if name != "oracle"]


def batch(seed, num=200):
    """Anchors whose chance of success is written in the hidden state and in the plain features."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(num, 2 * WIDTH)).astype(np.float32)
    plain = np.stack([rng.integers(0, 6, num), rng.integers(0, 2, num), -rng.random(num)], 1)
    chance = 1 / (1 + np.exp(-2 * hidden[:, 0] + 2 * plain[:, 1] - 1))
    anchors = tuple(SimpleNamespace(depth=int(p[0]), state=SimpleNamespace(
        question=SimpleNamespace(id=str(i % 40)))) for i, p in enumerate(plain))
    wins = rng.binomial(4, chance)
    return Features(hidden, plain.astype(np.float32), anchors), wins / 4, np.full(num, 4.0)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.long if name == "beta" else ()) for name in LEARNT])
def test_learns_and_stays_a_probability(name):
    predictor = PREDICTORS[name](policy=POLICY, seed=0)
    inputs, targets, weights = batch(0)
    before = brier(predictor.predict(inputs), targets, weights)
    losses = [predictor.update(*batch(seed)) for seed in range(1, 60)]
    predicted = predictor.predict(inputs)
    assert predicted.shape == (200,) and (predicted >= CLIP / 2).all() and (predicted <= 1).all()
    if name in ("head", "beta", "logistic"):
        assert brier(predicted, targets, weights) < before - 0.02
        assert losses[-1] < losses[0]
    if name in ("head", "beta"):
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


@pytest.mark.long
def test_beta_tells_unknown_from_even_odds():
    """Half of the anchors are a coin's toss, the others always right or always wrong, nobody can
    say which: the same mean, but groups of four on the others are never mixed."""
    rng, predictor = np.random.default_rng(0), PREDICTORS["beta"](policy=POLICY)
    inputs, _, weights = batch(0)
    hidden = inputs.hidden.copy()
    tossed = hidden[:, 0] > 0
    for _ in range(60):
        targets = np.where(tossed, rng.binomial(4, 0.5, 200) / 4, rng.integers(0, 2, 200))
        predictor.update(inputs, targets, weights)
    sure, v = predictor.concentration(inputs), predictor.predict(inputs)
    assert abs(v[tossed].mean() - 0.5) < 0.1 and abs(v[~tossed].mean() - 0.5) < 0.1
    mixed = predicted_mixed_prob(v, 4, sure)
    assert mixed[tossed].mean() > 0.7 and mixed[~tossed].mean() < 0.25
    assert list(concentrations(PREDICTORS["head"](policy=POLICY), [1, 2], 3.0)) == [3.0, 3.0]


def test_lessons_that_are_not_finite_are_not_kept():
    predictor, (inputs, targets, weights) = PREDICTORS["head"](policy=POLICY), batch(0)
    predictor.update(inputs, targets, weights)
    before = predictor.predict(inputs)
    broken = inputs._replace(hidden=inputs.hidden * np.nan)
    assert np.isnan(predictor.update(broken, targets, weights))
    assert np.array_equal(predictor.predict(inputs), before) and len(predictor.lessons[0]) == 200


def test_a_gradient_that_is_not_finite_teaches_nothing():
    """The loss is finite, and so are the weights after it."""
    predictor, (inputs, targets, weights) = PREDICTORS["head"](policy=POLICY), batch(0)
    predictor.update(inputs, targets, weights)
    before, loss = predictor.predict(inputs), predictor.loss
    predictor.loss = lambda *lessons: loss(*lessons) + (
        0 * predictor.network[-1].weight).sqrt().sum()  # whose slope at 0 is infinite
    assert np.isnan(predictor.update(inputs, targets, weights))
    assert np.array_equal(predictor.predict(inputs), before) and len(predictor.lessons[0]) == 200


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


def grown(policy, env, questions):
    """Trees of two bare rollouts each, with a continuation from every other prefix."""
    roots = [policy.root(question, env) for question in questions]
    grow(policy, env, roots, [2] * len(roots), (0, 0))
    anchors = [node for root in roots for node, _ in prefixes(root)]
    grow(policy, env, anchors, [(i + 1) % 2 for i in range(len(anchors))], (0, 0))
    for root in roots:
        backup(root)
    return roots


@pytest.fixture(scope="module")
def trees(policy, data):
    return grown(policy, data.env, data.train[:8])


def test_nothing_privileged_among_the_features(trees, policy, data):
    """Other answers, gold titles, hops and kind: the same prompts, turns, features and
    predictions, though the question keeps nothing but its id and text."""
    others = [replace(question, answers=("nothing",), gold_titles=("Nowhere",), num_hops=99,
                      kind="unheard of") for question in data.train[:8]]
    anchors, other = ([node for root in roots for node in nodes(root) if node.hidden is not None]
                      for roots in (trees, grown(policy, data.env, others)))
    for node in other:
        question = node.state.question
        node.state = replace(node.state, question=SimpleNamespace(
            id=question.id, text=question.text))
    assert len(anchors) > 8
    assert np.array_equal(features(anchors).hidden, features(other).hidden)
    assert np.array_equal(features(anchors).plain, features(other).plain)
    for name in LEARNT:
        predictor = PREDICTORS[name](policy)
        assert np.array_equal(predict(predictor, anchors), predict(predictor, other))


@pytest.mark.parametrize("rule, targets_of", [("all", all_targets), ("fresh", fresh_targets)])
def test_scored_and_trained_on_the_same_targets(rule, targets_of, trees, policy):
    class Recorder:
        def update(self, features, targets, weights):
            self.seen = dict(zip(features.anchors, zip(targets, weights)))
            return 0.0

    recorder, predictor = Recorder(), PREDICTORS["constant"]()
    anchors, targets, weights = lessons(trees, rule)
    chances = predict(predictor, anchors)
    chances[0] = anchors[0].predicted = 0.9
    metrics = score_and_update(recorder, trees, rule)
    want = {node: pair for root in trees for node, pair in targets_of(root).items()
            if node.hidden is not None}
    assert recorder.seen == want and set(want) == set(anchors)
    assert metrics["predictor_brier"] == pytest.approx(brier(chances, targets, weights))
    assert metrics["predictor_auroc"] == auroc(chances, targets, weights)


def test_fresh_targets_of_sampled_trees(trees):
    """Rollouts are told apart by their sample numbers; every leaf counts once where it began."""
    for root in trees:
        targets = fresh_targets(root)
        assert targets[root] == (np.mean([own_reward(c) for c in root.children]), 2)
        started = sum(num for node, (_, num) in targets.items() if node is root or any(
            child.sample != node.sample for child in node.children))
        assert started == root.num_leaves


def own_reward(node):
    """Reward of the rollout that `node` belongs to, followed down its own turns."""
    while not node.is_leaf:
        node = next(child for child in node.children if child.sample == node.sample)
    return node.reward
