"""Predictors that the head has to beat, for lab/score_predictor.py."""
import numpy as np
import torch

from predictor import HeadPredictor, Predictor


class LogisticPredictor(HeadPredictor):
    """The baseline to beat: a logistic curve over the three plain features, fitted as the head."""

    def make_network(self, policy):
        return torch.nn.Sequential(torch.nn.Linear(3, 1))

    def inputs(self, features):
        return torch.tensor(features.plain)


class CountsPredictor(Predictor):
    """Per-prompt Beta counts: (1 + successes) / (2 + rollouts), the same at every depth."""
    state = ("counts",)

    def __init__(self, policy=None, env=None, seed=0):
        self.counts = {}  # question id: [successes, failures]

    def predict(self, features):
        counts = [self.counts.get(node.state.question.id, (0.0, 0.0)) for node in features.anchors]
        wins, losses = np.array(counts).T
        return (1 + wins) / (2 + wins + losses)

    def update(self, features, targets, weights):
        error = weighted_error(self.predict(features), targets, weights)
        for node, target, weight in zip(features.anchors, targets, weights):
            if node.depth == 0:  # a root's target is over the rollouts of the prompt
                counts = self.counts.setdefault(node.state.question.id, [0.0, 0.0])
                counts[0] += float(weight * target)
                counts[1] += float(weight * (1 - target))
        return error


class ConstantPredictor(Predictor):
    """The running mean of all targets, everywhere."""
    state = ("total", "weight")

    def __init__(self, policy=None, env=None, seed=0):
        self.total, self.weight = 0.5, 1.0

    def predict(self, features):
        return np.full(len(features.anchors), self.total / self.weight)

    def update(self, features, targets, weights):
        error = weighted_error(self.predict(features), targets, weights)
        self.total += float(np.dot(weights, targets))
        self.weight += float(np.sum(weights))
        return error


def weighted_error(predicted, targets, weights):
    return float((weights * (predicted - targets) ** 2).sum() / np.sum(weights))


BASELINES = {"logistic": LogisticPredictor, "counts": CountsPredictor,
             "constant": ConstantPredictor}
