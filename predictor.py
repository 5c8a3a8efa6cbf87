"""The shared success predictor Ṽ: one small network for the roots and prefixes of all prompts.

It reads what the policy computed anyway, the hidden states at the last tokens of the prompt
and of the anchor, and three plain numbers; it learns online from the recursive targets V̂ of
the steps' trees. It serves the allocator only and never enters the policy gradient. Nothing it
sees is privileged: no answer, no gold title, no hop count, no kind of question.

A predictor has `predict(features) -> probabilities [n]`, `update(features, targets, weights) ->
loss`, and the state_dict of checkpoints; ConstantPredictor is the smallest. `PREDICTORS` holds
them by name.
"""
from typing import NamedTuple

import numpy as np
import torch

from rollout import forget_caches, grow
from tree import TARGETS, Node, backup, path, path_ids

CLIP = 0.02  # probabilities stay in [CLIP, 1 − CLIP]: nothing is ever given up for good


def weighted_error(predicted, targets, weights):
    return float((weights * (predicted - targets) ** 2).sum() / np.sum(weights))


class Features(NamedTuple):
    hidden: np.ndarray  # float32 [n, 2 width], the policy's hidden states at prompt and anchor
    plain: np.ndarray   # float32 [n, 3]: turn index, last search missed, mean log-prob of the turn
    anchors: tuple      # [n] the nodes, for per-prompt counts and the Monte-Carlo oracle only


def features(anchors):
    """Features of n anchors (roots or prefixes that have been fed to the policy)."""
    hidden = [np.concatenate([path(node)[0].hidden, node.hidden]) for node in anchors]
    plain = [[node.depth, float(node.state.last_missed),
              float(node.logprobs.mean()) if node.num_sampled else 0.0] for node in anchors]
    return Features(np.stack(hidden), np.array(plain, np.float32), tuple(anchors))


class HeadPredictor:
    """LayerNorm and one linear layer on all features; MSE as in the paper. It learns from
    the last `memory` anchors together: one step shows it few prompts. (A hidden layer learnt no
    more, and later; without the prompt's own hidden state prefixes were predicted worse.)"""
    num_outputs = 1

    def __init__(self, policy, env=None, seed=0, learning_rate=1e-2, passes=16, memory=10000):
        self.network = self.make_network(policy)
        torch.nn.init.zeros_(self.network[-1].weight)  # starts at one half everywhere
        torch.nn.init.zeros_(self.network[-1].bias)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=learning_rate)
        self.passes, self.memory, self.lessons = passes, memory, None

    def make_network(self, policy):
        width = 2 * policy.body.config.hidden_size + 3
        return torch.nn.Sequential(torch.nn.LayerNorm(width),
                                   torch.nn.Linear(width, self.num_outputs))

    def inputs(self, features):
        return torch.tensor(np.concatenate([features.hidden, features.plain], 1))

    def predict(self, features):
        with torch.no_grad():
            probability = torch.sigmoid(self.network(self.inputs(features))[:, 0]).numpy()
        return np.clip(probability.astype(float), CLIP, 1 - CLIP)

    def loss(self, inputs, targets, weights):
        """Weighted mean squared error."""
        probability = torch.sigmoid(self.network(inputs)[:, 0])
        return (weights * (probability - targets) ** 2).sum() / weights.sum()

    def update(self, features, targets, weights):
        """A few full-batch steps of Adam; -> loss on what is new, before them. Where that loss or
        a gradient is not finite, what is new is forgotten, and the loss is NaN."""
        new = self.inputs(features), *(torch.tensor(x).float() for x in (targets, weights))
        with torch.no_grad():
            before = self.loss(*new).item()
        if not np.isfinite(before):
            return np.nan
        old = self.lessons or [part[:0] for part in new]
        lessons = [torch.cat(parts)[-self.memory:] for parts in zip(old, new)]
        for _ in range(self.passes):
            self.optimizer.zero_grad()
            self.loss(*lessons).backward()
            if not all(p.grad.isfinite().all() for p in self.network.parameters()):
                return np.nan
            self.optimizer.step()
        self.lessons = lessons
        return before

    def state_dict(self):
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict(),
                "lessons": self.lessons}

    def load_state_dict(self, state):
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.lessons = state["lessons"]


