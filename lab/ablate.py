"""Arms x seeds at equal sampled tokens -> rows, tables, figures: python -m lab.ablate --preset quick

Every run is a `python trace_mini.py` of its own in a folder under runs/ablate/PRESET; after a
kill, the same line goes on. A finished run becomes one row per evaluation in results/PRESET.csv;
what stands there (or, made alike, in another preset's file) is not run again, on no machine.
`made_with` is a hash of the arm's dials, the weights and the world: rows made with others are
left out, and a line says so. It does not know the code: after a change that moves the numbers,
delete the file. results/PROTOCOL.md says what decides.
"""
import dataclasses
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from engine.loading import ModelError
from engine.runs import (
    Parser,
    UsageError,
    checkpoint_file,
    load_checkpoint,
    parse_config,
    write_json,
)
from lab.pictures import draw_arms
from lab.tables import differences, finished, read_rows, report, write_rows
from policy import load_policy
from react_env import ReActEnv
from trace_mini import HERE, Config, evaluate
from tree import ADVANTAGES
from world.questions import load_data
from world.toy import make_questions, make_world

# Steps, tokens and evaluations: those of a lesson, and those of everything else
SHORT = "--steps 12 --budget 6000 --eval-every 4 --eval-questions 100 --final-eval-questions 200"
LONG = "--steps 40 --budget 8000 --eval-every 8 --eval-questions 500 --final-eval-questions 2000"
SECOND = "--model tiny2 --wiki-seed 1"  # another wiki, and a policy warm-started from another seed
DEV_SEED, DEV = 1000, "--wiki-seed 1000"  # --dev: these seeds and this wiki are never reported
OTHER_WIKI, TRAINED_HOPS, MORE_HOPS = 2, 4, 6  # of the transfer
# The arms as tuned; see PROTOCOL.md
GRPO, PCL, TREEPO, TRACE, ORACLE = (f"--method {arm}" for arm in (
    "grpo", "pcl", "treepo", "trace", "oracle"))

# {preset: {arm: (flags of trace_mini.py, number of seeds)}}. An arm is compared with the first one
# of its preset, and NAME@X with the first of those @X.
PRESETS = {
    "quick": {"grpo": (GRPO, 2), "trace": (TRACE, 2)},
    "main": {"grpo": (GRPO, 10), "trace": (TRACE, 10), "pcl": (PCL, 5), "treepo": (TREEPO, 5),
             "oracle": (ORACLE, 2),
             "grpo@2": (f"{GRPO} {SECOND}", 10), "trace@2": (f"{TRACE} {SECOND}", 10)},
    "two-by-two": {"uniform+random": (f"{TRACE} --root-rule uniform --prefix-rule random", 5),
                   "active+random": (f"{TRACE} --prefix-rule random", 5),
                   "uniform+active": (f"{TRACE} --root-rule uniform", 5),
                   "active+active": (TRACE, 5)},
    "pool": {"grpo": (GRPO, 3), "trace": (TRACE, 3)}
    | {f"grpo-group{n}": (f"{GRPO} --group-size {n}", 3) for n in (4, 16)}
    | {f"trace-pool{n}": (f"{TRACE} --pool-size {n}", 3) for n in (64, 128, 256)},
    "advantages": {rule: (f"{TRACE} --advantage {rule}", 3) for rule in ADVANTAGES},
    "predictors": {"head": (TRACE, 3), "head-fresh": (f"{TRACE} --targets fresh", 3)}
    | {name: (f"{TRACE} --predictor {name}", 3)
       for name in ("beta", "logistic", "counts", "constant")},
    "values": {"plug-in": (TRACE, 3), "posterior": (f"{TRACE} --concentration 8", 3),
               "cost-aware": (f"{TRACE} --cost-aware", 3), "floor": (f"{TRACE} --floor 0.25", 3),
               "repeats": (f"{TRACE} --repeats", 3)},
    "transfer": {f"{arm}@{where}": (flags, num) for where in ("wiki", "hops")
                 for arm, flags, num in (("grpo", GRPO, 10), ("trace", TRACE, 10), ("pcl", PCL, 5),
                                         ("treepo", TREEPO, 5))},
    "tuning": {f"grpo-rate{rate}": (f"{GRPO} --learning-rate {rate}", 1)  # with --dev only
               for rate in ("6e-4", "2.4e-3")}
    | {f"{arm}-{dial}{n}": (f"--method {arm} --{dial}-size {n}", 1) for arm, dial, sizes in (
        ("grpo", "group", (4, 8)), ("pcl", "group", (4, 8)), ("treepo", "group", (6, 9)),
        ("trace", "pool", (32, 256))) for n in sizes}}
