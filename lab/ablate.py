"""Arms x seeds at equal sampled tokens -> rows, tables, figures: python -m lab.ablate

Every run is a `python trace_mini.py` of its own, in a folder under runs/ablate. Ctrl-C lets the
runs save; after it, or after a kill, the same command goes on. A finished run becomes one row per
evaluation in results/PRESET.csv. What stands there, or was made alike for another preset, is not
run again. (Those of the preset quick stay in runs/ablate, those of tuning and longer in
results/development.) results/PROTOCOL.md says what decides.

`made_with` is a hash of the dials that are not at their default, the weights and the world. Rows
that were made with others are left out: what they stood for is "not run". The hash does not know
the code, nor the defaults: after a change of them that moves the numbers, delete the file.
"""
import fcntl
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from engine.command_line import Parser, run_main
from engine.errors import UsageError
from engine.files import fingerprint, fingerprint_of_files, model_folder, read_lines
from engine.runs import checkpoint_files
from engine.tell import LAPS
from lab.pictures import draw_arms, draw_differences
from lab.tables import (by_run, contrasted, differences, finished, read_rows, report,
                        write_rows)
from trace_mini import HERE, Arm, Config, parse_config
from world.questions import load_data

RESULTS = HERE / "results"
RUNS = HERE / "runs" / "ablate"
# Steps, tokens and evaluations: those of a lesson, and those of everything else
SHORT = "--steps 12 --budget 6000 --eval-questions 0:100,33:100,67:100,100:200"
LONG = ("--steps 40 --budget 8000 --eval-questions "
        "0:250,20:250,40:250,60:250,80:1000,90:1000,100:1000")
FIRST_SEED = 100
DEV = 1000  # --dev: seeds from here on, and this wiki, which are never reported
DEV_PRESETS = {"tuning", "longer"}  # always run like that
TRANSFERS = {"wiki": "--wiki-seed 2",  # questions that a trained policy is asked without training
             "hops": "--hop-mix 0,0,0,0,50,50"}
SETTINGS = {"second": "--model tiny2 --wiki-seed 1",  # another wiki and warm start
            "hard": "--hop-mix 10,15,25,50"}
# Dials that do not say what is run; the choices of a method are dials of their own
HOW = {"method", "seed", "out", "resume", "show_tree", "save_trees", "checkpoint_every",
       "cache_tokens", "micro_batch_tokens"}

