"""Rows of an ablation, and the tables that they make. No torch.

A row is one evaluation of one run (ablate.py `collect` says what its columns are). Endpoints:
exact match at the full budget, and the area under the curve of exact match over cumulative
sampled tokens. `runs` are what was planned, with .arm, .seed, .steps, .tokens and .made_with.
"""
import csv
from pathlib import Path

import numpy as np

from lab.pictures import mean_and_band, student_t

EQUAL_LEAVES = 0.05  # Effective Ratios are compared where leaves per prompt differ by less


def read_rows(file):
    """Rows of a CSV file, numbers as numbers, nothing as None; [] where there is no file."""
    texts = "arm", "advantage", "predictor", "group", "hardware", "made_with"
    if not file.exists():
        return []
    with open(file, newline="") as stream:
        return [{name: text if name in texts else float(text) if text else None
                 for name, text in row.items()} for row in csv.DictReader(stream)]


def write_rows(file, rows):
    """Written aside and renamed; columns in the order in which they appear."""
    with open(f"{file}.part", "w", newline="") as stream:
        writer = csv.DictWriter(stream, dict.fromkeys(name for row in rows for name in row),
                                lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: f"{value:.10g}" if isinstance(value, float) else value
                          for name, value in row.items()} for row in rows)
    Path(f"{file}.part").replace(file)


def finished(runs, rows):
    """{(arm, seed): its rows by step} of the runs that are whole among the rows. They are found
    by what they were made with: an arm may have run under another name."""
    found = {}
    for row in rows:
        found.setdefault((row["made_with"], row["seed"]), {})[row["step"]] = row
    found = {(run.arm, run.seed): found.get((run.made_with, run.seed), {}) for run in runs
             if run.made_with and run.steps in found.get((run.made_with, run.seed), {})}
    return {key: [row | {"arm": key[0]} for _, row in sorted(steps.items())]
            for key, steps in found.items()}


def curve(rows):
    return np.array([(row["sampled_tokens"], row["em_first"]) for row in rows]).T


def area(rows):
    """Mean exact match over cumulative sampled tokens (trapezoids), 0 to 1; nan for one row."""
    x, y = curve(rows)
    if len(x) < 2:
        return np.nan
    return float(np.sum((y[1:] + y[:-1]) / 2 * np.diff(x)) / (x[-1] - x[0]))


def last(rows):
    """Exact match at the full budget, on all questions."""
    return rows[-1]["eval_em"]


def interval(values):
    """-> (mean, half of its 95 % t interval; nan for one value)."""
    n = len(values)
    return float(np.mean(values)), (
        student_t(n - 1) * float(np.std(values, ddof=1)) / n ** 0.5 if n > 1 else np.nan)


def token_share(base, other):
    """Share of the baseline's tokens after which the mean curve of `other` (lists of runs' rows)
    first stands as high as the baseline's mean curve ends; nan where it never does."""
    (x, mean, _), (x2, mean2, _) = (mean_and_band([curve(rows) for rows in runs], 2001)
                                    for runs in (base, other))
    there = np.flatnonzero(mean2 >= mean[-1])
    return float(x2[there[0]] / x[-1]) if len(there) else np.nan


def percent(values, sign=""):
    """Mean and half of its interval in %, "–" where there is nothing to say."""
    if not len(values) or np.isnan(values).any():
        return "–"
    mean, half = interval(values)
    return f"{100 * mean:{sign}.1f}" + ("" if np.isnan(half) else f" ± {100 * half:.1f}")


def table(preset, runs, done):
    """-> [header, a line of texts per arm]; `done` as from finished(). Differences are paired over
    the seeds shared with the first arm; Effective Ratio stands only at equal leaves per prompt."""
    lines, of = [("arm", "seeds", "exact match", "area", "difference", "area difference",
                  "tokens to reach", "Effective Ratio", "minutes", "command")], {}
    for run in runs:
        rows = done.get((run.arm, run.seed))
        of.setdefault(run.arm, {}).update({run.seed: rows} if rows else {})

    def mean(name, mine):
        return np.mean([row[name] for rows in mine for row in rows if row[name] is not None])

    for arm, mine in of.items():
        base = of[next(a for a in of if a.partition("@")[2] == arm.partition("@")[2])]
        num, num_curves = sum(run.arm == arm for run in runs), sum(map(len, mine.values()))
        ours, theirs = ([some[seed] for seed in mine if seed in base] for some in (mine, base))
        pairs = [*zip(ours, theirs)] if base is not mine else []
        share = token_share(theirs, ours) if ours and num_curves > len(mine) else None
        equal = ours and abs(mean("leaves_per_prompt", ours)
                             / mean("leaves_per_prompt", theirs) - 1) < EQUAL_LEAVES
        lines.append((
            arm, f"{len(mine)}" if len(mine) == num else f"{len(mine)} of {num}" if mine else
            f"not run (0 of {num})",
            percent([last(rows) for rows in mine.values()]),
            percent([area(rows) for rows in mine.values()]),
            percent([last(a) - last(b) for a, b in pairs], "+"),
            percent([area(a) - area(b) for a, b in pairs], "+"),
            "–" if share is None else "never" if np.isnan(share) else f"{100 * share:.0f} %",
            f"{mean('effective_ratio', ours):.2f}" if equal else "–",
            f"{np.median([rows[-1]['minutes'] for rows in mine.values()]):.1f}" if mine else "–",
            f"`python -m lab.ablate --preset {preset} --arms {arm}`"))
    return lines


