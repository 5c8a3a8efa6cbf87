"""The whole loop, as a user runs it, shrunk: runs, resume, arms, real files, bad input."""
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import assert_refused, fresh_policy, metrics, timeless

import trace_mini
from allocator import PREFIX_RULES, ROOT_RULES
from engine.runs import State, UsageError, load_checkpoint, start_folder
from predictor import PREDICTORS
from trace_mini import ARMS, POOL, Config, main, train_step
from tree import Node, leaves, sampled_tokens
from world.questions import draw_pool, load_data

SMALL = ["--budget", "400", "--max-turns", "4", "--eval-questions", "10", "--pool-size", "12",
         "--articles", "100", "--checkpoint-every", "1"]
METRICS = {"step", "method", "seed", "sampled_tokens", "leaves", "effective_ratio",
           "predicted_effective_ratio", "reward_mean", "loss", "grad_norm", "predictor_brier",
           "predictor_auroc", "cut_observations", "overflowed_episodes", "time_sample_s",
           "time_predict_s", "time_allocate_s", "time_update_s"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "trace"
    assert main(["--steps", "3", "--out", str(folder), *SMALL]) == 0
    return folder


def test_run_folder(finished):
    rows = metrics(finished)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(METRICS <= set(row) for row in rows)
    assert 0 <= rows[-1]["eval_em"] <= rows[-1]["eval_f1"] <= 1
    assert json.loads((finished / "config.json").read_text())["method"] == "trace"
    assert (finished / "curve.png").stat().st_size > 1000
    predictions = json.loads((finished / "predictions.json").read_text())
    assert set(predictions) == {"answer", "sp", "evidence"} and len(predictions["answer"]) == 10
    assert len(list((finished / "checkpoint").glob("*.pt"))) == 2


def test_adapter_loads_with_peft_alone(finished):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    base = AutoModelForCausalLM.from_pretrained(str(trace_mini.HERE / "world" / "tiny"), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(finished / "adapter"))
    assert any("lora_B" in name and weight.abs().sum() > 0
               for name, weight in model.named_parameters())


@pytest.mark.long
def test_resume_gives_the_numbers_of_an_uninterrupted_run(finished, tmp_path):
    folder = tmp_path / "resumed"
    assert main(["--steps", "1", "--out", str(folder), *SMALL]) == 0
    with open(folder / "metrics.jsonl", "a") as stream:  # a step that no checkpoint knows
        stream.write('{"step": 2, "half": tru')
    assert main(["--resume", str(folder), "--steps", "3"]) == 0
    skip = {"eval_em", "eval_f1"}  # the short run also evaluated after its own last step
    rows = [{k: v for k, v in timeless(row).items() if k not in skip} for row in metrics(folder)]
    assert rows == [{k: v for k, v in timeless(row).items() if k not in skip}
                    for row in metrics(finished)]
    assert metrics(folder)[-1]["eval_em"] == metrics(finished)[-1]["eval_em"]


@pytest.mark.long
def test_show_tree_prints_a_tree_and_changes_nothing_else(finished, tmp_path, capsys):
    folder = tmp_path / "shown"
    assert main(["--steps", "1", "--show-every", "1", "--out", str(folder), *SMALL]) == 0
    plain = capsys.readouterr().out
    assert main(["--steps", "1", "--show-every", "1", "--show-tree", "--out",
                 str(tmp_path / "tree"), *SMALL]) == 0
    shown = capsys.readouterr().out
    assert "(question)" not in plain and "(question)" in shown
    tree = shown[shown.index("(question)"):]
    assert "✓ Finish[" in tree and "✗" in tree, "a tree with contrast"
    skip = {"eval_em", "eval_f1"}
    rows = [{k: v for k, v in timeless(metrics(f)[0]).items() if k not in skip}
            for f in (finished, folder, tmp_path / "tree")]
    assert rows[0] == rows[1] == rows[2]


def test_two_runs_never_share_a_folder(tmp_path):
    start_folder(tmp_path / "run", Config(), fresh=True)
    with pytest.raises(UsageError, match="run: File exists"):
        start_folder(tmp_path / "run", Config(steps=1), fresh=True)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == 40


def test_resuming_a_finished_run_says_so(finished, capsys):
    assert main(["--resume", str(finished)]) == 0
    assert "already at its last step" in capsys.readouterr().out
    assert len(metrics(finished)) == 3


@pytest.fixture(scope="module")
def quick():
    """A policy and questions for short episodes; at learning rate 0 it stays what it is."""
    dials = {"articles": 100, "eval_questions": 4, "pool_size": 16, "budget": 1200, "max_turns": 3,
             "learning_rate": 0.0}
    return SimpleNamespace(dials=dials, policy=fresh_policy(**dials),
                           data=load_data(Config(**dials)))


def steps(quick, num, **dials):
    """`num` steps of a run -> (state, [(trees, metrics)])."""
    config, state = Config(**quick.dials | dials), State()
    state.first_cost(30.0, config.num_continuations)
    predictor = PREDICTORS[config.predictor](quick.policy, quick.data.env, config.seed)
    predictor.num = 2  # Monte-Carlo samples, of the oracle: enough to run
    return state, [train_step(config, state, quick.policy, predictor, quick.data)
                   for _ in range(num)]


@pytest.mark.parametrize("method", [
    pytest.param(arm, marks=pytest.mark.long if arm == "oracle" else ()) for arm in ARMS])
def test_every_arm_spends_the_same(method, quick):
    """Cumulative sampled tokens follow one schedule in every arm. The gap at the end is the
    error of the last step's forecast, whatever the number of steps: 0.8 of a step's budget, the
    bound here, is 2 % of a default run. Monte-Carlo samples of the oracle are not counted."""
    state, done = steps(quick, 3, method=method)
    assert [row["step"] for _, row in done] == [1, 2, 3]
    spent = 0
    for trees, row in done:
        spent += sum(map(sampled_tokens, trees))
        assert row["sampled_tokens"] == spent and row["method"] == method
        assert row["leaves"] == sum(len(leaves(root)) for root in trees)
        sizes = row["group_sizes"]
        assert sum(sizes.values()) == len(trees) and min(sizes) >= 2
        num_bare = sum(size * num for size, num in sizes.items())
        assert (row["leaves"] > num_bare) == (ARMS[method].prefix_rule != "none")
        assert np.isfinite(row["grad_norm"]) and 0 < row["coverage"] <= 1
    assert abs(spent - 3 * 1200) < 0.8 * 1200
    assert done[-1][1]["coverage"] == len(state.visits) / len(quick.data.train)


@pytest.mark.parametrize("first_guess", [0.2, 1.0, 5.0])
def test_totals_agree_within_2_percent(first_guess):
    """The carry-over alone, over 40 steps, for rollouts whose cost drifts to half and which the
    first guess takes for five times cheaper or dearer (cheaper: the first step overspends
    fivefold, and those after it have next to nothing left). A false alarm needs a step that
    costs 0.8 of a budget too much at a standard error of 0.06: beyond 10 of them."""
    rng, state, spent = np.random.default_rng(0), State(), []
    state.first_cost(40 * first_guess, 2)
    for step in range(40):
        num_bare = state.num_bare(12000)
        cost = rng.exponential(88 * (1 - step / 80), num_bare)
        state.advance(num_bare, int(cost.sum()))
        spent.append(int(cost.sum()))
    assert abs(sum(spent) - 40 * 12000) < 0.02 * 40 * 12000
    assert state.step == 40 and state.sampled_tokens == sum(spent) and min(spent) > 0
    assert first_guess != 0.2 or (spent[0] > 3 * 12000 and spent[1] < 0.1 * 12000)


def test_expected_tokens_by_hand():
    """Two bare rollouts of 5 + 7 and 3 + 4 + 2 tokens: 21 / 2 from the root, (7 + 6) / 2 from
    depth 1, 2 from depth 2. A step later one of 10 tokens weighs 1 against 0.9 each."""
    def state(reward=None):
        return SimpleNamespace(done=reward is not None, reward=reward or 0.0,
                               question=SimpleNamespace(id="q"))

    def prompt(*rollouts):
        root = Node(np.zeros(4, np.int32), 0, state())
        for lengths in rollouts:
            node = root
            for i, num in enumerate(lengths):
                node = Node(np.zeros(num, np.int32), num, state(
                    1.0 if i + 1 == len(lengths) else None), node)
        return root

    counts, anchors = State(), [SimpleNamespace(depth=depth) for depth in (0, 1, 2)]
    assert counts.expected_tokens(anchors).tolist() == [1, 1, 1]  # nothing is known: all alike
    counts.count_bare([prompt((5, 7), (3, 4, 2))])
    assert counts.expected_tokens(anchors) == pytest.approx([10.5, 6.5, 2])
    counts.count_bare([prompt((10,))])
    assert counts.expected_tokens(anchors) == pytest.approx([(0.9 * 21 + 10) / 2.8, 6.5, 2])
    assert counts.visits == {"q": (0.9 * 2 + 1, 0.0)}


@pytest.mark.parametrize("stage, rules", [("root_rule", ROOT_RULES), ("prefix_rule", PREFIX_RULES)])
def test_flags_reach_the_allocator(stage, rules, quick, monkeypatch):
    """Every dial of a rule arrives there, with the costs by depth, and what it says is done."""
    seen, own = [], rules["trace"]

    def spy(anchors, budget, rng):
        seen.append(anchors)
        return own(anchors, budget, rng)

    monkeypatch.setitem(rules, "spy", spy)
    dials = {"concentration": 3.0, "floor": 0.25, "cost_aware": True, "cap": 5}
    state, done = steps(quick, 2, method="trace", repeats=True, **{stage: "spy"}, **dials)
    assert len(seen) >= 2
    for anchors in seen:
        assert all(np.all(getattr(anchors, name) == value) for name, value in dials.items())
        assert (anchors.outcome is None) == (stage == "root_rule")
        if stage == "prefix_rule":
            assert anchors.cost.shape == anchors.repeat.shape == anchors.v.shape
            assert (anchors.cost >= 1).all()
            assert (0 < anchors.repeat).all() and (anchors.repeat < 1).all()
    assert max(max(row["group_sizes"]) for _, row in done) <= 5


@pytest.mark.parametrize("rule", ROOT_RULES)
def test_every_rule_in_another_arm(rule, quick):
    """A rule that chooses has candidates to choose from, also in the arm of uniform roots."""
    config = Config(method="grpo", root_rule=rule, prefix_rule="random")
    assert (config.root_rule, config.prefix_rule, config.advantage) == (rule, "random", "grpo")
    assert Config(method="grpo").num_continuations == 0 and config.num_continuations > 0
    state, [(trees, row)] = steps(quick, 1, method="grpo", root_rule=rule, prefix_rule="random")
    num_bare = sum(size * num for size, num in row["group_sizes"].items())
    assert state.cursor >= POOL.get(rule, 0) * (num_bare // 3) and row["leaves"] > num_bare
    assert state.cursor == 16 or rule in POOL


def test_a_pool_holds_all_that_the_budget_buys(quick):
    """Guards against arms that fall behind the schedule: M rollouts need M / cap prompts."""
    _, [(trees, row)] = steps(quick, 1, method="root", pool_size=1, cap=2)
    assert set(row["group_sizes"]) == {2} and row["leaves"] == 2 * len(trees) == 40  # of 1200 / 30


def test_a_step_without_a_token_is_an_error(quick, monkeypatch):
    """Where prompts fill the context, rollouts cost nothing, and the budget would buy millions."""
    monkeypatch.setattr(quick.policy, "context", 45)
    with pytest.raises(UsageError, match="--context"):
        steps(quick, 1)


@pytest.mark.long
@pytest.mark.parametrize("name", PREDICTORS)
def test_every_predictor_in_every_arm(name, quick):
    for method in ARMS:
        _, [(_, row)] = steps(quick, 1, method=method, predictor=name, targets="fresh", budget=150)
        assert 0 <= row["predictor_brier"] <= 1 and row["leaves"] >= 2


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in PREDICTORS if name != "head"])
def test_every_predictor_resumes(name, tmp_path):
    """As test_resume_gives_the_numbers_of_an_uninterrupted_run, which is about the head; with
    the dials that carry counts from step to step."""
    flags = ["--predictor", name, "--budget", "200", "--articles", "100", "--eval-questions", "2",
             "--pool-size", "4", "--max-turns", "3", "--turn-tokens", "12", "--cost-aware",
             "--concentration", "2", "--targets", "fresh"]
    for folder, num in (("whole", "2"), ("parts", "1")):
        assert main(["--steps", num, "--out", str(tmp_path / folder), *flags]) == 0
    assert main(["--resume", str(tmp_path / "parts"), "--steps", "2"]) == 0
    whole, parts = (timeless(metrics(tmp_path / f)[-1]) for f in ("whole", "parts"))
    assert whole == parts and whole["step"] == 2
    whole, parts = (load_checkpoint(tmp_path / f)["state"] for f in ("whole", "parts"))
    carried = ("below", "num_costed", "tokens_costed", "visits", "cursor", "sampled_tokens")
    assert all(whole[key] == parts[key] and whole[key] for key in carried)
    assert json.loads((tmp_path / "parts" / "config.json").read_text())["predictor"] == name


