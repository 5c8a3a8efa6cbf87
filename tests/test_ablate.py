"""Arms x seeds: plans, hashes, rows, tables; a grid as a user runs it, failed, killed, resumed."""
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_refused, metrics

from engine.command_line import dial
from engine.errors import UsageError
from lab import ablate
from lab.ablate import HOW, PRESETS, Run, made_with, main, plan, run_all
from lab.pictures import draw_differences
from lab.stats import interval, sign_flip, summary
from lab.tables import (
    area,
    by_run,
    differences,
    end,
    finished,
    read_rows,
    table,
    write_rows,
)
from trace_mini import HERE, Config
from world.questions import load_data

PAGE, PROTOCOL = ((HERE / "results" / name).read_text() for name in ("README.md", "PROTOCOL.md"))
SMALL = ("--steps 2 --budget 400 --eval-questions 0:5,50:5,100:8 "
         "--checkpoint-every 1 --pool-size 8")


# ---------------------------------------------------------------- plans and hashes
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_plan_of_distinct_runs(preset):
    """Its flags are flags of trace_mini.py, and no two runs share their numbers."""
    runs = plan(preset)
    assert {run.arm for run in runs} == set(PRESETS[preset])
    assert len({(run.made_with, run.seed) for run in runs}) == len(runs)


def test_development_shares_neither_seeds_nor_questions_with_what_is_reported():
    dev, reported = plan("quick", dev=True), plan("quick")
    assert not {run.seed for run in dev} & {run.seed for run in reported}
    ours, theirs = load_data(reported[0].config), load_data(dev[0].config)
    assert not {q.id for q in ours.eval} & {q.id for q in theirs.eval + theirs.train}


@pytest.mark.parametrize("preset", ["tuning", "longer"])
def test_presets_of_development_take_its_seeds_and_wiki_and_folder(preset, monkeypatch):
    seen = []

    def gather(runs, file):
        assert file == HERE / "results" / "development" / f"{preset}.csv"
        seen.extend(runs)
        return {}
    monkeypatch.setattr(ablate, "gather", gather)
    main(["--preset", preset, "--table"])
    assert {run.seed for run in seen} == {1000, 1001, 1002, 1003}
    assert {run.config.wiki_seed for run in seen} == {1000}


def test_hash_knows_dials_weights_and_world_and_nothing_else(tmp_path):
    base = made_with(Config())
    assert base == made_with(Config(seed=3, out="x", show_tree=True, checkpoint_every=1))
    assert base == made_with(Config(method="trace-probe", root_rule="trace")), "two spellings"
    assert base == made_with(Config(method="trace", predictor="probe", pool_size=96)) != made_with(
        Config(method="trace"))
    assert HOW <= vars(Config()).keys()
    shutil.copytree(HERE / "world" / "tiny", tmp_path / "model")
    copy = Config(model=str(tmp_path / "model"))
    hashes = {base, made_with(Config(learning_rate=1e-3)), made_with(Config(method="grpo")),
              made_with(Config(wiki_seed=1)), made_with(copy)}
    with open(tmp_path / "model" / "model.safetensors", "ab") as stream:
        stream.write(b" ")
    ablate.weights_and_world.cache_clear()
    assert len({*hashes, made_with(copy), made_with(Config(model="some/model"))}) == 7


def test_a_new_dial_that_is_off_leaves_hashes_whole():
    @dataclass
    class Wider(Config):
        another: float = dial(0.5, "method", "is new")
    assert made_with(Wider()) == made_with(Config()) != made_with(Wider(another=1.0))


# ---------------------------------------------------------------- statistics and tables
@pytest.mark.parametrize("n, t", [(2, 12.7062), (3, 4.30265), (1001, 1.96234)])
def test_interval_is_that_of_the_printed_tables(n, t):
    values = np.arange(n)
    _, half = interval(values)
    assert half == pytest.approx(t * values.std(ddof=1) / n ** 0.5, rel=1e-5)
    assert np.isnan(interval([1.0])[1])


