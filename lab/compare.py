"""Runs side by side, and what their difference is worth: python -m lab.compare RUN RUN ...

Runs that differ in nothing but their seed are one arm. The first run's arm is what the others are
compared with, seed by seed where they share seeds. The end of a run is the mean of the evaluations
in the last quarter of its steps that asked as many questions as the last one. The curves go to
runs/compare.png. Without a run it lists all that are in runs/.
"""
import sys
from itertools import chain
from pathlib import Path

import numpy as np

from engine.command_line import Parser, changed_dials, command_of, flag_of, run_main
from engine.errors import UsageError
from engine.files import read_lines
from lab.ablate import HERE, HOW, RESULTS, Run, collect
from lab.pictures import draw_arms
from lab.stats import interval
from lab.tables import by_run, end, read_rows, shared, sums, table
from trace_mini import read_config

RECORDED = RESULTS / "main.csv"  # many seeds: how far the ends of one arm lie apart
ASKS = {"--data", "--eval-data", "--wiki-seed", "--hop-mix", "--eval-questions"}  # what is asked


# ---------------------------------------------------------------- runs and arms
def arms_of(configs):
    """-> ([name of its arm per run], {dial: [its value per run]} of those that differ)."""
    dials = []
    for config in configs:
        changed = {"--method": config.method} | changed_dials(config)
        own = changed.keys() - set(map(flag_of, HOW - {"method"}))
        dials.append({flag: text or "yes" for flag, text in changed.items() if flag in own})
    differing = {}
    for flag in dict.fromkeys(chain(*dials)):
        values = [own.get(flag, "(default)") for own in dials]
        if len(set(values)) > 1:
            differing[flag] = values
    names = []
    for i, config in enumerate(configs):
        words = [f"{flag} {values[i]}" for flag, values in differing.items()
                 if flag != "--method" and values[i] != "(default)"]
        names.append(" ".join([config.method, *words]))
    return names, differing


def read_runs(folders):
    """-> (rows of evaluations, as lab.ablate has them; {dial: values} that differ)"""
    configs = [read_config(folder) for folder in folders]
    names, differing = arms_of(configs)
    rows = []
    for folder, config, name in zip(folders, configs, names):
        run = Run(name, config.seed, "", [], config, "", Path(folder))
        try:
            new = collect(run, jobs=1)
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UsageError(f"{folder}: its metrics cannot be read ({error!r})") from None
        if not new or new[-1]["step"] == 0 or new[-1]["eval_em"] is None:
            raise UsageError(f"{folder}: no scores of held-out questions after its start")
        if new[-1]["step"] < config.steps:
            print(f"{folder}: only evaluated up to step {new[-1]['step']} of {config.steps}")
        rows += new
    if len({(row["arm"], row["seed"]) for row in rows}) < len(folders):
        raise UsageError("two of these runs are the same: equal dials and equal seed")
    return rows, differing


# ---------------------------------------------------------------- in words
def spread():
    """(standard deviation over seeds of one arm's last evaluation, number of seeds), of the
    recorded grpo."""
    ends = [rows[-1]["eval_em"] for [rows] in shared(by_run(read_rows(RECORDED)), "grpo")]
    return np.std(ends, ddof=1), len(ends)


def in_words(done, num_questions):
    """What the differences to the first arm say, and what they do not."""
    std, num = spread()
    luck = 100 * 1.96 * (2 * (std ** 2 + 0.25 / num_questions)) ** 0.5
    lines = [f"The ends of {num} recorded seeds of grpo have a standard deviation of "
             f"{100 * std:.1f} points, and the {num_questions:,} questions asked here add to that. "
             "Two runs that differ in\nnothing but luck end more than about "
             f"{luck:.0f} points apart one time in twenty."]
    first, *others = dict.fromkeys(arm for arm, _ in done)
    for arm in others:
        gains = sums(shared(done, arm, first), [1, -1], end)
        if not gains:
            lines.append(f"{arm} and {first} share no seed: nothing is paired.")
            continue
        mean, half = 100 * np.mean(gains), luck / len(gains) ** 0.5
        if len(gains) > 2:  # enough for an interval of their own
            half = 100 * interval(gains)[1]
        verdict = "may be luck" if abs(mean) <= half else "is more than luck, most likely"
        lines.append(f"{arm} − {first}: {mean:+.1f} ± {half:.1f} points on {len(gains)} shared "
                     f"seed(s), which {verdict}.")
    return "\n".join(lines)


def differing_table(names, differing):
    """A line per dial that is not the same everywhere, a column per arm."""
    arms = list(dict.fromkeys(names))
    lines = [f"| dials that differ | {' | '.join(arms)} |", "| --- |" + " --- |" * len(arms)]
    for flag, values in differing.items():
        own = dict(zip(names, values))
        lines.append(f"| {flag} | {' | '.join(own[arm] for arm in arms)} |")
    return "\n".join(lines)


def list_runs(folder):
    """A line per training run: how far it is, how it scores, how it was made."""
    lines = []
    for file in sorted(folder.glob("*/config.json")):
        try:
            config = read_config(file.parent)
            if config.eval_only:
                continue
            evals = read_lines(file.parent / "evals.jsonl")
            score = f"step {evals[-1]['step']}: {100 * evals[-1]['em']:.1f} %"
            lines.append(f"{file.parent}  {score}  {command_of(config)}")
        except (UsageError, OSError, ValueError, LookupError, TypeError):
            lines.append(f"{file.parent}  no scores there")
    return "\n".join(lines) or f"no runs in {folder}"


# ---------------------------------------------------------------- command line
def compare(folders):
    rows, differing = read_runs(folders)
    done = by_run(rows)
    asked = {rows[-1]["num_questions"] for rows in done.values()}
    print(table(done) + "\n")
    if differing:
        print(differing_table([arm for arm, _ in done], differing) + "\n")
    if len(asked) > 1 or ASKS & set(differing):
        print("These runs answered different questions, or at other times: their scores do not "
              "compare.")
    else:
        print(in_words(done, *asked))
    (HERE / "runs").mkdir(exist_ok=True)
    print(f"curves: {draw_arms(rows, HERE / 'runs' / 'compare.png')}")


def main(arguments=None):
    """-> exit code"""
    parser = Parser(__doc__, prog="lab.compare")
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folders")

    def work():
        folders = parser.parse_args(arguments).runs
        return compare(folders) if folders else print(list_runs(Path("runs")))
    return run_main("lab.compare", work)


if __name__ == "__main__":
    sys.exit(main())
