"""The measurements: the alternatives compute the same."""
import pytest

from bench import by_paths
from conftest import fresh_policy
from test_policy import expanded, gradient_of
from tree import advantages


def test_path_by_path_is_the_same_update(data, monkeypatch):
    policy = fresh_policy(max_grad_norm=1e9, micro_batch_tokens=1000)
    credits = [advantages(root, "grpo") for root in expanded(policy, data, num=3)]
    gradients, losses = [], []
    monkeypatch.setattr(policy.optimizer, "step", lambda: gradients.append(gradient_of(policy)))
    for parts in ((policy.micro_batches, policy.logprobs), by_paths(policy)):
        policy.micro_batches, policy.logprobs = parts
        losses.append(policy.update([credit for credit in credits if credit])["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[1].norm()