# A line per arm: preset, name, number of seeds, flags of trace_mini.py. An arm is compared with
# the first one of its preset, NAME@SETTING with the first of that setting.
PRESETS = {}
for line in """\
quick      grpo               2  --method grpo
quick      trace              2  --method trace
main       grpo               24 --method grpo
main       trace-probe        24 --method trace-probe
main       trace              24 --method trace
main       pcl                12 --method pcl --predictor probe
main       treepo             12 --method treepo --learning-rate 4e-3
main       grpo@second        24 --method grpo
main       trace-probe@second 24 --method trace-probe
main       trace@second       12 --method trace
main       grpo@hard          24 --method grpo
main       trace-probe@hard   24 --method trace-probe
main       trace@hard         12 --method trace
main       oracle@hard        4  --method oracle --pool-size 96
two-by-two uniform+random     12 --method trace-probe --root-rule uniform --prefix-rule random
two-by-two active+random      12 --method trace-probe --prefix-rule random
two-by-two uniform+active     12 --method trace-probe --root-rule uniform
two-by-two trace-probe        12 --method trace-probe
transfer   grpo@wiki          24 --method grpo
transfer   trace-probe@wiki   24 --method trace-probe
transfer   grpo@hops          24 --method grpo
transfer   trace-probe@hops   24 --method trace-probe
tuning     grpo-1.2e-3        4  --method grpo --learning-rate 1.2e-3
tuning     grpo-1.8e-3        4  --method grpo --learning-rate 1.8e-3
tuning     grpo-2.7e-3        4  --method grpo --learning-rate 2.7e-3
tuning     treepo-1.2e-3      4  --method treepo --learning-rate 1.2e-3
tuning     treepo-1.8e-3      4  --method treepo --learning-rate 1.8e-3
tuning     treepo-2.7e-3      4  --method treepo --learning-rate 2.7e-3
tuning     trace-1.2e-3       4  --method trace --learning-rate 1.2e-3
tuning     trace-1.8e-3       4  --method trace --learning-rate 1.8e-3
tuning     trace-2.7e-3       4  --method trace --learning-rate 2.7e-3
tuning     pcl-1.2e-3         4  --method pcl --predictor probe --learning-rate 1.2e-3
tuning     pcl-1.8e-3         4  --method pcl --predictor probe --learning-rate 1.8e-3
tuning     pcl-2.7e-3         4  --method pcl --predictor probe --learning-rate 2.7e-3
tuning     grpo-4e-3          4  --method grpo --learning-rate 4e-3
tuning     treepo-4e-3        4  --method treepo --learning-rate 4e-3
tuning     trace-4e-3         4  --method trace --learning-rate 4e-3
tuning     pcl-4e-3           4  --method pcl --predictor probe --learning-rate 4e-3
tuning     grpo-group4        4  --method grpo --group-size 4 --learning-rate 2.7e-3
tuning     treepo-group6      4  --method treepo --group-size 6 --learning-rate 4e-3
tuning     trace-pool96       4  --method trace --pool-size 96 --learning-rate 2.7e-3
tuning     pcl-group4         4  --method pcl --predictor probe --group-size 4 --learning-rate .0027
longer     grpo-longer        4  --method grpo --steps 80
longer     trace-probe-longer 4  --method trace-probe --steps 80
""".splitlines():
    preset, arm, num_seeds, flags = line.split(maxsplit=3)
    PRESETS.setdefault(preset, {})[arm] = int(num_seeds), flags


class Run(NamedTuple):
    arm: str
    seed: int
    where: str      # of a transfer, a key of TRANSFERS; else ""
    flags: list     # of trace_mini.py
    config: Config
    made_with: str
    folder: Path


# ---------------------------------------------------------------- what is to be run
def plan(preset, extra="", dev=False):
    """-> [Run], seed by seed, so that tables can be read before all is done. `extra` are flags
    for all arms."""
    size = SHORT if preset == "quick" else LONG
    first = FIRST_SEED
    if dev:
        first = DEV
        extra = f"--wiki-seed {DEV} {extra}"
    runs = []
    for arm, (num_seeds, flags) in PRESETS[preset].items():
        for seed in range(first, first + num_seeds):
            setting = SETTINGS.get(arm.partition("@")[2], "")
            words = f"{size} {flags} {setting} --seed {seed} {extra}".split()
            config = parse_config(words)
            made = made_with(config)
            folder = RUNS / f"{config.method}-{made}-s{seed}"
            where = ""
            if preset == "transfer":
                where = arm.partition("@")[2]
                made = fingerprint((made, TRANSFERS[where]))
            runs.append(Run(arm, seed, where, words, config, made, folder))
    return sorted(runs, key=lambda run: run.seed)


def made_with(config):
    """Hash of what decides a run's numbers besides its seed: dials, weights and world. The choices
    of a method (Arm) always count, other dials only where they are not at their default."""
    dials = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in Arm._fields or (value != field.default and field.name not in HOW):
            dials[field.name] = value
    world = weights_and_world(config.model, config.wiki_seed, config.hop_mix)
    return fingerprint((sorted(dials.items()), world))


@cache
def weights_and_world(model, wiki_seed, hop_mix):
    """Their fingerprints: of the embedded model or a folder; of a hub's model the name must do."""
    data = load_data(Config(wiki_seed=wiki_seed, hop_mix=hop_mix))
    return fingerprint_of_files(model_folder(model), "*.safetensors"), data.fingerprints()