def groups_table(runs, done):
    """-> [header, a line per arm that ran]: exact match at the end by hops and by kind, in %."""
    names = sorted({name for rows in done.values() for name in rows[-1] if name[:3] == "em "})
    lines = [("exact match of", *(name[3:] for name in names))]
    for arm in dict.fromkeys(run.arm for run in runs if (run.arm, run.seed) in done):
        ends = [rows[-1] for (a, _), rows in done.items() if a == arm]
        lines.append((arm, *("–" if None in (values := [row.get(name) for row in ends]) else
                             f"{100 * np.mean(values):.1f}" for name in names)))
    return lines


ENDS = {"trace": 1, "grpo": -1}
FOUR = "active+active", "active+random", "uniform+active", "uniform+random"
CONTRASTS = (  # (what, {arm: weight}, seeds at most, questions of)
    ("trace − grpo", ENDS, 10, ""),
    *((f"trace − grpo, questions of {hops}", ENDS, 10, hops)
      for hops in ("1 hops", "2 hops", "3 hops")),
    ("trace − grpo, seeds 0 to 4", ENDS, 5, ""),
    ("trace@2 − grpo@2: second wiki, second warm start", {"trace@2": 1, "grpo@2": -1}, 10, ""),
    ("trace − grpo on a third wiki, untrained there", {"trace@wiki": 1, "grpo@wiki": -1}, 10, ""),
    *((f"trace − {arm}", {"trace": 1, arm: -1}, 5, "") for arm in ("pcl", "treepo")),
    ("uniform roots and random prefixes − grpo", {"uniform+random": 1, "grpo": -1}, 5, ""),
    ("active − uniform roots (mean of both prefixes)",
     dict(zip(FOUR, (0.5, 0.5, -0.5, -0.5))), 5, ""),
    ("active − random prefixes (mean of both roots)",
     dict(zip(FOUR, (0.5, -0.5, 0.5, -0.5))), 5, ""),
    ("both active, beyond the sum of the two", dict(zip(FOUR, (1, -1, -1, 1))), 5, ""))


def differences(done):
    """The differences that the README speaks of, as markdown: paired over the seeds that all arms
    of a line share, in points; area only where there are whole curves."""
    lines = ["| in points | seeds | at the end | area |", "|---|---|---|---|"]
    for what, weights, num, group in CONTRASTS:
        seeds = [i for i in range(num) if all((arm, i) in done for arm in weights)]

        def paired(score):
            return percent([sum(weight * score(done[arm, i]) for arm, weight in weights.items())
                            for i in seeds], "+")
        curves = not group and all(len(done[arm, i]) > 1 for arm in weights for i in seeds)

        def of_group(rows):
            value = rows[-1].get("em " + group)
            return np.nan if value is None else value
        end = paired(of_group if group else last)
        lines.append(f"| {what} | {len(seeds)} | {end} | {paired(area) if curves else '–'} |")
    return "\n".join(lines)


def report(preset, runs, done, markdown=False):
    """Both tables and what they are of, as text or as markdown."""
    rows = [rows[-1] for rows in done.values()]
    tokens = sorted({f"{run.tokens:,}" for run in runs if (run.arm, run.seed) in done})
    num = sorted({f"{row['num_questions']:,.0f}" for row in rows})
    hardware = sorted({row["hardware"] for row in rows})
    parts = ["Nothing ran yet."] if not rows else [
        f"{' or '.join(tokens)} sampled tokens per run; exact match in %, greedy, on "
        f"{' or '.join(num)} held-out questions; ± is a 95 % t interval over seeds; minutes of "
        f"training per run (median); {' and '.join(hardware)}"]
    for lines in [table(preset, runs, done), groups_table(runs, done)][:2 if rows else 1]:
        if markdown:
            parts.append("\n".join("| " + " | ".join(line) + " |" for line in (
                lines[0], ["---"] * len(lines[0]), *lines[1:])))
        else:
            widths = [max(map(len, column)) for column in zip(*lines)]
            parts.append("\n".join("  ".join(map(str.ljust, line, widths)).rstrip()
                                   for line in lines))
    return "\n\n".join(parts)
