"""Logistic regression with an L2 penalty, for several penalties at once.

n rows, F inputs, P penalties. A target is a share of successes from 0 to 1; its weight is the
number of outcomes behind it.
"""
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, pad

FIT_STEPS = 30  # of L-BFGS, per fit; it begins where the last one ended


class RidgeLogistic:
    """weights [P, F + 1], the last one the offset, of inputs that are standardised by what was
    fitted; None before that. penalties [P, 1], on the squared weights."""

    def __init__(self, penalties):
        self.penalties = torch.tensor(penalties).double()[:, None]
        self.weights, self.mean, self.spread = None, 0.0, 1.0

    def standardised(self, inputs):
        """[n, F] -> [n, F + 1], the last column is 1."""
        return pad((inputs.double() - self.mean) / self.spread, (0, 1), value=1.0)

    def logits(self, inputs):
        """[n, F] -> [n, P]; all 0 before the first fit."""
        if self.weights is None:
            return torch.zeros(len(inputs), len(self.penalties)).double()
        return self.standardised(inputs) @ self.weights.T

    def losses(self, logits, targets, weights):
        """Cross entropy [P] of logits [n, P], summed over outcomes."""
        targets = targets.double()[:, None].expand_as(logits)
        losses = binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return weights.double() @ losses

    def fit(self, inputs, targets, weights):
        """One problem for all: their losses share no weight."""
        inputs = inputs.double()
        self.mean, self.spread = inputs.mean(0), inputs.std(0, correction=0) + 1e-6
        standard = self.standardised(inputs)
        if self.weights is None:
            self.weights = torch.zeros(len(self.penalties), standard.shape[1]).double()
        parameters = self.weights.requires_grad_()
        optimizer = torch.optim.LBFGS([parameters], max_iter=FIT_STEPS,
                                      line_search_fn="strong_wolfe")

        def loss():
            optimizer.zero_grad()
            total = self.losses(standard @ parameters.T, targets, weights).sum()
            total = total + (self.penalties * parameters[:, :-1] ** 2).sum() / 2
            total.backward()
            return total
        optimizer.step(loss)
        self.weights = parameters.detach()
