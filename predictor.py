"""The shared success predictor Ṽ: one small model for the roots and prefixes of all prompts.

It reads what the policy computed anyway, hidden states at the prompt and at the anchor, and a few
plain numbers. It learns online from the recursive targets V̂ of the steps' trees. It serves the
allocator only and never enters the policy gradient. Nothing it sees is privileged: no answer, no
gold title, no hop count, no kind of question.

A predictor has `predict(features) -> probabilities [n]`, `update(features, targets, weights) ->
loss`, and what `Predictor` has. `PREDICTORS` holds them by name.
"""
from typing import NamedTuple

import numpy as np
import torch

from engine.logistic import RidgeLogistic
from rollout import grow
from tree import TARGETS, Node, backup, path, path_ids

TINY_WIDTH = 128  # of the policy in the box, on which the learning rate was tried
CLIP = 0.02  # probabilities stay in [CLIP, 1 − CLIP]: nothing is ever given up for good


class Features(NamedTuple):
    """Of n anchors: roots or prefixes that have been fed to the policy."""
    hidden: np.ndarray  # float32 [n, 2 width], the policy's hidden states at prompt and anchor
    middle: np.ndarray  # float32 [n, 2 width], likewise: means of a middle layer over what was read
    plain: np.ndarray   # float32 [n, 3]: turn index, last search missed, mean log-prob of the turn
    typed: np.ndarray   # float32 [n, 5]: see what_happened
    anchors: tuple      # [n] the nodes, for per-prompt counts and the Monte-Carlo oracle only


def features(anchors):
    hidden, middle, plain, typed = [], [], [], []
    for node in anchors:
        root, logprob = path(node)[0], 0.0
        if node.num_sampled:
            logprob = float(node.logprobs.mean())
        hidden.append(np.concatenate([root.hidden, node.hidden]))
        middle.append(np.concatenate([root.middle, node.middle]))
        plain.append([node.depth, float(node.state.last_missed), logprob])
        typed.append(what_happened(node))
    plain, typed = np.array(plain, np.float32), np.array(typed, np.float32)
    return Features(np.stack(hidden), np.stack(middle), plain, typed, tuple(anchors))


def what_happened(node):
    """Of the last turn, 0 or 1 each: it was a Lookup; with a hit; it opened a new page; nothing new
    came of it. Then the number of pages opened so far."""
    known = [above.state.page for above in path(node)[:-1]]
    if not known:  # a root
        return [0, 0, 0, 0, 0]
    state, before = node.state, node.parent.state
    place = state.keyword, state.lookup_index
    lookup = state.keyword is not None and place != (before.keyword, before.lookup_index)
    opened = state.page not in known
    nothing = not (lookup or opened or state.last_missed)
    num_pages = len({*known, state.page} - {None})
    return [lookup, lookup and state.lookup_index > 0, opened, nothing, num_pages]


class Predictor:
    """What all predictors share."""
    targets = "all"  # key of tree.TARGETS: what it learns from
    state = ()       # names of its attributes that a checkpoint keeps

    def update(self, features, targets, weights):
        return 0.0

    def state_dict(self):
        return {name: getattr(self, name) for name in self.state}

    def load_state_dict(self, saved):
        for name in self.state:
            setattr(self, name, saved[name])


def joined(old, new, memory):
    """[inputs, targets, weights] of the last `memory` anchors, the new ones among them."""
    return [torch.cat(pair)[-memory:] for pair in zip(old, new)] if old else new


class HeadPredictor(Predictor):
    """LayerNorm and one linear layer on all features; MSE as in the paper. It learns from
    the last `memory` anchors together: one step shows it few prompts. (A hidden layer learnt no
    more, and later; without the prompt's own hidden state prefixes were predicted worse.)"""

    def __init__(self, policy, env=None, seed=0, learning_rate=1e-2, passes=16, memory=10000):
        self.network = self.make_network(policy)
        torch.nn.init.zeros_(self.network[-1].weight)  # starts at one half everywhere
        torch.nn.init.zeros_(self.network[-1].bias)
        # a step of Adam moves the output by the rate times the width
        rate = learning_rate * TINY_WIDTH / policy.body.config.hidden_size
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=rate)
        self.passes, self.memory, self.lessons = passes, memory, None

    def make_network(self, policy):
        width = 2 * policy.body.config.hidden_size + 3
        return torch.nn.Sequential(torch.nn.LayerNorm(width), torch.nn.Linear(width, 1))

    def inputs(self, features):
        return torch.tensor(np.concatenate([features.hidden, features.plain], 1))

    def predict(self, features):
        with torch.no_grad():
            probability = torch.sigmoid(self.network(self.inputs(features))[:, 0])
        return np.clip(probability.double().numpy(), CLIP, 1 - CLIP)

    def loss(self, inputs, targets, weights):
        """Weighted mean squared error."""
        probability = torch.sigmoid(self.network(inputs)[:, 0])
        return (weights * (probability - targets) ** 2).sum() / weights.sum()

    def update(self, features, targets, weights):
        """A few full-batch steps of Adam; -> loss on what is new, before them. Where that loss or
        a gradient is not finite it stops, what is new is not remembered, and the loss is NaN."""
        new = [self.inputs(features), torch.tensor(targets).float(), torch.tensor(weights).float()]
        with torch.no_grad():
            before = self.loss(*new).item()
        if not np.isfinite(before):
            return np.nan
        lessons = joined(self.lessons, new, self.memory)
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


class FreshPredictor(HeadPredictor):
    """The head, taught by tree.fresh_targets."""
    targets = "fresh"


