"""Rows of an ablation, what they say over seeds, and the tables that they make. No torch.

A row is one evaluation of one run; `collect` in lab/ablate.py says what its columns are. Two
numbers decide: exact match after the last step, and the area, which is the mean exact match over
the whole run. `runs` are what was planned; `done` holds what is finished, {(arm, seed): rows by
step}.
"""
import csv
import io
import json
from collections import Counter
from itertools import chain

import numpy as np

from engine.files import write_aside

TEXTS = {"arm", "predictor", "group", "hardware", "made_with"}  # other columns hold numbers
HEADER = """\
| arm | seeds | exact match | area | difference | area difference | tokens to reach |\
 Effective Ratio | minutes | command |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"""
EQUAL_LEAVES = 0.05  # Effective Ratios are compared where leaves per prompt differ by less

# The differences that are reported: seeds at most | column | weights and arms | words for it
CONTRASTS = """\
10 | eval_em | 1 trace -1 grpo | trace − grpo
10 | em 1 hops | 1 trace -1 grpo | trace − grpo, questions of 1 hops
10 | em 2 hops | 1 trace -1 grpo | trace − grpo, questions of 2 hops
10 | em 3 hops | 1 trace -1 grpo | trace − grpo, questions of 3 hops
5 | eval_em | 1 trace -1 grpo | trace − grpo, seeds 0 to 4
10 | eval_em | 1 trace@2 -1 grpo@2 | trace@2 − grpo@2: second wiki, second warm start
10 | eval_em | 1 trace@wiki -1 grpo@wiki | trace − grpo on a third wiki, untrained there
5 | eval_em | 1 trace -1 pcl | trace − pcl
5 | eval_em | 1 trace -1 treepo | trace − treepo
5 | eval_em | 1 uniform+random -1 grpo | uniform roots and random prefixes − grpo
5 | eval_em | .5 active+active .5 active+random -.5 uniform+active -.5 uniform+random\
 | active − uniform roots (mean of both prefixes)
5 | eval_em | .5 active+active -.5 active+random .5 uniform+active -.5 uniform+random\
 | active − random prefixes (mean of both roots)
5 | eval_em | 1 active+active -1 active+random -1 uniform+active 1 uniform+random\
 | both active, beyond the sum of the two"""


# ---------------------------------------------------------------- files
def read_rows(file):
    """Rows of a CSV file, without what is empty in them; [] where there is no file."""
    rows = []
    if file.exists():
        with open(file, newline="") as stream:
            for texts in csv.DictReader(stream):
                rows.append({name: text if name in TEXTS else json.loads(text)
                             for name, text in texts.items() if text})
    return rows


