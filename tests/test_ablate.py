"""Arms x seeds: plans, hashes, rows, tables; a grid as a user runs it, failed, killed, resumed."""
import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import assert_refused

from lab import ablate
from lab.ablate import PRESETS, Run, lock_folders, made_with, main, num_steps, plan, score_transfer
from lab.tables import (
    area,
    differences,
    finished,
    interval,
    last,
    percent,
    read_rows,
    report,
    table,
    token_share,
    write_rows,
)
from trace_mini import HERE, Config
from world.questions import load_data

SMALL = ("--steps 2 --budget 400 --eval-every 1 --eval-questions 5 --final-eval-questions 8 "
         "--articles 150 --checkpoint-every 1 --pool-size 8")
COLUMNS = {"arm", "seed", "step", "sampled_tokens", "leaves", "eval_em", "eval_f1",
           "effective_ratio", "minutes", "hardware", "made_with"}


# ---------------------------------------------------------------- plans and hashes
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_plan_of_distinct_runs(preset):
    """Its flags are flags of trace_mini.py (else exit code 2); no two runs share their numbers."""
    dev = preset == "tuning"
    runs = plan(preset, dev=dev)
    assert {run.arm for run in runs} == set(PRESETS[preset])
    assert len({(run.arm, run.seed) for run in runs}) == len(runs)
    assert len({(run.folder, run.where) for run in runs}) == len(runs)
    able = [run for run in runs if run.made_with]
    assert len({(run.made_with, run.seed) for run in able}) == len(able)
    assert all((run.seed >= 1000) == dev for run in runs)
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)


def test_development_shares_neither_seeds_nor_questions_with_what_is_reported():
    dev, reported = plan("quick", dev=True), plan("quick")
    assert not {run.seed for run in dev} & {run.seed for run in reported}
    wiki = {flags[flags.index("--wiki-seed") + 1] for flags in (run.flags for run in dev)}
    assert wiki == {"1000"} and not any("--wiki-seed" in run.flags for run in reported)
    ours, theirs = (load_data(Config(articles=150, wiki_seed=seed, eval_questions=50))
                    for seed in (0, 1000))
    assert not {q.id for q in ours.eval} & {q.id for q in theirs.eval + theirs.train}


def test_the_questions_on_the_way_are_the_first_of_those_at_the_end():
    few, many = (load_data(Config(eval_questions=5, final_eval_questions=num)).eval
                 for num in (0, 40))
    assert len(many) == 40 and few == many[:5]


def test_hash_knows_dials_weights_and_world_and_nothing_else(tmp_path):
    base = made_with(Config(articles=150))
    assert base == made_with(Config(articles=150, seed=3, out="x", show_every=1))
    assert base == made_with(Config(articles=150, predictor="head")), "given or by default"
    assert base == made_with(Config(articles=150, clip=0.5)), "one update clips nothing"
    others = [Config(articles=150, learning_rate=1e-3), Config(articles=151),
              Config(articles=150, wiki_seed=1), Config(articles=150, method="grpo")]
    assert len({base, *map(made_with, others)}) == 5
    shutil.copytree(HERE / "world" / "tiny", tmp_path / "model")
    before = made_with(Config(model=str(tmp_path / "model"), articles=150))
    with open(tmp_path / "model" / "model.safetensors", "ab") as stream:
        stream.write(b" ")
    ablate.weights_hash.cache_clear()
    assert before != made_with(Config(model=str(tmp_path / "model"), articles=150))
    assert made_with(Config(model=str(tmp_path / "nowhere"), articles=150)) == ""