RESULTS, RUNS = HERE / "results", HERE / "runs" / "ablate"
# Dials that do not say what is run; the method's choices are dials of their own
HOW = {"method", "seed", "out", "resume", "show_every", "show_tree", "checkpoint_every",
       "cache_tokens", "micro_batch_tokens", "gradient_checkpointing", "logit_chunk"}


class Run(NamedTuple):
    arm: str
    seed: int
    where: str       # of the transfer; else ""
    flags: tuple     # of trace_mini.py
    steps: int
    tokens: int      # sampled in all, about
    made_with: str   # "" where the model is missing
    folder: Path


# ---------------------------------------------------------------- what is to be run
def plan(preset, dev=False, extra=""):
    """-> [Run], seed by seed, so that tables can be read before the grid is done. `extra` are
    flags for all arms."""
    size, runs = SHORT if preset == "quick" else LONG, []
    for arm, (flags, num_seeds) in PRESETS[preset].items():
        flags = f"{size} {flags} {DEV * dev} {extra}".split()
        config = parse_config(Config, "", flags)
        trained = result = made_with(config)
        name, where, folder = arm, "", preset
        if preset == "transfer":
            name, _, where = arm.partition("@")
            result, folder = trained and short_hash(trained, where, OTHER_WIKI, MORE_HOPS), "main"
        runs += [Run(arm, seed, where, (*flags, "--seed", str(seed)), config.steps,
                     config.steps * config.budget, result,
                     RUNS / folder / f"{name}-s{seed}-{trained}")
                 for seed in range(DEV_SEED * dev, DEV_SEED * dev + num_seeds)]
    return sorted(runs, key=lambda run: run.seed)


def short_hash(*parts):
    return blake2b(repr(parts).encode(), digest_size=4).hexdigest()


def made_with(config):
    """Hash of what decides a run's numbers besides its seed: dials, weights, world; "" without
    weights. Dials that are off stay out: a new one leaves old rows valid."""
    weights = weights_hash(HERE / config.model_path)
    dials = {name: value for name, value in dataclasses.asdict(config).items()
             if value and name not in HOW and (name, value) != ("updates_per_batch", 1)}
    num_eval = max(config.eval_questions, config.final_eval_questions)
    return weights and short_hash(
        dials, weights, world_hash(config.articles, config.wiki_seed, num_eval))


@cache
def weights_hash(folder):
    files = [file for name in ("*.safetensors", "tokenizer.json") for file in folder.glob(name)]
    return short_hash([file.read_bytes() for file in sorted(files)]) if files else ""


@cache
def world_hash(articles, wiki_seed, num_eval):
    data = load_data(Config(articles=articles, wiki_seed=wiki_seed, eval_questions=num_eval))
    return short_hash([data.env.wiki.text(title) for title in data.env.wiki.titles],
                      [(q.id, q.text, q.answers) for q in data.train + data.eval])


# ---------------------------------------------------------------- running
def run_grid(runs, jobs, keep):
    """Run what is given, `jobs` at once; keep(run, rows) what finishes. -> number that failed"""
    waiting, running, num_failed = list(runs), [], 0
    lock = lock_folders({run.folder.parent for run in runs})  # let go with the last of us
    with tqdm(total=sum(run.steps for run in runs), initial=sum(map(num_steps, runs)), unit="step",
              smoothing=0.05, mininterval=1) as bar:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    running.append((waiting[0], start(waiting.pop(0), jobs, lock)))
                time.sleep(0.5)
                bar.update(sum(map(num_steps, runs)) - bar.n)
                for run, process in [pair for pair in running if pair[1].poll() is not None]:
                    running.remove((run, process))
                    try:
                        keep(run, collect(run, jobs))
                    except (OSError, UsageError):
                        num_failed += 1
                        tqdm.write(f"{run.arm}, seed {run.seed}: failed: {last_line(run)}")
        finally:  # on Ctrl-C each child ends its step and saves
            for _, process in running:
                process.send_signal(signal.SIGINT)
            for _, process in running:
                process.wait()
    return num_failed


def lock_folders(folders):
    """Two calls must not write to the same folders, nor one beside what a killed one left
    running. -> open files; children inherit them, so a lock lasts as long as the last child."""
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    files = [open(folder / "lock", "w") for folder in sorted(folders)]
    try:
        for file in files:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UsageError(f"{Path(file.name).parent}: another lab.ablate, or what a killed one left "
                         "running, is at work there") from None
    return files