def write_rows(file, rows):
    """Columns stand in the order in which they appear."""
    text = io.StringIO()
    writer = csv.DictWriter(text, dict.fromkeys(chain(*rows)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with write_aside(file) as stream:
        stream.write(text.getvalue().encode())


def finished(runs, rows):
    """-> `done`. Runs are found by what they were made with: an arm may have run under another
    name. One whose last step is not there is not finished."""
    done = {}
    for run in runs:
        mine = {row["step"]: row | {"arm": run.arm} for row in rows
                if (row["made_with"], row["seed"]) == (run.made_with, run.seed)}
        if run.config.steps in mine:
            done[run.arm, run.seed] = list(mine.values())
    return done


# ---------------------------------------------------------------- statistics
def student_t(df):
    """t with P(|T| < t) = 0.95 at `df` degrees of freedom, to 5 digits: T = sqrt(df) tan(angle),
    and the density of the angle goes with cos(angle)^(df - 1)."""
    angle = np.linspace(0, np.pi / 2, 20001)
    density = np.cos(angle) ** (df - 1)
    below = np.append(0, np.cumsum(density[1:] + density[:-1]))
    return float(df ** 0.5 * np.tan(np.interp(0.95 * below[-1], below, angle)))


def interval(values):
    """Over the first axis -> (mean, half of its 95 % t interval; nan for one value)."""
    n = len(values)
    half = student_t(n - 1) * np.std(values, 0, ddof=1) / n ** 0.5 if n > 1 else np.nan
    return np.mean(values, 0), half


def mean_and_band(curves, num=50):
    """(x, mean, half of its 95 % t interval), [num] each, of curves [(x, y)] on their common x;
    half is one nan for one curve."""
    x = np.linspace(max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves), num)
    return x, *interval([np.interp(x, *curve) for curve in curves])


def curve(rows):
    """-> [2, n]: sampled tokens, and exact match on the questions of every evaluation."""
    return np.array([(row["sampled_tokens"], row["em_first"]) for row in rows]).T


def area(rows):
    """Mean exact match over sampled tokens (trapezoids), 0 to 1; nan for one row."""
    x, y = curve(rows)
    return np.trapezoid(y, x) / (x[-1] - x[0]) if len(x) > 1 else np.nan


def column(name):
    """-> function of a run's rows: what the last one holds there, or nan."""
    return lambda rows: rows[-1].get(name, np.nan)


last = column("eval_em")  # exact match after the last step, on all questions


def mean_of(name, runs):
    """Over all rows of these runs that have a number there."""
    return np.mean([row[name] for row in chain(*runs) if name in row])


def percent(values, sign=""):
    """Mean and half of its interval in %; – where there is nothing to say."""
    if len(values) == 0 or np.isnan(values).any():
        return "–"
    mean, half = interval(values)
    return f"{100 * mean:{sign}.1f} ± {100 * half:.1f}".removesuffix(" ± nan")


def shared(done, *arms):
    """-> for each seed that all these arms have, in order: a list of their rows."""
    groups = []
    for seed in sorted({seed for _, seed in done}):
        if done.keys() >= {(arm, seed) for arm in arms}:
            groups.append([done[arm, seed] for arm in arms])
    return groups


def sums(groups, weights, score):
    """Per group of `shared`, the weighted sum of the arms' scores."""
    return [np.dot(weights, list(map(score, group))) for group in groups]


def tokens_to_reach(pairs):
    """Share of the second arm's tokens after which the first one's mean curve stands as high as
    the second one's ends."""
    if not pairs or len(pairs[0][0]) == 1:
        return "–"
    ours, theirs = zip(*pairs)
    our_x, our_mean, _ = mean_and_band(list(map(curve, ours)), 2001)
    x, mean, _ = mean_and_band(list(map(curve, theirs)), 2001)
    there = our_x[our_mean >= mean[-1]]
    return f"{100 * there[0] / x[-1]:.0f} %" if len(there) else "never"


def effective_ratio(pairs):
    """Of the first arm, only at equal leaves per prompt: it grows with them."""
    if not pairs:
        return "–"
    ours, theirs = zip(*pairs)
    leaves = mean_of("leaves_per_prompt", ours) / mean_of("leaves_per_prompt", theirs)
    return f"{mean_of('effective_ratio', ours):.2f}" if abs(leaves - 1) < EQUAL_LEAVES else "–"


# ---------------------------------------------------------------- tables in markdown
def table(preset, runs, done):
    """A line per arm. It is compared with the first arm of the preset, or NAME@X with the first
    of those @X, over the seeds that both have."""
    lines = [HEADER]
    first = {}
    for arm, num in Counter(run.arm for run in runs).items():
        command = f"`python -m lab.ablate --preset {preset} --arms {arm}`"
        base = first.setdefault(arm.partition("@")[2], arm)
        mine = shared(done, arm)
        if not mine:
            lines.append(f"| {arm} | not run (0 of {num}) |{' – |' * 7} {command} |")
            continue
        seeds = f"{len(mine)} of {num}" if len(mine) < num else num
        pairs = shared(done, arm, base)
        gains = area_gains = []
        if arm != base:
            gains = sums(pairs, [1, -1], last)
            area_gains = sums(pairs, [1, -1], area)
        lines.append(
            f"| {arm} | {seeds} | {percent(sums(mine, [1], last))} | "
            f"{percent(sums(mine, [1], area))} | {percent(gains, '+')} | "
            f"{percent(area_gains, '+')} | {tokens_to_reach(pairs)} | {effective_ratio(pairs)} | "
            f"{np.median(sums(mine, [1], column('minutes'))):.1f} | {command} |")
    return "\n".join(lines)


def groups_table(done):
    """A line per arm that ran: exact match at the end by hops and by kind, in %."""
    names = sorted(name for name in set(chain(*chain(*done.values()))) if name.startswith("em "))
    lines = [f"| exact match of | {' | '.join(names)} |".replace("| em ", "| "),
             "| --- |" + " --- |" * len(names)]
    for arm in dict.fromkeys(arm for arm, _ in done):
        groups = shared(done, arm)
        cells = [f"{100 * np.mean(sums(groups, [1], column(name))):.1f}" for name in names]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def differences(done):
    """The differences that are reported, in points: paired over the seeds that all arms of a
    line share."""
    lines = ["| in points | seeds | at the end | area |", "| --- | --- | --- | --- |"]
    for line in CONTRASTS.split("\n"):
        most, name, formula, words = line.split(" | ")
        weights = list(map(float, formula.split()[::2]))
        groups = shared(done, *formula.split()[1::2])[:int(most)]
        ends = sums(groups, weights, column(name))
        areas = sums(groups, weights, area) if name == "eval_em" else []
        lines.append(f"| {words} | {len(groups)} | {percent(ends, '+')} | {percent(areas, '+')} |")
    return "\n".join(lines)


def report(preset, runs, done):
    """Both tables and what they are of."""
    if not done:
        return table(preset, runs, done)
    ends = [rows[-1] for rows in done.values()]
    num = sorted({f"{row['num_questions']:,}" for row in ends})
    hardware = sorted({row["hardware"] for row in ends})
    tokens = runs[0].config.steps * runs[0].config.budget
    return f"""\
{tokens:,} sampled tokens per run; exact match in %, greedy, on {' or '.join(num)} held-out\
 questions; ± is a 95 % t interval over seeds; minutes of training per run (median);\
 {' and '.join(hardware)}

{table(preset, runs, done)}

{groups_table(done)}"""