def test_a_pool_never_holds_a_question_twice(data):
    """Also across epochs: two copies would share their random numbers, token for token."""
    few, cursor, seen = data.train[:10], 0, []
    for _ in range(7):
        pool, cursor = draw_pool(few, 7, cursor, seed=0)
        assert len({q.id for q in pool}) == len(pool) == 7
        seen += pool
    assert {q.id for q in seen} == {q.id for q in few}
    assert len(draw_pool(few, 99, 3, seed=0)[0]) == 10


def random_model(folder, hidden_size=64):
    """A small random Qwen2 with the tiny tokenizer, its head padded as large models' are."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
    tokenizer = AutoTokenizer.from_pretrained(str(trace_mini.HERE / "world" / "tiny"))
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer) + 64, hidden_size=hidden_size, intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=4096,
        eos_token_id=0, pad_token_id=0, bos_token_id=0)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.long
@pytest.mark.parametrize("name", ["hotpotqa_sample.json", "2wikimultihopqa_sample.json",
                                  "musique_sample.jsonl"])
def test_real_questions(name, shared_data, tmp_path):
    folder = tmp_path / "run"
    assert main(["--data", str(shared_data / name), "--steps", "2", "--budget", "800",
                 "--out", str(folder), "--eval-questions", "8", "--pool-size", "8"]) == 0
    assert len(metrics(folder)) == 2
    assert (folder / ("predictions.jsonl" if "musique" in name else "predictions.json")).exists()


@pytest.mark.long
def test_another_architecture_on_real_questions(shared_data, tmp_path):
    model = random_model(tmp_path / "model")
    folder = tmp_path / "run"
    assert main(["--model", model, "--data", str(shared_data / "hotpotqa_sample.json"),
                 "--steps", "1", "--budget", "300", "--max-turns", "2", "--turn-tokens", "12",
                 "--eval-questions", "2", "--pool-size", "2", "--out", str(folder)]) == 0
    assert metrics(folder)[0]["leaves"] > 0


@pytest.mark.long
def test_eval_only_scores_the_whole_file(shared_data, tmp_path):
    folder = tmp_path / "run"
    assert main(["--data", str(shared_data / "hotpotqa_sample.json"), "--eval-only",
                 "--out", str(folder)]) == 0
    assert len(json.loads((folder / "predictions.json").read_text())["answer"]) == 100


def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, finished):
    (tmp_path / "shape.json").write_text('[{"foo": 1}]')
    (tmp_path / "empty.json").write_text("")
    record = {"_id": "twice", "question": "?", "answer": "a", "type": "bridge", "context": [],
              "supporting_facts": []}
    (tmp_path / "ids.json").write_text(json.dumps([record, record]))
    model = tmp_path / "model"
    random_model(model)
    for file in model.glob("tokenizer*"):
        os.remove(file)
    cases = [(["--no-such-flag"], "no-such-flag"), (["--steps", "many"], "steps"),
             (["--method", "ppo"], "method"), (["--steps", "-1"], "steps"),
             (["--budget", "0"], "budget"), (["--turn-tokens", "-5"], "turn-tokens"),
             (["--turn-tokens", "5000"], "turn-tokens"),
             (["--eval-questions", "1000000"], "eval-questions"),
             (["--eval-data", "some.json"], "eval-data"),
             (["--advantage", "x"], "advantage"), (["--predictor", "x"], "predictor"),
             (["--root-rule", "x"], "root-rule"), (["--prefix-rule", "x"], "prefix-rule"),
             (["--targets", "some"], "targets"), (["--floor", "1.5"], "floor"),
             (["--concentration", "-1"], "concentration"), (["--floor", "nan"], "floor"),
             (["--concentration", "inf"], "concentration"),
             (["--data", str(tmp_path / "none.json")], "none.json"),
             (["--data", str(tmp_path / "shape.json")], "shape.json"),
             (["--data", str(tmp_path / "empty.json")], "empty.json"),
             (["--data", str(tmp_path / "ids.json")], "id twice"),
             (["--model", str(tmp_path / "nowhere")], "nowhere"),
             (["--model", str(model)], "tokenizer"),
             (["--model", random_model(tmp_path / "odd", hidden_size=96)], "--no-4bit"),
             (["--resume", str(tmp_path)], "config.json"),
             (["--out", str(finished)], "--resume")]
    for arguments, word in cases:
        out = [] if {"--out", "--resume"} & set(arguments) else ["--out", str(tmp_path / "out"),
                                                                 "--articles", "100"]
        assert_refused(main, [*arguments, *out], word, capsys)
    assert not (tmp_path / "out").exists(), "a run that cannot start leaves no folder"
