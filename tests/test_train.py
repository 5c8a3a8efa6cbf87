"""The whole loop, as a user runs it, in small: run folders, arms at equal spend, flags."""
import dataclasses
import json
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import assert_refused, fresh_policy, metrics

from allocator import CAP, PREFIX_RULES, ROOT_RULES, mixed_prob
from engine.command_line import command_of, flag_of
from engine.errors import UsageError
from engine.runs import free_folder, model_card, start_folder
from engine.schedule import Schedule, due_evaluations
from engine.tell import describe_step, mixed_of_8
from predictor import PREDICTORS
from trace_mini import ARMS, HERE, POOL, Config, State, main, parse_config, train_step
from tree import leaves, sampled_tokens
from world.questions import Prompts, load_data


# ---------------------------------------------------------------- a run and its folder
@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "trace"
    assert main(["--out", str(folder), *"--steps 3 --budget 300 --pool-size 12 --checkpoint-every "
                 "1 --eval-questions 0:8,67:8,100:10".split()]) == 0
    return folder


def test_run_folder(finished):
    rows = metrics(finished)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert ["eval_em" in row for row in rows] == [False, True, True]
    scored = [json.loads(line)["num_questions"] for line in open(finished / "evals.jsonl")]
    assert scored == [8, 8, 10]
    assert json.loads((finished / "config.json").read_text())["method"] == "trace-probe"
    assert (finished / "curve.png").stat().st_size > 1000
    predictions = json.loads((finished / "predictions.json").read_text())
    assert set(predictions) == {"answer", "sp", "evidence"} and len(predictions["answer"]) == 10


def test_two_runs_never_share_a_folder(tmp_path):
    """Both may start at the same moment, when there is nothing to see yet."""
    start_folder(tmp_path, {"steps": 40}, fresh=True)
    with pytest.raises(UsageError, match="File exists"):
        start_folder(tmp_path, {"steps": 1}, fresh=True)


@pytest.mark.parametrize("words, name", [
    ("", "trace-probe-toy-s0"), ("--method grpo --seed 4 --show-tree --steps 3", "grpo-toy-s4"),
    ("--learning-rate 1e-3 --no-4bit", "trace-probe-toy-s0-learning-rate-0.001-no-4bit"),
    ("--model a/b --hop-mix 1,2", "trace-probe-toy-s0-model-b-hop-mix-1,2"),
    ("--eval-only", "eval-toy-s0"),
    ("--model " + 300 * "ж", "trace-probe-toy-s0-model-" + 37 * "ж")])