# ---------------------------------------------------------------- endpoints and tables
def rows_of(run, ems, leaves_per_prompt=8.0, **more):
    """Rows of a finished run whose evaluations, evenly spaced, came out as `ems`."""
    steps = np.linspace(0, run.steps, len(ems)).round()
    return [{"arm": run.arm, "seed": run.seed, "step": step, "sampled_tokens": 1000.0 * step,
             "leaves": 10.0 * step, "eval_em": em, "eval_f1": em, "em_first": em,
             "num_questions": 200, "effective_ratio": 0.5 if step else None,
             "leaves_per_prompt": leaves_per_prompt if step else None, "minutes": step,
             "hardware": "an abacus", "made_with": run.made_with, "em 1 hops": em, **more}
            for step, em in zip(steps, ems)]


def test_area_is_the_mean_over_tokens():
    def rows(*points):
        return [{"sampled_tokens": x, "em_first": y} for x, y in points]
    assert area(rows((0, 0.2), (10, 0.4))) == pytest.approx(0.3)
    assert area(rows((0, 0.2), (5, 0.2), (20, 0.8))) == pytest.approx((5 * 0.2 + 15 * 0.5) / 20)
    assert np.isnan(area(rows((0, 0.2))))


def test_interval_by_hand():
    mean, half = interval([1.0, 2.0, 3.0, 6.0])  # standard deviation sqrt(14 / 3)
    assert (mean, half) == (3.0, pytest.approx(3.18245 * (14 / 3) ** 0.5 / 2, rel=1e-5))
    assert np.isnan(interval([1.0])[1])


def test_token_share_interpolates_mean_curves():
    def run(*ys):
        return [{"sampled_tokens": 10.0 * i, "em_first": y} for i, y in enumerate(ys)]
    slow, fast = [run(0.0, 0.2, 0.4), run(0.2, 0.4, 0.6)], [run(0.0, 0.4, 0.8), run(0.2, 0.6, 1)]
    assert token_share(slow, slow) == pytest.approx(1, abs=1e-3)
    assert token_share(slow, fast) == pytest.approx(0.5, abs=1e-3)
    assert np.isnan(token_share(fast, slow))


RUNS = [Run(arm, seed, "", (), 2, 2000, f"hash-{arm}", Path("x")) for seed in range(3)
        for arm in ("grpo", "trace", "pcl", "grpo@2", "trace@2")]
ENDS = {"grpo": (0.30, 0.40, 0.50), "trace": (0.36, 0.42, 0.54), "grpo@2": (0.8, 0.9),
        "trace@2": (0.8, 0.8, 0.95)}


@pytest.fixture
def done():
    return finished(RUNS, [row for run in RUNS if run.seed < len(ENDS.get(run.arm, ()))
                           for row in rows_of(run, (0.2, ENDS[run.arm][run.seed]),
                                              9.0 if run.arm == "trace" else 8.0)])


def test_table_pairs_each_arm_with_the_first_one_of_its_wiki(done):
    header, *lines = table("main", RUNS, done)
    cells = {line[0]: dict(zip(header, line)) for line in lines}
    assert cells["grpo"]["exact match"] == "40.0 ± 24.8"  # 4.303 * 10 / sqrt(3)
    assert cells["grpo"]["difference"] == "–"
    # differences 6, 2, 4: mean 4, standard deviation 2; half of that for the areas
    assert cells["trace"]["difference"] == "+4.0 ± 5.0"
    assert cells["trace"]["area difference"] == "+2.0 ± 2.5"
    # its mean curve climbs 24 points where GRPO's climbs 20
    assert cells["trace"]["tokens to reach"] == "83 %"
    # unpaired, the means would differ by nothing; over the two shared seeds by -5
    assert cells["trace@2"]["difference"].startswith("-5.0 ±")
    assert cells["trace@2"]["tokens to reach"] == "never" and cells["grpo@2"]["seeds"] == "2 of 3"
    assert cells["trace"]["minutes"] == "2.0"


def test_effective_ratio_stands_at_equal_leaves_only(done):
    header, *lines = table("main", RUNS, done)
    ratio = {line[0]: line[header.index("Effective Ratio")] for line in lines}
    assert ratio == {"grpo": "0.50", "trace": "–", "pcl": "–", "grpo@2": "0.50", "trace@2": "0.50"}