class BetaPredictor(HeadPredictor):
    """Beyond the paper: it also tells how sure it is. Its output is a Beta distribution of the
    success probability, fitted to counts of successes (beta-binomial likelihood), so that "I do
    not know" differs from "a coin's toss". The rules named trace use its concentration."""
    num_outputs = 2

    def concentration(self, features):
        """Pseudo-counts [n] behind the predictions: a + b of Beta(a, b)."""
        with torch.no_grad():
            outputs = self.network(self.inputs(features))
        return self.pseudo_counts(outputs).double().numpy()

    def pseudo_counts(self, outputs):
        return 0.2 + torch.nn.functional.softplus(outputs[:, 1] + 2)  # 2.3 to begin with

    def loss(self, inputs, targets, weights):
        """Minus the mean log-likelihood of a leaf."""
        outputs = self.network(inputs)
        total, probability = self.pseudo_counts(outputs), torch.sigmoid(outputs[:, 0])
        a, b, wins = total * probability + 1e-4, total * (1 - probability) + 1e-4, weights * targets

        def log_beta(a, b):
            return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
        return (log_beta(a, b) - log_beta(a + wins, b + weights - wins)).sum() / weights.sum()


class LogisticPredictor(HeadPredictor):
    """The baseline to beat: a logistic curve over the three plain features, fitted as the head."""

    def make_network(self, policy):
        return torch.nn.Sequential(torch.nn.Linear(3, 1))

    def inputs(self, features):
        return torch.tensor(features.plain)


class CountsPredictor:
    """Per-prompt Beta counts: (1 + successes) / (2 + rollouts), the same at every depth."""

    def __init__(self, policy=None, env=None, seed=0):
        self.counts = {}

    def predict(self, features):
        pairs = np.array([self.counts.get(node.state.question.id, (0.0, 0.0))
                          for node in features.anchors])
        return (1 + pairs[:, 0]) / (2 + pairs.sum(1))

    def update(self, features, targets, weights):
        error = weighted_error(self.predict(features), targets, weights)
        for node, target, weight in zip(features.anchors, targets, weights):
            if node.depth == 0:  # a root's target is over the rollouts of the prompt
                name = node.state.question.id
                wins, losses = self.counts.get(name, (0.0, 0.0))
                self.counts[name] = [float(wins + weight * target),
                                     float(losses + weight * (1 - target))]
        return error

    def state_dict(self):
        return {"counts": dict(self.counts)}

    def load_state_dict(self, state):
        self.counts = dict(state["counts"])


class ConstantPredictor:
    """The running mean of all targets, everywhere."""

    def __init__(self, policy=None, env=None, seed=0):
        self.total, self.weight = 0.5, 1.0

    def predict(self, features):
        return np.full(len(features.anchors), self.total / self.weight)

    def update(self, features, targets, weights):
        error = weighted_error(self.predict(features), targets, weights)
        self.total += float(np.dot(weights, targets))
        self.weight += float(np.sum(weights))
        return error

    def state_dict(self):
        return {"total": self.total, "weight": self.weight}

    def load_state_dict(self, state):
        self.total, self.weight = state["total"], state["weight"]


class OraclePredictor:
    """A diagnostic: V by Monte Carlo, from `num` rollouts per anchor, which no budget pays."""

    def __init__(self, policy, env, seed=0, num=16):
        self.policy, self.env, self.seed, self.num, self.calls = policy, env, seed, num, 0

    def predict(self, features):
        self.calls += 1
        values = monte_carlo_value(self.policy, self.env, features.anchors, self.num,
                                   (self.seed, "oracle", self.calls))
        return np.clip(values, CLIP, 1 - CLIP)

    def update(self, features, targets, weights):
        return 0.0  # nothing to learn

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]