class ProbePredictor(Predictor):
    """Beyond the paper: a logistic regression with an L2 penalty on all features, those of a middle
    layer among them. After every step it is fitted to the last `memory` anchors together, from
    where the last fit ended. Of several penalties the one serves whose past predictions were
    best: each is scored on what it had not seen yet. Where two are level, as at the start, the
    first one serves."""
    penalties = 10000.0, 3000.0, 1000.0, 300.0

    def __init__(self, policy=None, env=None, seed=0, memory=10000):
        self.model, self.memory, self.lessons = RidgeLogistic(self.penalties), memory, None
        self.losses = torch.zeros(len(self.penalties)).double()  # cross entropy so far

    def inputs(self, features):
        return torch.tensor(np.concatenate(
            [features.middle, features.hidden, features.plain, features.typed], 1))

    def predict(self, features):
        logits = self.model.logits(self.inputs(features))[:, self.losses.argmin()]
        return np.clip(torch.sigmoid(logits).double().numpy(), CLIP, 1 - CLIP)

    def update(self, features, targets, weights):
        """-> mean cross entropy of what is new, before it is learnt; NaN, and nothing is learnt,
        where that is not finite."""
        new = [self.inputs(features), torch.tensor(targets).float(), torch.tensor(weights).float()]
        losses = self.model.losses(self.model.logits(new[0]), *new[1:])
        if not (losses.isfinite().all() and new[0].isfinite().all()):
            return np.nan
        before = losses[self.losses.argmin()] / new[2].sum()
        self.losses = self.losses + losses
        self.lessons = joined(self.lessons, new, self.memory)
        self.model.fit(*self.lessons)
        return before.item()

    def state_dict(self):
        model = self.model
        return {"model": [model.weights, model.mean, model.spread], "lessons": self.lessons,
                "losses": self.losses}

    def load_state_dict(self, saved):
        self.model.weights, self.model.mean, self.model.spread = saved["model"]
        self.lessons, self.losses = saved["lessons"], saved["losses"]


class OraclePredictor(Predictor):
    """A diagnostic: V by Monte Carlo, from `num` rollouts per anchor, which no budget pays."""
    state = ("calls",)

    def __init__(self, policy, env, seed=0, num=8):
        self.policy, self.env, self.seed, self.num, self.calls = policy, env, seed, num, 0

    def predict(self, features):
        self.calls += 1
        values = monte_carlo_value(self.policy, self.env, features.anchors, self.num,
                                   (self.seed, "oracle", self.calls))
        return np.clip(values, CLIP, 1 - CLIP)


PREDICTORS = {"head": HeadPredictor, "fresh": FreshPredictor, "probe": ProbePredictor,
              "oracle": OraclePredictor}


def monte_carlo_value(policy, env, anchors, num, key):
    """V of each anchor: mean reward of `num` fresh rollouts, which leave its tree untouched."""
    values, size = [], max(1, 1024 // num)  # a few at a time: their caches are large
    for i in range(0, len(anchors), size):
        copies = []
        for j, anchor in enumerate(anchors[i:i + size], start=i):
            copies.append(Node(path_ids(anchor), 0, anchor.state, hidden=anchor.hidden,
                               cache=anchor.cache, sample=num * j))  # all draws differ
        grow(policy, env, copies, [num] * len(copies), key)
        for copy in copies:
            backup(copy)
            values.append(copy.value)
    return np.array(values)


# ---------------------------------------------------------------- in a step
def predict(predictor, anchors):
    """-> Ṽ [n] of the anchors, which is kept on the nodes too; one half where it is not a
    number."""
    if not anchors:
        return np.zeros(0)
    values = np.nan_to_num(predictor.predict(features(anchors)), nan=0.5)
    for node, value in zip(anchors, values):
        node.predicted = float(value)
    return values


class Lessons(NamedTuple):
    """What a step teaches, and how much each of the n anchors counts."""
    anchors: list
    targets: np.ndarray  # [n]
    weights: np.ndarray  # [n] the numbers of leaves behind the targets


def lessons(roots, targets="all"):
    """Lessons of all turns of backed-up trees that the policy was fed, by a rule of TARGETS."""
    anchors, values, weights = [], [], []
    for root in roots:
        for node, (value, num_leaves) in TARGETS[targets](root).items():
            if node.hidden is not None:
                anchors.append(node)
                values.append(value)
                weights.append(num_leaves)
    return Lessons(anchors, np.array(values), np.array(weights, float))


def score_and_update(predictor, roots):
    """Score what was predicted against its targets, which it had not seen; then learn from all
    anchors of the step. -> metrics"""
    learnt = lessons(roots, predictor.targets)
    predicted = np.array([node.predicted for node in learnt.anchors], float)  # None: nan
    known = ~np.isnan(predicted)
    scored = predicted[known], learnt.targets[known], learnt.weights[known]
    loss = predictor.update(features(learnt.anchors), learnt.targets, learnt.weights)
    return {"predictor_brier": brier(*scored), "predictor_auroc": auroc(*scored),
            "predictor_loss": loss, "predictor_skipped": int(not np.isfinite(loss))}


# ---------------------------------------------------------------- scores
def brier(predicted, targets, weights):
    """Mean over leaves of (Ṽ − R)²; targets [n] are means over weights [n] leaves of 0/1
    rewards. Range 0 to 1; always saying one half scores 0.25; None without leaves."""
    predicted, targets, weights = (np.asarray(x, float) for x in (predicted, targets, weights))
    if not weights.sum():
        return None
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
