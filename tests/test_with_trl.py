"""The bridge to TRL: its rows, and its gradient against ours on the same trees."""
import numpy as np
import pytest
import torch
from conftest import assert_refused, fresh_policy

from lab import with_trl
from lab.with_trl import Rows, main, make_trainer, rows_of
from trace_mini import parse_config
from tree import advantages, nodes, path_ids
from world.example import example_tree
from world.questions import load_data


def test_rows_by_hand():
    """A row per turn below the root; the first empty one brings the sum of all credit to zero."""
    root = example_tree()
    for node in nodes(root)[1:]:
        node.logprobs = np.full(node.num_sampled, -0.5, np.float32)
    credit = advantages(root, "grpo")
    rows = rows_of([{}, credit], 20)
    assert {len(row) for row in rows.values()} == {20}
    assert rows["credit"][:len(credit)] == list(credit.values())
    assert sum(rows["credit"]) == pytest.approx(0) and rows["credit"][-1] == 0
    for i, node in enumerate(credit):
        assert rows["prompt_ids"][i] + rows["completion_ids"][i] == path_ids(node)[
            :node.length - len(node.ids) + node.num_sampled].tolist()
    assert sum(map(sum, rows["env_mask"])) == sum(node.num_sampled for node in credit)


def test_rows_hold_what_a_step_may_need():
    assert Rows(128, 2).num_bare() == 5  # 5 (8 + 2 x 7) = 110, and an empty one
    with pytest.raises(ValueError, match="too few"):
        Rows(40, 2).num_bare()


@pytest.mark.long
@pytest.mark.parametrize("four_bit", [True, False])
def test_its_gradient_is_ours(four_bit, monkeypatch, tmp_path):
    """On the trees of one step, before any clipping: TRL computes them row by row."""
    pytest.importorskip("trl")
    config = parse_config(["--steps", "1", "--seed", "1", "--eval-questions", "4"])
    policy, data, kept = fresh_policy(four_bit), load_data(config), {}
    trainer = make_trainer(config, policy, data, 128, max_grad_norm=0.0, output_dir=str(tmp_path),
                           learning_rate=0.0)
    monkeypatch.setattr(with_trl, "rows_of", lambda credits, num: kept.update(
        credits=credits) or rows_of(credits, num))
    from transformers import TrainerCallback

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kwargs):
            kept["theirs"] = [weight.grad.clone() for weight in policy.trained]
    trainer.add_callback(Look)
    trainer.train()
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda weights, most: kept.update(
        ours=[w.grad.clone() for w in weights]) or torch.tensor(1.0))
    policy.update(kept["credits"], 0.0)
    for theirs, ours in zip(kept["theirs"], kept["ours"], strict=True):
        assert (theirs - ours).norm() <= 1e-4 * ours.norm() + 1e-8


def test_too_few_rows_say_so(capsys):
    assert_refused(main, ["--rows", "16", "--eval-questions", "2"], "--rows", capsys)