def start(run, jobs, lock):
    """-> the process of a run, which goes on from its newest checkpoint if there is one."""
    if run.where:
        command = ["-m", "lab.ablate", "--score", run.folder, run.where]
    elif list(run.folder.glob("checkpoint/*.pt")):
        command = ["trace_mini.py", "--resume", run.folder]
    else:
        shutil.rmtree(run.folder, ignore_errors=True)  # killed before its first checkpoint
        command = ["trace_mini.py", *run.flags, "--out", run.folder]
    with open(log_file(run), "ab") as log:  # a session of its own: Ctrl-C comes through us alone
        return subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=HERE, stdin=subprocess.DEVNULL, stdout=log,
            stderr=log, start_new_session=True, pass_fds=[file.fileno() for file in lock],
            env={**os.environ, "OMP_NUM_THREADS": str(max(1, os.cpu_count() // jobs)),
                 "OMP_WAIT_POLICY": "passive", "TQDM_MININTERVAL": "60"})


def log_file(run):
    return run.folder.parent / f"{run.arm}-s{run.seed}.log"


def last_line(run):
    lines = log_file(run).read_text(errors="replace").replace("\r", "\n").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "no output")


def num_steps(run):
    """Steps that a run has done; a transfer does all of its steps at once."""
    file = run.folder / (f"transfer-{run.where}.json" if run.where else "metrics.jsonl")
    return 0 if not file.exists() else run.steps if run.where else file.read_bytes().count(b"\n")


def collect(run, jobs):
    """Rows of a finished run, one per evaluation; UsageError where it is not finished. Effective
    Ratio, leaves per prompt and coverage are means over the steps since the row before; leaves,
    loss tokens and minutes (of training, not of evaluation) are counted from the start."""
    steps, evals = ([json.loads(line) for line in (run.folder / f"{name}.jsonl").open()]
                    for name in ("metrics", "evals"))
    if evals[-1:] == [] or evals[-1]["step"] != run.steps:
        raise UsageError(f"{run.folder}: not finished")
    if run.where:
        evals = [evals[-1] | json.loads((run.folder / f"transfer-{run.where}.json").read_text())]
    hardware = (torch.cuda.get_device_name() if torch.cuda.is_available() else
                f"{os.cpu_count()} CPU cores")
    rows, before = [], 0
    for result in evals:
        done, new = steps[:result["step"]], steps[before:result["step"]]
        means = {name: float(np.mean([row[name] for row in new])) if new else None
                 for name in ("effective_ratio", "leaves_per_prompt", "coverage")}
        before = result["step"]
        rows.append({
            "arm": run.arm, "seed": run.seed, "step": result["step"],
            "sampled_tokens": result["sampled_tokens"],
            "leaves": sum(row["leaves"] for row in done),
            "eval_em": result["em"], "eval_f1": result["f1"], "em_first": result["em_first"],
            "num_questions": result["num_questions"], **means,
            "loss_tokens": sum(row["loss_tokens"] or 0 for row in done),
            "minutes": sum(value for row in done for name, value in row.items()
                           if name.startswith("time_")) / 60,
            "hardware": f"{hardware}, {jobs} at once", "made_with": run.made_with,
            **{f"em {hops} hops": em for hops, em in result["by_hops"].items()},
            **{f"em {kind}": em for kind, em in result["by_kind"].items()}})
    return rows


def score_transfer(folder, where):
    """Write FOLDER/transfer-WHERE.json: a trained policy on another wiki, or on longer chains."""
    if where not in ("wiki", "hops"):
        raise UsageError(f"--score {folder} {where}: choose wiki or hops")
    config = parse_config(Config, "", ["--resume", str(folder)])
    if not checkpoint_file(folder, config.steps).exists():
        raise UsageError(f"{folder}: not trained to its last step")
    world = make_world(config.articles, OTHER_WIKI if where == "wiki" else config.wiki_seed)
    num = config.final_eval_questions or config.eval_questions
    longer = {"max_hops": MORE_HOPS, "kinds": ("bridge",)} if where == "hops" else {}
    try:  # few chains are long enough
        questions = make_questions(world, 10 * num if longer else num, split="eval", **longer)
    except ValueError as error:
        raise UsageError(f"--score {folder} {where}: {error}") from None
    if longer:
        questions = [q for q in questions if q.num_hops > TRAINED_HOPS][:num]
    policy = load_policy(config)
    policy.load_state_dict(load_checkpoint(folder)["policy"])
    result = evaluate(policy, ReActEnv(world.wiki, config.max_turns), questions)
    del result["predictions"]
    write_json(folder / f"transfer-{where}.json", result | {"num_questions": len(questions)})
    return 0