def test_what_did_not_run_stands_in_the_table_with_its_command(done):
    line = next(line for line in table("main", RUNS, done) if line[0] == "pcl")
    assert line[1] == "not run (0 of 3)" and set(line[2:-1]) == {"–"}
    assert line[-1] == "`python -m lab.ablate --preset main --arms pcl`"
    assert "Nothing ran yet" in report("main", RUNS, {}) and "not run" in report("main", RUNS, {})


def test_half_a_run_does_not_count():
    rows = rows_of(RUNS[0], (0.2, 0.3, 0.4))
    assert finished(RUNS, rows[:2]) == {} and len(finished(RUNS, rows)) == 1


def test_rows_survive_the_file(tmp_path):
    rows = rows_of(RUNS[0], (0.2, 1 / 3)) + [{"arm": "mine", "made_with": "1e5", "new": 2.5}]
    write_rows(tmp_path / "x.csv", rows)
    again = read_rows(tmp_path / "x.csv")
    assert [row["made_with"] for row in again] == ["hash-grpo", "hash-grpo", "1e5"]
    assert again[1]["eval_em"] == pytest.approx(1 / 3, abs=1e-9) and again[2]["new"] == 2.5
    assert again[0]["effective_ratio"] is None and again[2]["seed"] is None
    write_rows(tmp_path / "y.csv", again)
    assert (tmp_path / "x.csv").read_text() == (tmp_path / "y.csv").read_text()
    assert read_rows(tmp_path / "none.csv") == []


# ---------------------------------------------------------------- calls that run nothing
@pytest.fixture
def folders(tmp_path, monkeypatch):
    """results/ and runs/ of this test's own."""
    monkeypatch.setattr(ablate, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(ablate, "RUNS", tmp_path / "runs")
    (tmp_path / "results").mkdir()
    return tmp_path


def test_finished_rows_are_not_run_again_whatever_their_name(folders, monkeypatch, capsys):
    """Those of grpo stand in the file of another preset, under another name."""
    monkeypatch.setattr(ablate, "start", lambda *_: pytest.fail("a finished run was started"))
    for file, arm in (("pool", "grpo"), ("quick", "trace")):
        write_rows(folders / "results" / f"{file}.csv", [
            row | {"arm": "as before" if arm == "grpo" else arm}
            for run in plan("quick") if run.arm == arm for row in rows_of(run, (0.1, 0.2))])
    assert main(["--preset", "quick"]) == 0
    captured = capsys.readouterr()
    assert "not run" not in captured.out and "left out" not in captured.err
    assert (folders / "results" / "quick.png").read_bytes().startswith(b"\x89PNG")


def test_stale_rows_are_named_and_left_out(folders, capsys):
    write_rows(folders / "results" / "quick.csv", [
        row for run in plan("quick") for row in
        rows_of(run._replace(made_with="old") if run.arm == "trace" else run, (0.1, 0.2))])
    assert main(["--preset", "quick", "--table"]) == 0
    captured = capsys.readouterr()
    assert "rows of trace were made with other" in captured.err and "grpo" not in captured.err
    assert "| trace | not run (0 of 2) |" in captured.out and "| grpo | 2 | 20.0" in captured.out


def test_bad_input_is_one_line_and_exit_code_2(folders, capsys):
    cases = [(["--preset", "best"], "best"), (["--arms", "grpo,ppo"], "ppo"),
             (["--jobs", "0"], "jobs"), (["--jobs", "many"], "jobs"), (["--no-such"], "no-such"),
             (["--flags=--budjet 3"], "budjet"), (["--flags=--budget 0"], "budget"),
             (["--preset", "tuning"], "--dev"), (["--score", str(folders), "wiki"], "config.json"),
             (["--score", str(folders), "moon"], "wiki or hops")]
    for arguments, word in cases:
        assert_refused(main, arguments, word, capsys)
    assert not (folders / "runs").exists()


def test_two_calls_do_not_write_to_one_folder(folders, capsys):
    held = lock_folders({folders / "runs" / "quick"})
    assert main(["--flags=--steps 1"]) == 2 and held
    assert "another lab.ablate" in capsys.readouterr().err


# ---------------------------------------------------------------- a grid, as a user runs it
@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """One arm that works and one that cannot, on one seed. -> (folder, exit code)"""
    folder = tmp_path_factory.mktemp("grid")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablate, "RUNS", folder)
        patch.setattr(ablate, "PRESETS", {"quick": {
            "bad": ("--method grpo --context 41 --turn-tokens 41", 1),
            "trace": ("--method trace", 1)}})
        code = main(["--jobs", "1", "--flags", SMALL])
        runs = plan("quick", extra=SMALL)
    return SimpleNamespace(folder=folder, code=code, runs={run.arm: run for run in runs})


