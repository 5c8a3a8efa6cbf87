"""The tool that measures, with tiny settings; and what it measures against computes the same."""
import json

import numpy as np
import pytest
from conftest import expanded, fresh_policy, gradient_of

from lab import bench
from lab.alternatives import PayingEnv, by_path, by_tree, plain_react
from rollout import grow
from tree import leaves, nodes, sampled_tokens


# ---------------------------------------------------------------- the tool
def test_a_whole_run_goes_to_the_file(tmp_path, monkeypatch):
    """And a ratio above 1 is in our favour: fewer seconds, or more tokens per second."""
    rows = [bench.row_of("", "s", [[1, 2, 4], [4, 4, 4]]),
            bench.row_of("", "tok/s", [[4, 4, 4], [1, 2, 4]])]
    monkeypatch.setattr(bench, "PARTS", {"a": lambda dials: rows})
    monkeypatch.setattr(bench, "HERE", tmp_path)
    (tmp_path / "results").mkdir()
    bench.main(["--model", "tiny"])
    assert json.loads((tmp_path / "results" / "bench.json").read_text()) == rows
    assert [row["ratio"] for row in rows] == [2, 2] and rows[0]["spread"] == [1, 4]


@pytest.mark.long
@pytest.mark.parametrize("part", ["step", "engine", "cards"])
def test_every_part_yields_rows(part, monkeypatch):
    """Once each; `cards` on a model made for it, which any device holds."""
    for name, value in (("POOL", 3), ("CARDS", (0,)), ("NUM_WORDS", 2048),
                        ("SHAPES", {"test": (64, 64, 2, 2, 1)})):
        monkeypatch.setattr(bench, name, value)
    case = bench.Case("tiny", {"budget": 100}, repeats=1, live=(3,), num_batches=1)
    rows = list(getattr(bench, part)(case))
    assert rows and all(row["ours"] > 0 for row in rows if "time_" not in row["name"])


# ---------------------------------------------------------------- the alternatives
def test_every_second_episode_is_paid(data):
    """Bug: SmolLM2 earned nothing, so our step had nothing to train, and TRL's had."""
    env, rewards = PayingEnv(data.env.wiki, 2), []
    for question in data.train[:4]:
        first = env.step(env.reset(question), "Search[x]")
        rewards += [first.reward, env.step(first, "Finish[x]").reward]
    assert rewards == [0, 1, 0, 0, 0, 1, 0, 0]


@pytest.mark.long
def test_plain_react_plays_the_same_game(data):
    """Mean reward and tokens of 60 episodes: each within five standard errors of the engine's
    (false alarm about 1e-6)."""
    policy, found = fresh_policy(), []
    for play in (grow, plain_react):
        roots = [policy.root(question, data.env) for question in data.train[:60]]
        play(policy, data.env, roots, [1] * 60)
        found.append([(leaves(root)[0].reward, sampled_tokens(root)) for root in roots])
    (ours, theirs), errors = np.mean(found, 1), np.std(found, 1) / 60 ** 0.5
    assert (abs(ours - theirs) < 5 * np.hypot(*errors)).all()


@pytest.mark.parametrize("split", [by_path, by_tree])
def test_apart_is_the_same_update(split, data, monkeypatch):
    policy, found = fresh_policy(), []
    [tree] = expanded(policy, data, num=1)
    monkeypatch.setattr(policy.optimizer, "step", lambda: found.append(gradient_of(policy)))
    policy.update([dict.fromkeys(nodes(tree), 1.0)])
    policy.update(list(split([tree])))
    together, alone = found
    assert (together - alone).norm() < 1e-4 * alone.norm()
