"""Every part of the measurements, with tiny settings; and the alternatives compute the same."""
import json

import numpy as np
import pytest
from conftest import fresh_policy
from test_policy import expanded, gradient_of

from allocator import allocate_roots, expand_prefixes, flip_prob, mixed_prob
from lab import bench
from lab.alternatives import by_paths, plain_prefixes, plain_react, plain_roots
from rollout import grow
from tree import advantages, sampled_tokens


@pytest.fixture(scope="module")
def still():
    return fresh_policy(learning_rate=0.0)


SMALL = {  # part: (its rows with tiny settings, how many they are)
    "environment": (lambda *_: bench.environment(200), 7),
    "allocation": (lambda *_: bench.allocation(40, 500), 2),
    "engine": (lambda *shared: bench.engine(*shared, (3, 4), 2), 7),
    "limit": (lambda *shared: bench.limit(*shared, 4, 64), 2),
    "growth": (lambda *shared: bench.growth(*shared, {"budget": (100, 200)}), 1 + 3),
    "step": (lambda *_: bench.whole_step(2, budget=100, articles=100, pool_size=4), 2)}


@pytest.mark.parametrize("part", [pytest.param(part, marks=pytest.mark.long if part in (
    "engine", "growth", "step") else ()) for part in bench.PARTS])
def test_every_part_yields_rows(part, still, data, monkeypatch):
    """One repeat each. Rates and times are positive, a ratio lies within its spread."""
    monkeypatch.setattr(bench, "REPEATS", 1)
    make, num = SMALL[part]
    rows = list(make(still, data))
    assert len(rows) == num
    for row in rows:
        assert list(row) == ["name", "ours", "other", "unit", "ratio", "spread"]
        assert row["ours"] > 0 and (row["other"] is None or row["other"] > 0)
        if row["ratio"]:
            assert row["spread"][0] <= row["ratio"] <= row["spread"][1]
        assert (row["ratio"] is None) == (row["spread"] is None) == (row["other"] is None)
    json.dumps(rows)


def test_a_ratio_above_1_is_in_our_favour():
    for unit, ours, other in (("s", [1, 2, 4], [4, 4, 4]), ("tok/s", [4, 4, 4], [1, 2, 4])):
        row = bench.row_of("", unit, ours, other)
        assert (row["ratio"], row["spread"]) == (2, [1, 4])


def test_one_part_needs_a_file_of_its_own(tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        bench.main(["--only", "allocation"])
    assert "--out" in capsys.readouterr().err
    monkeypatch.setattr(bench, "REPEATS", 1)
    bench.main(["--only", "environment", "--articles", "200", "--out", str(tmp_path / "a" / "b")])
    assert len(json.loads((tmp_path / "a" / "b").read_text())) == 7


def test_plain_solvers_find_the_same_optimum():
    rng = np.random.default_rng(0)
    v, r = rng.random(12), rng.integers(2, size=12)
    m = allocate_roots(v, 30, 5)
    assert plain_roots(v, 30, 5) == pytest.approx(mixed_prob(v, m).sum())
    k = plain_prefixes(flip_prob(v, r, 1).tolist(), 20)
    assert sum(k) == 20
    assert flip_prob(v, r, np.array(k)).sum() == pytest.approx(
        flip_prob(v, r, expand_prefixes(v, r, 20)).sum())


@pytest.mark.long
def test_plain_react_plays_the_same_game(still, data):
    """Mean reward and tokens of 60 episodes: each within five standard errors of the engine's
    (false alarm about 1e-6), and the model is left as it was."""
    questions = data.train[:60]
    theirs = plain_react(still, data.env, questions)
    roots = [still.root(question, data.env) for question in questions]
    leaves = grow(still, data.env, roots, [1] * 60, (0, 0))
    for a, b in (([reward for _, _, reward in theirs], [leaf.reward for leaf in leaves]),
                 ([sum(mask) for _, mask, _ in theirs], list(map(sampled_tokens, roots)))):
        assert abs(np.mean(a) - np.mean(b)) < 5 * np.hypot(np.std(a), np.std(b)) / 60 ** 0.5
    for root, (ids, mask, _) in zip(roots, theirs):
        assert ids[:len(root.ids)] == root.ids.tolist() and len(ids) == len(mask)
        assert mask.index(1) == len(root.ids)
    again = grow(still, data.env, roots[:1], [1], (0, 0))
    assert still.plain and len(again) == 1


@pytest.mark.long
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