@pytest.mark.long
def test_a_failed_run_stops_no_other(grid):
    assert grid.code == 1
    assert "room for a turn" in (grid.folder / "quick" / "bad-s0.log").read_text()
    rows = read_rows(grid.folder / "quick-trial.csv")
    assert [(row["arm"], row["step"]) for row in rows] == [("trace", 0), ("trace", 1), ("trace", 2)]
    assert (grid.folder / "quick-trial.png").exists(), "a trial leaves nothing in results/"


@pytest.mark.long
def test_rows_are_those_of_the_run_folder(grid):
    rows, run = read_rows(grid.folder / "quick-trial.csv"), grid.runs["trace"]
    evals, steps = ([json.loads(line) for line in open(run.folder / f"{name}.jsonl")]
                    for name in ("evals", "metrics"))
    assert COLUMNS <= set(rows[0]) and rows[0]["effective_ratio"] is None
    for row, result in zip(rows, evals, strict=True):
        assert row["made_with"] == run.made_with and row["num_questions"] == len(
            load_data(Config(articles=150, eval_questions=8 if row["step"] == 2 else 5)).eval)
        assert row["sampled_tokens"] == result["sampled_tokens"]
        assert row["eval_em"] == pytest.approx(result["em"])
    assert rows[2]["leaves"] == steps[0]["leaves"] + steps[1]["leaves"]
    assert rows[2]["effective_ratio"] == pytest.approx(steps[1]["effective_ratio"])


@pytest.mark.long
def test_em_first_is_the_exact_match_of_the_first_questions(grid):
    last = read_rows(grid.folder / "quick-trial.csv")[-1]
    answers = json.loads((grid.runs["trace"].folder / "predictions.json").read_text())["answer"]
    questions = load_data(Config(articles=150, eval_questions=8)).eval
    ems = [q.score(answers[q.id])["em"] for q in questions]
    assert last["eval_em"] == pytest.approx(np.mean(ems))
    assert last["em_first"] == pytest.approx(np.mean(ems[:5]))


@pytest.mark.long
def test_transfer_scores_the_trained_policy_elsewhere(grid):
    folder = grid.runs["trace"].folder
    assert score_transfer(folder, "wiki") == 0
    result = json.loads((folder / "transfer-wiki.json").read_text())
    assert result["num_questions"] == 8 and 0 <= result["em"] <= 1
    run = grid.runs["trace"]._replace(arm="trace@wiki", where="wiki", made_with="t")
    (row,) = ablate.collect(run, 1)
    assert row["arm"] == "trace@wiki" and row["eval_em"] == result["em"] and row["step"] == 2
    assert num_steps(run) == 2


@pytest.mark.long
def test_transfer_to_more_hops_than_were_trained(grid):
    assert score_transfer(grid.runs["trace"].folder, "hops") == 0
    result = json.loads((grid.runs["trace"].folder / "transfer-hops.json").read_text())
    assert result["num_questions"] > 0 and set(result["by_hops"]) <= {"5", "6"}