# ---------------------------------------------------------------- running
def run_all(runs, jobs):
    """Run what is given, `jobs` at once. Yields (run, exit code), in order."""
    os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // jobs))  # of each child
    RUNS.mkdir(parents=True, exist_ok=True)
    lock = open(RUNS / "lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UsageError(f"{RUNS}: another lab.ablate, or what a killed one left running, is at "
                         "work there") from None
    pool = ThreadPoolExecutor(jobs)
    try:
        yield from zip(runs, pool.map(partial(run_one, lock), runs))
    finally:  # Ctrl-C has reached the children too: each ends its step and saves
        pool.shutdown(cancel_futures=True)


def run_one(lock, run):
    """-> exit code of a run, which goes on from its newest checkpoint if there is one. It holds
    the lock too, because it may outlive us."""
    flags = ["--resume", run.folder]
    if run.where:
        shutil.rmtree(scores_of(run), ignore_errors=True)  # killed before its end
        flags += ["--eval-only", "--out", scores_of(run), *TRANSFERS[run.where].split()]
    elif not checkpoint_files(run.folder):
        shutil.rmtree(run.folder, ignore_errors=True)  # killed before its first checkpoint
        flags = [*run.flags, "--out", run.folder]
    with open(f"{run.folder}.log", "ab") as log:
        return subprocess.run([sys.executable, "trace_mini.py", *flags], cwd=HERE, stdout=log,
                              stderr=log, pass_fds=[lock.fileno()]).returncode


def scores_of(run):
    """The folder of a transfer, beside that of its run."""
    return Path(f"{run.folder}-{run.where}")


def collect(run, jobs):
    """Rows of a finished run, one per evaluation. Effective Ratio (also of eight leaves),
    leaves per prompt and coverage are means over the steps since the row before. Leaves, loss
    tokens and minutes (of training, not of evaluation) are counted from the start."""
    steps = read_lines(run.folder / "metrics.jsonl")
    evals = read_lines(run.folder / "evals.jsonl")
    if run.where:
        evals = [evals[-1] | json.loads((scores_of(run) / "eval.json").read_text())]
    hardware = f"{os.cpu_count()} CPU cores"
    if torch.cuda.is_available():
        hardware = torch.cuda.get_device_name()
    rows = []
    done = []
    for result in evals:
        new = steps[len(done):result["step"]]
        done = steps[:result["step"]]
        times = [step[f"time_{name}_s"] for step in done for name in LAPS]
        row = {"arm": run.arm, "seed": run.seed, "made_with": run.made_with,
               "hardware": f"{hardware}, {jobs} at once", "minutes": sum(times) / 60,
               "eval_em": result["em"], "eval_f1": result["f1"]}
        for name in ("step", "sampled_tokens", "em_first", "num_questions"):
            row[name] = result[name]
        for name in ("leaves", "loss_tokens"):
            row[name] = sum(step[name] for step in done)
        for name in ("effective_ratio", "mixed_of_8", "leaves_per_prompt", "coverage"):
            if new:
                row[name] = np.mean([step[name] for step in new])
        for hops, em in result["by_hops"].items():
            row[f"em {hops} hops"] = em
        for kind, em in result["by_kind"].items():
            row[f"em {kind}"] = em
        rows.append(row)
    return rows


# ---------------------------------------------------------------- command line
def file_of(preset):
    folder = RUNS if preset == "quick" else RESULTS
    if preset in DEV_PRESETS:
        folder = RESULTS / "development"
    return folder / f"{preset}.csv"


def gather(runs, file):
    """-> {(arm, seed): rows} of the finished runs, from `file` and the files of all presets."""
    rows = read_rows(file)
    for preset in PRESETS:
        rows += read_rows(file_of(preset))
    return finished(runs, rows)


