"""Predictors that head and probe have to beat, for lab/score_predictor.py."""
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

    def __init__(self, policy=None, env=None, seed=0):
        self.counts = {}  # question id: [2 of them], successes and failures

    def predict(self, features):
        counts = [self.counts.get(node.state.question.id, (0, 0)) for node in features.anchors]
        wins, losses = np.array(counts).T
        return (1 + wins) / (2 + wins + losses)

    def update(self, features, targets, weights):
        for node, target, weight in zip(features.anchors, targets, weights):
            if node.depth == 0:  # a root's target is over the rollouts of the prompt
                name = node.state.question.id
                new = weight * np.array([target, 1 - target])
                self.counts[name] = self.counts.get(name, 0) + new
        return 0.0


class ConstantPredictor(Predictor):
    """The running mean of all targets, everywhere."""
    total, weight = 0.5, 1.0

    def __init__(self, policy=None, env=None, seed=0):
        pass

    def predict(self, features):
        return np.full(len(features.anchors), self.total / self.weight)

    def update(self, features, targets, weights):
        self.total += np.dot(weights, targets)
        self.weight += np.sum(weights)
        return 0.0


BASELINES = {"logistic": LogisticPredictor, "counts": CountsPredictor,
             "constant": ConstantPredictor}