# ---------------------------------------------------------------- command line
def gather(preset, runs, trial=False):
    """-> (the preset's CSV file, its rows, what is finished of `runs`, arms with stale rows). A
    trial (--dev, --flags) reads and writes below runs/ alone: no row of it is ever reported."""
    file = RUNS / f"{preset}-trial.csv" if trial else RESULTS / f"{preset}.csv"
    rows, valid = read_rows(file), {run.made_with for run in runs}
    others = [] if trial else [
        row for name in PRESETS for row in read_rows(RESULTS / f"{name}.csv")]
    return file, rows, finished(runs, others + rows), sorted({
        row["arm"] for row in rows if row["made_with"] not in valid})


def run_preset(preset, arms, jobs, dev, flags, only_table):
    """Run what is missing of a preset, write its rows and figure, print its table. -> exit code"""
    if preset == "tuning" and not dev:
        raise UsageError("--preset tuning goes with --dev: what tunes is not what is reported")
    if unknown := set(arms) - set(PRESETS[preset]):
        raise UsageError(f"--arms {min(unknown)}: choose from {', '.join(PRESETS[preset])}")
    runs, trial = plan(preset, dev, flags), dev or bool(flags)
    file, rows, done, stale = gather(preset, runs, trial)
    if stale and not trial:
        print(f"{file.name}: rows of {', '.join(stale)} were made with other weights, world or "
              "flags, and are left out", file=sys.stderr)
    if only_table:
        print(report(preset, runs, done, markdown=True))
        return 0

    def keep(run, new):
        nonlocal rows  # a trial leaves those of others alone
        rows = new + [row for row in rows if (row["arm"], row["seed"]) != (run.arm, run.seed)
                      or trial and row["made_with"] != run.made_with]
        rows.sort(key=lambda row: (row["arm"], row["seed"], row["step"]))
        write_rows(file, rows)
        done.update(finished([run], new))

    missing = [run for run in runs if run.arm in (arms or PRESETS[preset])
               and (run.arm, run.seed) not in done]
    if no_model := sorted({run.arm for run in missing if not run.made_with}):
        print(f"not run, their model is not there: {', '.join(no_model)}", file=sys.stderr)
    missing = [run for run in missing if run.made_with]
    first = {run.folder: run._replace(where="") for run in missing  # transfers need trained runs
             if run.where and not checkpoint_file(run.folder, run.steps).exists()}
    num_failed = run_grid([*first.values()], jobs, lambda *_: None) if first else 0
    num_failed += run_grid(missing, jobs, keep)
    curves = [row for rows in done.values() if len(rows) > 1 for row in rows]
    if curves:
        draw_arms(curves, file.with_suffix(".png"), y="em_first")
    print(report(preset, runs, done))
    return int(num_failed > 0 or no_model != [])


def main(arguments=None):
    """-> exit code: 0, 1 where a run failed, 2 for what the user can mend, 130 for Ctrl-C."""
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--preset", default="quick", choices=PRESETS)
    parser.add_argument("--arms", default="", help="only these, with commas between")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(),
                        help="runs at once, which share the cores [%(default)s]")
    parser.add_argument("--table", action="store_true", help="run nothing, print markdown")
    parser.add_argument("--differences", action="store_true",
                        help="run nothing, print the paired differences of the README")
    parser.add_argument("--dev", action="store_true",
                        help="development seeds and wiki; rows stay in runs/, not reported")
    parser.add_argument("--flags", default="", help="of trace_mini.py for all arms, as one "
                        "argument (--flags='--steps 9'); rows stay in runs/ too")
    parser.add_argument("--score", nargs=2, metavar=("DIR", "wiki|hops"),
                        help="a trained run on the questions of the transfer")
    args = parser.parse_args(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        if args.jobs < 1:
            raise UsageError(f"--jobs must be at least 1, got {args.jobs}")
        if args.score:
            return score_transfer(Path(args.score[0]), args.score[1])
        if args.differences:
            print(differences({key: rows for preset in ("main", "transfer", "two-by-two")
                               for key, rows in gather(preset, plan(preset))[2].items()}))
            return 0
        return run_preset(args.preset, [arm for arm in args.arms.split(",") if arm], args.jobs,
                          args.dev, args.flags, args.table)
    except (UsageError, ModelError) as error:
        print(f"lab.ablate: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