def all_differences(folder, draw):
    """The table of FOLDER/contrasts.txt, from all rows in that folder. To draw:
    FOLDER/differences.png, of the lines above the first empty one that are of one setting."""
    contrasts = (folder / "contrasts.txt").read_text()
    rows = []
    for file in sorted(folder.glob("*.csv")):
        rows += read_rows(file)
    done = by_run(rows)
    if draw:
        gains = {words: 100 * np.array(ends[0]) for words, _, ends, _ in
                 contrasted(done, contrasts.partition("\n\n")[0]) if len(ends) == 1}
        draw_differences(gains).write(folder / "differences.png")
    return differences(done, contrasts)


def run_missing(runs, file, jobs):
    """Run these, and write their rows. -> logs of the runs that failed"""
    trained = {run.folder: run._replace(where="") for run in runs if run.where}
    before = {run.folder: code for run, code in run_all(trained.values(), jobs)}
    failed = [f"{folder}.log" for folder, code in before.items() if code]
    runs = [run for run in runs if not before.get(run.folder)]  # trained, where they transfer
    for run, code in tqdm(run_all(runs, jobs), total=len(runs), unit="run"):
        if code:
            failed.append(f"{run.folder}.log")
        else:
            others = [row for row in read_rows(file)
                      if (row["arm"], row["seed"]) != (run.arm, run.seed)]
            write_rows(file, others + collect(run, jobs))
    return failed


def parse(arguments):
    parser = Parser(__doc__, prog="lab.ablate")
    flag = parser.add_argument
    flag("--preset", default="quick", choices=PRESETS)
    flag("--arms", help="only these, with commas between")
    flag("--jobs", type=int, default=os.cpu_count(), help="runs at once [%(default)s]")
    flag("--table", action="store_true", help="run nothing, print the tables")
    flag("--rows", metavar="FILE", help="run nothing, print the tables of such rows alone")
    flag("--differences", metavar="DIR", help="run nothing, print the paired differences that "
         "contrasts.txt in this folder lists, of all rows in it")
    flag("--draw", action="store_true", help="with --differences: draw the first of them, too")
    flag("--dev", action="store_true", help="development seeds and wiki; rows stay in runs/")
    flag("--flags", default="", help="of trace_mini.py for all arms, as one argument "
         "(--flags='--steps 9'); rows stay in runs/ too, in the place of those of other flags")
    args = parser.parse_args(arguments)
    if args.jobs < 1:
        raise UsageError(f"--jobs must be at least 1, got {args.jobs}")
    if args.draw and not args.differences:
        raise UsageError("--draw goes with --differences")
    return args


def command(args):
    """-> exit code: 1 where a run failed."""
    if args.rows:
        file = Path(args.rows)
        done = by_run(read_rows(file))
        if not done:
            raise UsageError(f"--rows {file}: no rows there")
        return print(report(done))
    if args.differences:
        return print(all_differences(Path(args.differences), args.draw))
    file = file_of(args.preset)
    if args.dev or args.flags:
        file = RUNS / f"{args.preset}-tried.csv"
    runs = plan(args.preset, args.flags, args.dev or args.preset in DEV_PRESETS)
    done, planned = gather(runs, file), [(run.arm, run.seed) for run in runs]
    if args.table:
        return print(report(done, planned))
    arms = args.arms.split(",") if args.arms else PRESETS[args.preset]
    if not PRESETS[args.preset].keys() >= set(arms):
        raise UsageError(f"--arms {args.arms}: choose from {', '.join(PRESETS[args.preset])}")
    missing = [run for run in runs if run.arm in arms and (run.arm, run.seed) not in done]
    failed = run_missing(missing, file, args.jobs)
    done = gather(runs, file)
    curves = list(chain(*[rows for rows in done.values() if len(rows) > 1]))
    if curves:
        draw_arms(curves, file.with_suffix(".png"))
    print(report(done, planned))
    if failed:
        print(f"failed, see: {', '.join(failed)}", file=sys.stderr)
        return 1


def main(arguments=None):
    """-> exit code"""
    return run_main("lab.ablate", lambda: command(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