PREDICTORS = {"head": HeadPredictor, "beta": BetaPredictor, "logistic": LogisticPredictor,
              "counts": CountsPredictor, "constant": ConstantPredictor, "oracle": OraclePredictor}


def monte_carlo_value(policy, env, anchors, num, key):
    """V of each anchor: mean reward of `num` fresh rollouts, which leave its tree untouched."""
    values, size = [], max(1, 1024 // num)  # a few at a time: their caches are large
    for i in range(0, len(anchors), size):
        copies = [Node(path_ids(a), 0, a.state, hidden=a.hidden, cache=a.cache,
                       sample=num * (i + j)) for j, a in enumerate(anchors[i:i + size])]
        grow(policy, env, copies, [num] * len(copies), key)
        for copy in copies:
            backup(copy)
        values += [copy.value for copy in copies]
        for copy in copies:  # the cache of the anchor itself stays
            forget_caches(copy.children)
    return np.array(values)


def predict(predictor, anchors):
    """Ṽ of the anchors, [n], also kept on the nodes; one half where it is not a number."""
    values = predictor.predict(features(anchors)) if anchors else np.zeros(0)
    values = np.nan_to_num(values, nan=0.5)
    for node, value in zip(anchors, values):
        node.predicted = float(value)
    return values


def concentrations(predictor, anchors, default):
    """Pseudo-counts [n] behind the predictions: the predictor's own where it tells them."""
    if anchors and hasattr(predictor, "concentration"):
        return np.nan_to_num(predictor.concentration(features(anchors)), nan=2.0)
    return np.full(len(anchors), default)


def lessons(roots, targets="all"):
    """All anchors of backed-up trees, their targets [n] by a rule of tree.TARGETS, and their
    weights [n], the numbers of leaves behind the targets."""
    triples = [(node, *pair) for root in roots for node, pair in TARGETS[targets](root).items()
               if node.hidden is not None]
    anchors, values, weights = zip(*triples)
    return anchors, np.array(values), np.array(weights, float)


def score_and_update(predictor, roots, targets="all"):
    """Score what was predicted against its targets, which it had not seen; then learn from all
    anchors of the step. -> metrics"""
    anchors, targets, weights = lessons(roots, targets)
    scored = [i for i, node in enumerate(anchors) if node.predicted is not None]
    predicted = np.array([anchors[i].predicted for i in scored])
    loss = predictor.update(features(anchors), targets, weights)
    return {"predictor_brier": brier(predicted, targets[scored], weights[scored]),
            "predictor_auroc": auroc(predicted, targets[scored], weights[scored]),
            "predictor_loss": loss, "predictor_skipped": int(not np.isfinite(loss))}


# ---------------------------------------------------------------- scores
def brier(predicted, targets, weights):
    """Mean over leaves of (Ṽ − R)²; targets [n] are means over weights [n] leaves of 0/1
    rewards. Range 0 to 1; always saying one half scores 0.25."""
    predicted, targets, weights = (np.asarray(x, float) for x in (predicted, targets, weights))
    error = (predicted - targets) ** 2 + targets * (1 - targets)
    return float((weights * error).sum() / weights.sum())


def auroc(predicted, targets, weights):
    """Chance that a success leaf's anchor is predicted above a failure leaf's (ties count
    half). Range 0 to 1, 0.5 is chance; None when there are no successes or no failures."""
    predicted = np.asarray(predicted, float)
    wins, losses = np.asarray(weights) * targets, np.asarray(weights) * (1 - np.asarray(targets))
    if wins.sum() <= 0 or losses.sum() <= 0:
        return None
    _, group = np.unique(predicted, return_inverse=True)
    wins, losses = np.bincount(group, wins), np.bincount(group, losses)
    below = np.cumsum(losses) - losses
    return float((wins * (below + losses / 2)).sum() / (wins.sum() * losses.sum()))