@pytest.mark.long
def test_a_transfer_trains_what_is_missing(tmp_path, monkeypatch):
    """The rows of main may stand where its run folders do not."""
    monkeypatch.setattr(ablate, "RUNS", tmp_path)
    monkeypatch.setitem(PRESETS, "transfer", {"grpo@wiki": ("--method grpo", 1)})
    assert main(["--preset", "transfer", "--jobs", "1", "--flags", f"{SMALL} --steps 2"]) == 0
    (row,) = read_rows(tmp_path / "transfer-trial.csv")
    assert (row["arm"], row["seed"], row["step"]) == ("grpo@wiki", 0, 2)


@pytest.mark.long
def test_a_killed_grid_stops_its_runs_and_goes_on_from_their_checkpoints(tmp_path):
    """Ctrl-C: exit code 130, nothing left running (the lock is free), and the next call ends the
    run with every step once."""
    code = ("import sys, ablate; from pathlib import Path; ablate.RUNS = Path(sys.argv[1]); "
            "ablate.PRESETS = {'quick': {'grpo': ('--method grpo', 1)}}; "
            "sys.exit(ablate.main(sys.argv[2:]))")
    command = [sys.executable, "-c", code, str(tmp_path), "--jobs", "1", "--flags",
               f"{SMALL} --steps 15 --eval-every 0"]
    process = subprocess.Popen(command, cwd=HERE)
    deadline = time.time() + 120
    while not list(tmp_path.glob("quick/*/checkpoint/step-000002.pt")):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    lock_folders({tmp_path / "quick"})
    (folder,) = tmp_path.glob("quick/grpo-*/")
    num = (folder / "metrics.jsonl").read_bytes().count(b"\n")
    assert 2 <= num < 15 and not (tmp_path / "quick-trial.csv").exists()
    assert subprocess.run(command, cwd=HERE, check=False).returncode == 0
    steps = [json.loads(line)["step"] for line in open(folder / "metrics.jsonl")]
    assert steps == list(range(1, 16))
    with open(tmp_path / "quick-trial.csv") as stream:
        assert [row["step"] for row in csv.DictReader(stream)] == ["0", "15"]


def test_differences_by_hand(done):
    """Over the seeds that all arms of a line share: here two of the two by two."""
    names = {"active+active": "trace", "active+random": "grpo", "uniform+active": "grpo@2",
             "uniform+random": "trace@2"}
    four = {(arm, seed): done[own, seed] for arm, own in names.items() for seed in range(3)
            if (own, seed) in done}
    lines = {line.split(" | ")[0][2:]: line.strip("| ").split(" | ")[1:]
             for line in differences(done | four).split("\n")}
    assert lines["trace − grpo"] == ["3", "+4.0 ± 5.0", "+2.0 ± 2.5"]
    assert lines["trace − treepo"] == ["0", "–", "–"]
    # (0.36 + 0.30 - 0.8 - 0.8) / 2 and (0.42 + 0.40 - 0.9 - 0.8) / 2; t = 12.706
    assert lines["active − uniform roots (mean of both prefixes)"][:2] == ["2", "-45.5 ± 19.1"]
    assert lines["active − random prefixes (mean of both roots)"][1] == "+4.5 ± 19.1"
    assert lines["both active, beyond the sum of the two"][1] == "-1.0 ± 88.9"


# ---------------------------------------------------------------- the README
def readme_blocks(text):
    """{preset: what stands between <!-- results:PRESET --> and <!-- /results -->}"""
    return {preset: block.strip() for preset, block in re.findall(
        r"<!-- results:(\S+) -->(.*?)<!-- /results -->", text, re.DOTALL)}


def test_readme_blocks():
    text = ("a <!-- results:main -->\n| 1 |\n<!-- /results --> b\n"
            "<!-- results:x -->y<!-- /results -->")
    assert readme_blocks(text) == {"main": "| 1 |", "x": "y"}