def test_area_is_the_mean_over_tokens():
    rows = [{"sampled_tokens": x, "em_first": y} for x, y in ((0, 0.2), (5, 0.2), (20, 0.8))]
    assert area(rows) == pytest.approx((5 * 0.2 + 15 * 0.5) / 20)
    assert np.isnan(area(rows[:1]))


def rows_of(run, score, leaves_per_prompt=8.0):
    """Rows of a run that went from 0.2 to `score` exact match."""
    row = {"arm": run.arm, "seed": run.seed, "step": 0, "sampled_tokens": 0, "eval_em": 0.2,
           "em_first": 0.2, "num_questions": 100, "effective_ratio": 0.5, "minutes": 0,
           "leaves_per_prompt": leaves_per_prompt, "hardware": "an abacus, 1e3",
           "made_with": run.made_with, "em 1 hops": 0.2}
    steps = run.config.steps
    return [row, row | {"step": steps, "sampled_tokens": 1000, "eval_em": score, "em_first": score,
                        "em 1 hops": score, "num_questions": 200, "minutes": 2.0}]


ENDS = {"grpo": (0.30, 0.40, 0.50), "trace": (0.36, 0.42, 0.54), "pcl": (), "grpo@2": (0.8, 0.9),
        "trace@2": (0.8, 0.8, 0.95)}
RUNS = [Run(arm, seed, "", [], Config(), arm, Path()) for seed in range(3) for arm in ENDS]


@pytest.fixture
def done():
    rows = []
    for run in RUNS:
        for score in ENDS[run.arm][run.seed:run.seed + 1]:
            rows += rows_of(run, score, 9.0 if run.arm == "trace" else 8.0)
    return finished(RUNS, rows)


def test_table_pairs_each_arm_with_the_first_one_of_its_world(done):
    """Differences of trace: 6, 2 and 4 points, mean 4, standard deviation 2; half of that in
    area. Its mean curve climbs 24 points where GRPO's climbs 20. It has more leaves per prompt,
    so Effective Ratios are not compared. Over the shared seeds trace@2 is 5 points below grpo@2;
    unpaired, the means would differ by nothing."""
    assert table(done, [(run.arm, run.seed) for run in RUNS]).split("\n")[2:] == [
        "| grpo | 3 | 40.0 ± 24.8 | 30.0 ± 12.4 | – | – | 100 % | 0.50 | 2.0 |",
        "| trace | 3 | 44.0 ± 22.8 | 32.0 ± 11.4 | +4.0 ± 5.0 | +2.0 ± 2.5 | 83 % | – | 2.0 |",
        "| pcl | not run (0 of 3) | – | – | – | – | – | – | – |",
        "| grpo@2 | 2 of 3 | 85.0 ± 63.5 | 52.5 ± 31.8 | – | – | 100 % | 0.50 | 2.0 |",
        "| trace@2 | 3 | 85.0 ± 21.5 | 52.5 ± 10.8 | -5.0 ± 63.5 | -2.5 ± 31.8 | never | 0.50 "
        "| 2.0 |"]


def test_the_differences_of_a_folder_and_their_picture(tmp_path, monkeypatch, capsys):
    """Drawn are the lines above the first empty one that are of one setting."""
    gains = []
    monkeypatch.setattr(ablate, "draw_differences", lambda found: (
        gains.append(found), draw_differences(found))[1])
    write_rows(tmp_path / "a.csv", rows_of(RUNS[0], 0.3))
    write_rows(tmp_path / "b.csv", rows_of(RUNS[1], 0.4))
    (tmp_path / "contrasts.txt").write_text("""\
9 | eval_em | 1 trace -1 grpo | drawn
9 | eval_em | 1 trace -1 grpo ; 1 trace -1 grpo | two settings

9 | eval_em | 1 grpo -1 trace | printed
""")
    assert main(["--differences", str(tmp_path), "--draw"]) == 0
    assert [list(found) for found in gains] == [["drawn"]]
    assert gains[0]["drawn"] == pytest.approx([10]) and (tmp_path / "differences.png").exists()
    assert "| printed | 1 | -10.0 |" in capsys.readouterr().out


