"""Rows of an ablation, what they say over seeds, and the tables that they make. No torch.

A row is one evaluation of one run; `collect` in lab/ablate.py says what its columns are. Two
numbers decide. The end is the mean exact match of the evaluations in the last quarter of the steps
that asked as many questions as the last one: in protocol 2 those after 80, 90 and 100 % of them.
The area is the mean exact match over the whole run. `done` holds what is finished, {(arm, seed):
rows by step}.
"""
import csv
import io
import json
from collections import Counter
from functools import partial
from itertools import chain

import numpy as np

from engine.errors import UsageError
from engine.files import write_aside
from lab.stats import interval, mean_and_band, sign_flip, summary

TEXTS = {"arm", "predictor", "group", "hardware", "made_with"}  # other columns hold numbers
HEADER = """\
| arm | seeds | exact match | area | difference | area difference | tokens to reach |\
 Effective Ratio | minutes |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |"""
EQUAL_LEAVES = 0.05  # Effective Ratios are compared where leaves per prompt differ by less


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


def by_run(rows):
    """-> `done`, of all that stands in these rows; those of other tables have no arm."""
    done = {}
    for row in rows:
        if "arm" in row:
            done.setdefault((row["arm"], row["seed"]), []).append(row)
    return done


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


# ---------------------------------------------------------------- scores of runs
def curve(rows):
    """-> [2, n]: sampled tokens, and exact match on the questions that every evaluation asked."""
    return np.array([(row["sampled_tokens"], row["em_first"]) for row in rows]).T


def area(rows):
    """Mean exact match over sampled tokens (trapezoids), 0 to 1; nan for one row."""
    x, y = curve(rows)
    return np.trapezoid(y, x) / (x[-1] - x[0]) if len(x) > 1 else np.nan


def end(rows, name="eval_em"):
    """Mean of a column over the evaluations in the last quarter of the steps that asked as many
    questions as the last one, or nan."""
    last = rows[-1]
    large = [row for row in rows if row["num_questions"] == last["num_questions"]
             and row["step"] >= 0.75 * last["step"]]
    return np.mean([row.get(name, np.nan) for row in large])


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
    """Of the first arm. It grows with the leaves of a tree: among eight of them, or in protocol 1
    only where both arms have as many."""
    if not pairs:
        return "–"
    ours, theirs = zip(*pairs)
    if "mixed_of_8" in ours[0][-1]:
        return f"{mean_of('mixed_of_8', ours):.2f}"
    leaves = mean_of("leaves_per_prompt", ours) / mean_of("leaves_per_prompt", theirs)
    return f"{mean_of('effective_ratio', ours):.2f}" if abs(leaves - 1) < EQUAL_LEAVES else "–"


# ---------------------------------------------------------------- tables in markdown
def table(done, planned=()):
    """A line per arm, in the order of what was planned, [(arm, seed)], or of what is done. It is
    compared with the first arm, or NAME@X with the first of those @X, over the seeds that both
    have."""
    lines = [HEADER]
    first = {}
    machine = most_common(done)
    for arm, num in Counter(arm for arm, _ in planned or done).items():
        base = first.setdefault(arm.partition("@")[2], arm)
        mine = shared(done, arm)
        if not mine:
            lines.append(f"| {arm} | not run (0 of {num}) |{' – |' * 7}")
            continue
        seeds = f"{len(mine)} of {num}" if len(mine) < num else num
        pairs = shared(done, arm, base)
        times = [rows[-1]["minutes"] for [rows] in mine if rows[-1]["hardware"] == machine]
        minutes = f"{np.median(times):.1f}" if times else "–"
        gains = area_gains = []
        if arm != base:
            gains = sums(pairs, [1, -1], end)
            area_gains = sums(pairs, [1, -1], area)
        lines.append(
            f"| {arm} | {seeds} | {percent(sums(mine, [1], end))} | "
            f"{percent(sums(mine, [1], area))} | {percent(gains, '+')} | "
            f"{percent(area_gains, '+')} | {tokens_to_reach(pairs)} | {effective_ratio(pairs)} | "
            f"{minutes} |")
    return "\n".join(lines)


def most_common(done):
    """The machine of most runs: minutes of others would not compare with its own."""
    machines = [rows[-1]["hardware"] for rows in done.values()]
    return max(dict.fromkeys(machines), key=machines.count, default="")


def groups_table(done):
    """A line per arm that ran: exact match at the end by hops and by kind, in %."""
    names = sorted(name for name in set(chain(*chain(*done.values()))) if name.startswith("em "))
    lines = [f"| exact match of | {' | '.join(names)} |".replace("| em ", "| "),
             "| --- |" + " --- |" * len(names)]
    for arm in dict.fromkeys(arm for arm, _ in done):
        groups = shared(done, arm)
        cells = [f"{100 * np.mean([end(rows, name) for [rows] in groups]):.1f}" for name in names]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def contrasted(done, contrasts):
    """Yields (words, column, ends, areas) for each line of `contrasts`, which says: seeds per
    formula, at most | column | weights and arms | words. Ends and areas are differences, paired
    over the seeds that all arms share. They are lists of one group, or of a group per setting where
    ; stands between the formulas of several."""
    for line in filter(None, contrasts.split("\n")):
        if line.count(" | ") != 3:
            raise UsageError(f"contrasts.txt: not seeds | column | formula | words: {line}")
        most, name, formulas, words = line.split(" | ")
        ends, areas = [], []
        for formula in formulas.split(" ; "):
            weights, arms = list(map(float, formula.split()[::2])), formula.split()[1::2]
            groups = shared(done, *arms)[:int(most)]
            ends.append(sums(groups, weights, partial(end, name=name)))
            areas.append(sums(groups, weights, area))
        yield words, name, ends, areas


def differences(done, contrasts):
    """A line per line of `contrasts`, in points. Of several settings together: the mean of their
    means, and the seeds of all."""
    lines = ["| in points | seeds | at the end | p | area |", "| --- | --- | --- | --- | --- |"]
    for words, name, ends, areas in contrasted(done, contrasts):
        later = "– | –"
        if name == "eval_em":  # the endpoints
            p = "–"
            if min(map(len, ends)) > 1:
                p = f"{sign_flip(ends):.3f}".replace("0.000", "< 0.001")
            later = f"{p} | {points(areas)}"
        lines.append(f"| {words} | {sum(map(len, ends))} | {points(ends)} | {later} |")
    return "\n".join(lines)


def points(groups):
    """Mean and half of its interval, of one group or of several together; – for none."""
    if len(groups) == 1:
        return percent(groups[0], "+")
    if min(map(len, groups)) < 2:
        return "–"
    mean, half = summary(groups)
    return "–" if np.isnan(mean) else f"{100 * mean:+.1f} ± {100 * half:.1f}"


def report(done, planned=()):
    """Both tables and what they are of."""
    if not done:
        return table(done, planned)
    ends = [rows[-1] for rows in done.values()]
    num = sorted({f"{row['num_questions']:,}" for row in ends})
    tokens = np.median([row["sampled_tokens"] for row in ends])
    return f"""\
{round(tokens, -4):,.0f} sampled tokens per run; exact match in %, greedy, on {' or '.join(num)}\
 held-out questions; ± is a 95 % t interval over seeds; minutes of training per run (median);\
 {most_common(done)}

{table(done, planned)}

{groups_table(done)}"""