def readme_text():
    return " ".join((HERE / "README.md").read_text().split())


def test_the_differences_in_the_readme_are_those_of_the_files(capsys):
    main(["--differences"])
    text, printed = readme_text(), capsys.readouterr().out
    assert f"<!-- differences --> {' '.join(printed.split())} <!-- /differences -->" in text
    done = ablate.gather("two-by-two", plan("two-by-two"))[2]
    for roots in "uniform", "active":
        cells = [[done[f"{roots}+{prefixes}", seed] for seed in range(5)]
                 for prefixes in ("random", "active")]
        assert f"| {roots} roots | " + " | ".join(
            f"{percent(list(map(last, runs)))}, {percent(list(map(area, runs)))}"
            for runs in cells) + " |" in text


def test_what_the_readme_says_of_the_results_is_in_the_files():
    text, done = readme_text(), ablate.gather("main", plan("main"))[2]
    arms = {arm: {seed: rows for (a, seed), rows in done.items() if a == arm}
            for arm in ("grpo", "trace", "treepo", "grpo@2", "trace@2")}
    pairs, pairs2 = ([(rows, arms[base][seed]) for seed, rows in sorted(arms[arm].items())]
                     for arm, base in (("trace", "grpo"), ("trace@2", "grpo@2")))
    best = max(pairs, key=lambda pair: last(pair[0]) - last(pair[1]))
    share, share2 = (token_share(arms[base].values(), arms[arm].values())
                     for arm, base in (("trace", "grpo"), ("trace@2", "grpo@2")))
    ahead, ahead2 = (sum(last(a) > last(b) for a, b in some) for some in (pairs, pairs2))
    end, whole = (percent([score(a) - score(b) for a, b in pairs], "+") for score in (last, area))
    mean, half = interval([area(a) - area(b) for a, b in pairs2])
    assert mean > half and "the interval of the area is above zero" in text
    for words in (f"ends {end} points above GRPO, {whole} in area, ahead on {ahead} of 10",
                  f"here {100 * share:.0f} %)",
                  "one seed ({:.1f} against {:.1f})".format(*(100 * last(rows) for rows in best)),
                  f"ahead on {ahead2} of 10, with {100 * share2:.0f} % of the tokens",
                  f"One TreePO seed of {len(arms['treepo'])} broke down, to "
                  f"{100 * min(map(last, arms['treepo'].values())):.1f} %"):
        assert words in text, words
    rows = read_rows(HERE / "results" / "predictor.csv")
    score = {(row["group"], row["predictor"]): row for row in rows
             if row["step"] == rows[-1]["step"]}
    for group, name, words in (("roots", "head", "reaches {:.0f} % of the ceiling"),
                               ("prefixes", "head, repeats", "bring prefixes to {:.0f} %")):
        part = score[group, name]["auroc"] / score[group, "truth"]["auroc"]
        assert words.format(100 * part) in text, words
    assert round(score["roots", "head"]["closed"], 1) == 0.2 and "a fifth of the regret" in text


@pytest.mark.parametrize("preset", sorted({*PRESETS} - {"quick", "tuning"}))
def test_the_readme_names_every_preset_that_lacks_runs(preset):
    runs = plan(preset)
    missing = len(ablate.gather(preset, runs)[2]) < len(runs)
    assert (f"| `python -m lab.ablate --preset {preset}` |" in readme_text()) == missing


def test_every_number_in_the_readme_is_that_of_the_files():
    blocks = readme_blocks((HERE / "README.md").read_text())
    assert "main" in blocks
    for preset, block in blocks.items():
        runs = plan(preset)
        _, _, done, stale = ablate.gather(preset, runs)
        assert not stale, f"results/{preset}.csv has stale rows"
        assert block == report(preset, runs, done, markdown=True)