def test_every_seed_is_a_dot_and_one_that_broke_down_an_arrow():
    """It is shown, and flattens nothing; the mean has it in."""
    axes = draw_differences({"a": [1.0, 2.0, -60.0], "b": [3.0], "not run": []}).axes[0]
    marks = [line.get_marker() for line in axes.lines]
    assert (marks.count("."), marks.count("<"), marks.count("o")) == (3, 1, 2)
    assert axes.get_xlim()[0] > -20
    assert [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"] == [-19, 3]


def test_the_end_is_the_mean_of_the_last_large_evaluations():
    """Not of one where a run had ended before it went on to more steps."""
    rows = [{"step": step, "eval_em": y, "num_questions": n} for step, y, n in (
        (0, 0.1, 1000), (40, 0.2, 1000), (50, 0.1, 250), (55, 0.5, 1000), (60, 0.7, 1000))]
    assert end(rows) == pytest.approx(0.6)


def test_differences_by_hand(done):
    """Over the seeds that all arms of a line share, at most as many as it says; and the mean over
    settings, of differences (6, 2, 4) and (0, -10) points: (4 - 5) / 2. Of the 2^5 ways to choose
    the signs, those whose |mean of means| is at least that."""
    lines = differences(done, """\
9 | eval_em | 1 trace -1 grpo | a
2 | em 1 hops | 1 trace -1 grpo | b
9 | eval_em | .5 trace .5 grpo -.5 grpo@2 -.5 trace@2 | c
9 | eval_em | 1 trace -1 grpo ; 1 trace@2 -1 grpo@2 | d

9 | eval_em | 1 treepo -1 grpo | e""").split("\n")[2:]
    with pytest.raises(UsageError, match="not seeds"):
        differences(done, "9 | eval_em")
    assert lines[0] == "| a | 3 | +4.0 ± 5.0 | 0.250 | +2.0 ± 2.5 |"
    assert lines[1] == "| b | 2 | +4.0 ± 25.4 | – | – |"
    assert lines[2].startswith("| c | 2 | -45.5 ± 19.1 |")  # t = 12.706
    sums = [sum(a) / 3 + sum(b) / 2 for a in product((6, -6), (2, -2), (4, -4))
            for b in product((0, 0), (10, -10))]
    p = np.mean(np.abs(sums) >= 1 - 1e-9)
    assert lines[3].startswith("| d | 5 | -0.5 ±") and f"| {p:.3f} |" in lines[3]
    assert lines[4] == "| e | 0 | – | – | – |"


def test_sign_flips_are_counted_exactly():
    """Against all 2^9 ways, with ties and a zero among the values."""
    values = np.array([12, -3, 7, 7, 0, 20, -9, 1, 7]) / 3000
    ways = [np.dot(signs, values) for signs in product((1, -1), repeat=9)]
    want = np.mean(np.abs(ways) >= abs(values.sum()) - 1e-9)
    assert sign_flip([values]) == pytest.approx(want)
    assert sign_flip([values, values]) < want and sign_flip([values, -values]) == 1


def test_the_summary_of_settings_covers_the_truth():
    """One group: the plain interval. Three of unequal spread: 95 % of 2,000 intervals hold the
    true mean, to four standard errors."""
    rng = np.random.default_rng(0)
    assert summary([[1.0, 2.0, 4.0]]) == pytest.approx(interval([1.0, 2.0, 4.0]))
    hits = 0
    for _ in range(2000):
        mean, half = summary([rng.normal(0, spread, n) for spread, n in ((1, 8), (3, 5), (2, 8))])
        hits += abs(mean) < half
    assert abs(hits / 2000 - 0.95) < 4 * (0.95 * 0.05 / 2000) ** 0.5


def test_rows_survive_the_file_and_half_a_run_does_not_count(tmp_path):
    rows = rows_of(RUNS[0], 1 / 3)
    write_rows(tmp_path / "x.csv", [*rows, {"arm": "mine", "made_with": "1e5", "new": None}])
    assert read_rows(tmp_path / "x.csv") == [*rows, {"arm": "mine", "made_with": "1e5"}]
    assert finished(RUNS, rows) == {("grpo", 0): rows} and not finished(RUNS, rows[:1])
    assert read_rows(tmp_path / "none.csv") == []


# ---------------------------------------------------------------- calls that run nothing
@pytest.fixture
def folders(tmp_path, monkeypatch):
    """results/ and runs/ of this test's own."""
    monkeypatch.setattr(ablate, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(ablate, "RUNS", tmp_path / "runs")
    (tmp_path / "results").mkdir()
    return tmp_path


def test_finished_rows_are_not_run_again_and_stale_ones_left_out(folders, monkeypatch, capsys):
    """Some stand in the file of another preset, under another name."""
    monkeypatch.setattr(ablate, "run_one", lambda *_: pytest.fail("a finished run was started"))
    first, *others = plan("quick")
    rows = []
    for run in others:
        rows += rows_of(run, 0.3)
    write_rows(folders / "results" / "main.csv", rows_of(first._replace(arm="as before"), 0.3))
    (folders / "runs").mkdir()
    write_rows(folders / "runs" / "quick.csv", rows)
    assert main([]) == 0 and "not run" not in capsys.readouterr().out
    assert (folders / "runs" / "quick.png").exists()
    write_rows(folders / "runs" / "quick.csv", [row | {"made_with": "old"} for row in rows])
    assert main(["--table"]) == 0
    assert "| grpo | 1 of 2 |" in (printed := capsys.readouterr().out)
    assert "| trace | not run (0 of 2) |" in printed


@pytest.mark.parametrize("arguments, word", [
    (["--arms", "grpo,ppo"], "ppo"), (["--flags=--budjet 3"], "budjet"),
    (["--rows", "/nowhere.csv"], "no rows there"),
    (["--rows", str(HERE / "results" / "predictor.csv")], "no rows there"),
    (["--draw"], "--differences")])
def test_bad_input_is_one_line_and_exit_code_2(folders, capsys, arguments, word):
    assert_refused(main, arguments, word, capsys)
    assert not (folders / "runs").exists()


def test_two_calls_do_not_work_in_one_folder(folders, monkeypatch, capsys):
    monkeypatch.setattr(ablate, "run_one", lambda *_: 0)
    first = run_all(plan("quick"), 1)
    next(first)
    assert_refused(main, ["--flags=--steps 1"], "another lab.ablate", capsys)
    first.close()
    assert len(list(run_all(plan("quick"), 1))) == 4


# ---------------------------------------------------------------- a grid, as a user runs it
@pytest.mark.long
def test_a_grid_of_an_arm_that_works_one_that_cannot_and_a_transfer(folders, monkeypatch):
    """Rows are those of the run's folder; the policy trained there is scored elsewhere."""
    monkeypatch.setitem(PRESETS, "quick", {
        "bad": (1, "--method grpo --context 41 --turn-tokens 41"), "trace": (1, "--method trace")})
    monkeypatch.setitem(PRESETS, "transfer", {
        "trace@wiki": (1, "--method trace"), "trace@hops": (1, "--method trace")})
    assert main(["--jobs", "1", "--flags", SMALL]) == 1
    bad, run = plan("quick", SMALL)
    assert "room for a turn" in Path(f"{bad.folder}.log").read_text()
    rows, steps = read_rows(folders / "runs" / "quick-tried.csv"), metrics(run.folder)
    assert [(row["arm"], row["step"]) for row in rows] == [("trace", 0), ("trace", 1), ("trace", 2)]
    assert [row["num_questions"] for row in rows] == [5, 5, 8]
    assert rows[2]["eval_em"] == steps[1]["eval_em"]
    assert main(["--preset", "transfer", "--flags", SMALL]) == 0
    rows = read_rows(folders / "runs" / "transfer-tried.csv")
    assert [(row["arm"], row["step"]) for row in rows] == [("trace@wiki", 2), ("trace@hops", 2)]
    hops = {name for name in rows[1] if "hops" in name}
    assert hops and hops <= {"em 5 hops", "em 6 hops"}
    assert not any((folders / "results").iterdir()), "a trial leaves nothing there"
    assert not (folders / "runs" / "quick.csv").exists(), "nor among the rows of the lesson"


@pytest.mark.long
def test_a_killed_grid_stops_its_runs_and_goes_on_from_their_checkpoints(folders):
    """Ctrl-C in a terminal: exit code 130, nothing left running (the lock is free), and the next
    call ends the run with every step once."""
    code = ("import sys, pathlib; from lab import ablate; ablate.RUNS = pathlib.Path(sys.argv[1]); "
            "ablate.PRESETS['quick'] = {'grpo': (1, '--method grpo')}; "
            "sys.exit(ablate.main(['--flags', sys.argv[2]]))")
    flags = f"{SMALL} --steps 15 --eval-questions 5"
    command = [sys.executable, "-c", code, folders / "runs", flags]
    process = subprocess.Popen(command, cwd=HERE, start_new_session=True)
    deadline = time.time() + 120
    while not list(folders.glob("runs/*/checkpoint/step-000002.pt")):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130 and list(run_all([], 1)) == []
    (folder,) = folders.glob("runs/grpo-*/")
    assert 2 <= len(metrics(folder)) < 15
    assert subprocess.run(command, cwd=HERE, check=False).returncode == 0
    assert [row["step"] for row in metrics(folder)] == list(range(1, 16))


# ---------------------------------------------------------------- the evidence
@pytest.fixture(scope="module")
def mean_end():
    """arm -> mean of its four development seeds at the primary endpoint, in percent"""
    rows = []
    for file in (HERE / "results" / "development").glob("*.csv"):
        rows += read_rows(file)
    done = by_run(rows)
    return lambda arm: 100 * np.mean([end(done[arm, seed]) for seed in range(1000, 1004)])


@pytest.mark.parametrize("arm, other", [("grpo", "group4"), ("treepo", "group6"),
                                        ("trace", "pool96"), ("pcl", "group4")])
def test_the_table_of_the_tuning_is_that_of_its_rows(arm, other, mean_end):
    """Four rates, then the other size; the best is bold."""
    (line,) = re.findall(rf"^\| {arm}\b.*: .*$", PROTOCOL, re.MULTILINE)
    means = [mean_end(f"{arm}-{what}") for what in ("1.2e-3", "1.8e-3", "2.7e-3", "4e-3", other)]
    assert re.findall(r"\d+\.\d", line) == [f"{x:.1f}" for x in means]
    assert re.findall(r"\*\*(.*)\*\*", line) == [f"{max(means):.1f}"]


def test_the_table_of_forms_is_that_of_their_rows(mean_end):
    """Means of four seeds in each mix, and of both; two of the rows have the tuning's names."""
    page = PROTOCOL.split("all eight |\n")[1]
    lines = re.findall(r"^\| (\w+) \| (.*\d) \| (.*\d) \| (.*\d.*) \|$", page, re.MULTILINE)
    assert len(lines) == 11
    for form, *texts in lines:
        name = {"grpo": "grpo-2.7e-3", "faithful": "trace-2.7e-3"}.get(form, form)
        means = [mean_end(name), mean_end(f"{form}@hard")]
        assert [f"{x:.1f}" for x in (*means, np.mean(means))] == [
            text.strip("*") for text in texts], form


@pytest.mark.parametrize("arguments", re.findall("<!-- lab.ablate (.*) -->", PAGE))
def test_every_number_of_the_evidence_is_that_of_its_file(arguments, capsys, monkeypatch):
    monkeypatch.chdir(HERE)
    block = PAGE.split(f"<!-- lab.ablate {arguments} -->")[1].split("<!-- /")[0]
    assert main(arguments.split()) == 0
    assert "".join(block.split()) == "".join(capsys.readouterr().out.split())