def test_a_folder_is_named_after_what_is_not_at_its_default(words, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no run has taken the name
    assert free_folder(parse_config(words.split())) == Path("runs", name)


def test_a_step_is_told_in_80_columns(quick, monkeypatch):
    [(_, row)] = steps(quick, 1, budget=700)[1]
    row |= {"step": 12345, "sampled_tokens": 10 ** 9, "leaves_per_prompt": 100, "update_skipped": 1}
    lines = describe_step(row).split("\n")
    assert len(lines) == 3 and max(map(len, lines)) <= 80 and "\033" not in lines[1]
    for plain in "", "1":
        monkeypatch.setattr("sys.stdout.isatty", lambda: True)
        monkeypatch.setenv("NO_COLOR", plain)
        assert ("\033" in describe_step(row)) == (not plain)


def test_the_card_of_an_adapter_tells_base_command_and_scores(finished):
    card = (finished / "adapter" / "README.md").read_text()
    assert "LoRA weights for tiny" in card and "python trace_mini.py --method" in card
    assert "held-out exact match" in card and str(HERE) not in card
    known = {"config": {"model": "/a/secret/base"}, "command": "x"}
    assert "for base" in (card := model_card(finished, known)) and "secret" not in card
    command = command_of(parse_config(["--data", str(finished / "config.json")]))
    assert command == "python trace_mini.py --method trace-probe --data config.json"


def test_predicted_and_bare_effective_ratio_are_of_the_same_groups(quick):
    for trees, row in steps(quick, 2, budget=900)[1]:
        groups = [(v, m) for v, m in row["pool"] if m]
        v, m = np.array(groups).T
        assert np.isclose(row["predicted_effective_ratio"], mixed_prob(v, m).mean(), atol=2e-3)
        mixed = [len({leaf.reward for leaf in leaves(root) if leaf.sample < num}) == 2
                 for root, (_, num) in zip(trees, groups)]
        assert row["bare_effective_ratio"] == np.mean(mixed) <= row["effective_ratio"]


def test_a_finished_run(finished, capsys):
    """Resuming says that it is done; scoring again gives the scores after its last step."""
    before = metrics(finished)
    assert main(["--resume", str(finished)]) == 0
    assert "already at its last step" in capsys.readouterr().out
    assert main(["--resume", str(finished), "--eval-only"]) == 0
    assert json.loads((finished / "eval.json").read_text())["em"] == before[-1]["eval_em"]
    assert metrics(finished) == before


# ---------------------------------------------------------------- steps
@pytest.fixture(scope="module")
def quick():
    """A policy that learns nothing, so that tests may share it, and its questions."""
    return fresh_policy(learning_rate=0.0), load_data(Config(eval_questions=4))


def steps(quick, num, **dials):
    """`num` steps of a run -> (state, [(trees, metrics)])."""
    config, (policy, data) = Config(**{"pool_size": 16} | dials), quick
    state = State.begin(config, data, 40.0)
    predictor = PREDICTORS[config.predictor](policy, data.env, config.seed)
    predictor.num = 2  # Monte-Carlo samples, of the oracle: enough to run
    return state, [train_step(config, state, policy, predictor, data) for _ in range(num)]


def num_bare(row):
    return sum(m for _, m in row["pool"])


@pytest.mark.parametrize("method", [
    pytest.param(arm, marks=pytest.mark.long if arm == "oracle" else ()) for arm in ARMS])
def test_every_arm_spends_the_same(method, quick):
    """Cumulative sampled tokens follow one schedule in every arm. The gap at the end is the
    error of the last step's forecast, whatever the number of steps: 0.8 of a step's budget, the
    bound here, is 2 % of a default run. Monte-Carlo samples of the oracle are not counted."""
    state, done = steps(quick, 3, method=method, budget=700)
    spent = 0
    for number, (trees, row) in enumerate(done, 1):
        spent += sum(map(sampled_tokens, trees))
        assert (row["step"], row["method"], row["sampled_tokens"]) == (number, method, spent)
        assert row["leaves"] == sum(len(leaves(root)) for root in trees)
        groups = [m for _, m in row["pool"] if m]
        assert len(groups) == len(trees) and min(groups) >= 2
        assert (row["leaves"] > num_bare(row)) == (ARMS[method].prefix_rule != "none")
        assert np.isfinite(row["grad_norm"]) and 0 <= row["predictor_brier"] <= 1
    assert abs(spent - 3 * 700) < 0.8 * 700
    assert row["coverage"] == len(state.prompts.counts) / len(state.prompts.questions)


@pytest.mark.parametrize("num, wins, want", [(9, 3, 1), (4, 1, 1), (16, 1, 1 / 2), (5, 0, 0)])
def test_the_mix_among_eight_leaves(num, wins, want):
    """Of sixteen leaves with one success, half of all draws of eight hold it."""
    assert mixed_of_8(SimpleNamespace(num_leaves=num, value=wins / num)) == pytest.approx(want)


@pytest.mark.parametrize("dial, name", [
    *product(["root_rule"], ROOT_RULES), *product(["predictor"], PREDICTORS),
    *product(["prefix_rule"], sorted(set(PREFIX_RULES) - {"none"}))])
def test_every_rule_in_another_arm(dial, name, quick):
    """Guards against a rule that is not handed what it needs, or has nothing to choose from."""
    dials = {"prefix_rule": "random", dial: name}
    state, [(_, row)] = steps(quick, 1, method="grpo", budget=200, **dials)
    assert row["leaves"] > num_bare(row) > 0
    if dial == "root_rule":
        assert state.prompts.cursor >= min(16, POOL.get(name, 16) * (num_bare(row) // 3))


def test_a_pool_holds_all_that_the_budget_buys(quick):
    """Guards against arms that fall behind the schedule where the pool is small."""
    state, [(_, row)] = steps(quick, 1, method="root", pool_size=1, budget=1400)
    assert row["leaves"] == 1400 // 40 and state.prompts.cursor == -(-35 // CAP) == 3


# ---------------------------------------------------------------- schedule and prompts
def test_the_learning_rate_rises_and_then_falls_to_nothing(quick, monkeypatch):
    """Linearly: of four steps the first takes half of it, the last a half of what would be left.
    Steps set it."""
    rates, (policy, _) = [], quick
    schedule = Schedule(100, 2)
    for schedule.step in range(4):
        rates.append(schedule.rate(4))
    assert rates == [0.5, 1.0, 1.0, 0.5] and Schedule(100, 2).rate(1) == 0.5
    monkeypatch.setattr(policy, "learning_rate", 1e-30)  # nothing moves
    steps(quick, 1, budget=700, group_size=4, method="grpo", steps=1)
    assert policy.optimizer.param_groups[0]["lr"] == 0.5e-30


@pytest.mark.parametrize("first_guess", [0.2, 1.0, 5.0])
def test_totals_agree_within_2_percent(first_guess):
    """Over 40 steps, for rollouts whose cost drifts to half and which the first guess takes for
    five times cheaper or dearer. A false alarm needs a step that costs 0.8 of a budget too much
    at a standard error of 0.06: beyond 10 of them."""
    rng, schedule = np.random.default_rng(0), Schedule(12000, 2)
    schedule.guess(40 * first_guess)
    for step in range(40):
        num_bare = schedule.num_bare()
        spent = rng.exponential(88 * (1 - step / 80), num_bare).sum()
        schedule.advance(num_bare, int(spent))
    assert schedule.step == 40
    assert abs(schedule.sampled_tokens - 40 * 12000) < 0.02 * 40 * 12000


def test_a_step_without_a_token_is_an_error():
    """Where prompts fill the context, rollouts cost nothing: the budget would buy millions."""
    with pytest.raises(UsageError, match="--context"):
        Schedule(1000, 2).advance(8, 0)


def test_a_pool_never_holds_a_question_twice(data):
    """Also across epochs: two copies would share their random numbers, token for token."""
    prompts, seen = Prompts(data.train[:10], seed=0), set()
    for _ in range(7):
        pool = {question.id for question in prompts.draw(7)}
        assert len(pool) == 7
        seen |= pool
    assert len(seen) == 10 == len(prompts.draw(99))


@pytest.mark.parametrize("steps, due", [
    (40, {0: 500, 10: 100, 20: 100, 30: 100, 40: 500}), (1, {0: 500, 1: 500}), (0, {0: 500})])
def test_when_a_run_evaluates(steps, due):
    """By default. Bug: where two fall on one step, the smaller one counts, and guesses costs."""
    assert due_evaluations(Config().evaluations, steps) == due


# ---------------------------------------------------------------- flags
def test_help_shows_every_dial_in_its_group(capsys):
    with pytest.raises(SystemExit):
        parse_config(["--help"])
    page = capsys.readouterr().out
    starts = [page.index(f"\n{part}:") for part in ("basic", "method", "memory", "evaluation",
                                                   "Examples")]
    assert starts == sorted(starts)
    for dial in dataclasses.fields(Config):
        assert f"\n  {flag_of(dial.name)} " in page, dial.name
    assert "tokens sampled per step [8000]" in page and "{head,fresh,probe,oracle}" in page


def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, finished):
    record = {"_id": "twice", "question": "?", "answer": "b", "type": "bridge", "context": [],
              "supporting_facts": []}
    (tmp_path / "ids.json").write_text(json.dumps([record, record]))
    cases = [("--stepz=3", "did you mean --steps?"), ("--method=trase", "did you mean trace?"),
             ("--group-size=60", "at most 16 bare rollouts"), ("--budget=0", "budget"),
             ("--turn-tokens=5000", "turn-tokens"),
             ("--eval-data=x.json", "eval-data"), ("--eval-questions=50:5,100:5", "eval-questions"),
             ("--eval-questions=0:5,nan:5", "as in 0:500"), ("--eval-questions=0", "a number"),
             (f"--data={tmp_path}/none.json", "none.json"),
             (f"--data={tmp_path}/ids.json", "id twice"), (f"--resume={tmp_path}", "config.json"),
             (f"--model={tmp_path}/nowhere", "nowhere")]
    for flag, word in cases:
        assert_refused(main, [f"--out={tmp_path}/out", flag], word, capsys)
    assert not (tmp_path / "out").exists(), "a run that cannot start leaves no folder"
    assert_refused(main, [f"--out={finished}"], "--resume", capsys)


def test_resume_refuses_what_would_make_another_run(finished, capsys):
    """A dial at the run's own value is none of it: guards people who repeat their command."""
    run = ["--resume", str(finished)]
    for line in ("--seed 1", "--budget 400", "--root-rule pcl", "--no-4bit", "--data x.json",
                 "--eval-only --data x.json", "--eval-only --wiki-seed 5",
                 "--eval-only --out x", "--out x"):
        assert_refused(main, [*run, *line.split()], "--resume", capsys)
    assert_refused(main, [*run, "--context=99"], "only --cache-tokens, --checkpoint-every, "
                   "--eval-only, --micro-batch-tokens, --save-trees, --show-tree, --steps may",
                   capsys)
    more = f"--steps 9 --budget 300 --method trace-probe --cache-tokens 999 --out {finished}"
    config = parse_config([*run, *more.split()])
    assert (config.steps, config.budget, config.cache_tokens) == (9, 300, 999)


def test_a_trained_policy_is_asked_about_another_wiki(finished, tmp_path):
    """Of its own mix of hops; the run's folder stays as it is."""
    out = tmp_path / "scores"
    assert main([f"--resume={finished}", "--eval-only", "--wiki-seed=5", f"--out={out}"]) == 0
    for folder, wiki in ((out, "toy5-"), (finished, "toy0-")):
        predicted = json.loads((folder / "predictions.json").read_text())["answer"]
        assert predicted and all(id.startswith(wiki) for id in predicted)


# ---------------------------------------------------------------- real questions
@pytest.mark.long
@pytest.mark.parametrize("name, other", [
    ("hotpotqa_sample.json", "musique_sample.jsonl"),
    ("2wikimultihopqa_sample.json", "hotpotqa_sample.json"),
    ("musique_sample.jsonl", "2wikimultihopqa_sample.json")])
def test_real_questions(name, other, shared_data, tmp_path):
    """Train on one file, then score the whole of another."""
    run, scores = tmp_path / "run", tmp_path / "scores"
    assert main([f"--data={shared_data}/{name}", f"--out={run}", "--steps=2", "--budget=800",
                 "--eval-questions=8", "--pool-size=8"]) == 0
    assert main([f"--resume={run}", "--eval-only", f"--data={shared_data}/{other}",
                 f"--out={scores}"]) == 0
    assert json.loads((scores / "eval.json").read_text())["num_questions"] == 100
    for folder, file in ((run, name), (scores, other)):
        predictions = "predictions.jsonl" if "musique" in file else "predictions.json"
        assert (folder / predictions).exists()
