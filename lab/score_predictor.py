"""How good is the success predictor? python -m lab.score_predictor RUN --points 3 --out DIR

The run in the folder RUN is repeated from its configuration, and pauses at several steps. All
predictors learn from the same trees. At a pause they are asked about held-out questions: half
of the anchors are roots (fewer where fewer questions are held out), the others are prefixes of
new bare rollouts. Fresh continuations of every anchor tell what is true. They come in two
halves: one half is the truth, and the other half is scored as the predictor "truth". Nothing
can be scored better than that, but for noise. But a question does not tell which facts are hidden,
so the truth is out of reach. The predictor "ceiling" says how far the probe could get: taught by
rollouts of the policy as it is, from ten times as many prompts as the run has seen, or from all.

brier   mean squared error over leaves, 0 to 1, lower is better (predictor.py)
auroc   chance that a success is predicted above a failure, 0.5 is a guess (predictor.py)
bias    mean of prediction - truth
closed  (J - J_constant) / (J_truth - J_constant). J is what the exact allocation by a predictor
        is worth: expected mixed groups at roots, expected flips at prefixes. 1 is as good as
        knowing the truth, 0 is no better than a constant.

At each pause it writes predictor.csv (a row per step, group of anchors and predictor),
predictor.png (the course over the run) and predictor_reliability.png (predicted against true).
"""
import sys
from itertools import cycle
from pathlib import Path

import numpy as np
from tqdm import tqdm

from allocator import allocate_roots, expand_prefixes, flip_prob, mixed_prob
from engine.command_line import Parser, run_main
from engine.draw import COLOURS, STYLES, Picture
from engine.errors import UsageError
from engine.files import read_lines
from engine.runs import check_inputs, inputs_of, load_checkpoint
from lab.baselines import BASELINES
from lab.headroom import BARE, PER_BARE
from lab.tables import write_rows
from policy import load_policy
from predictor import (PREDICTORS, ProbePredictor, auroc, brier, features, monte_carlo_value,
                       score_and_update)
from rollout import grow, prefill
from trace_mini import State, read_config, train_step
from tree import Prefix, backup, prefixes
from world.questions import load_data

HALF = 16      # continuations of an anchor that are the truth, and as many for "truth"
BATCH = 8      # anchors whose continuations are sampled between two moves of the bar
PER_ROOT = 2   # rollouts per candidate prompt in J, as with a pool of 32
SHUFFLES = 8   # J is a mean over random orders of the anchors: a constant has only ties
FEWEST = 5     # anchors of a bin that is drawn: the mean truth of fewer is noise
MORE_LABELS = 10  # times as many prompts teach the ceiling
MAKERS = PREDICTORS | BASELINES


# ---------------------------------------------------------------- measuring
def draw_sample(policy, env, questions, num, predictors):
    """A record array with a row per anchor and a column per predictor. A prompt's prefixes come
    all together, because stage 2 needs them. They are of some 30 prompts, so the share of the
    regret that is closed there is noisy."""
    roots = [policy.root(question, env) for question in questions[:num // 2]]
    prefill(policy, roots)
    grow(policy, env, roots, [BARE] * len(roots), ["bare"])
    anchors = [Prefix(root, 0) for root in roots]
    for root in roots:
        if len(anchors) < num:
            anchors += prefixes(root)
    rows = []
    for i in tqdm(range(0, len(anchors), BATCH), "continuations", leave=False):
        nodes = [anchor.node for anchor in anchors[i:i + BATCH]]
        halves = monte_carlo_value(policy, env, nodes * 2, HALF, [i]).reshape(2, -1)
        guesses = [predictor.predict(features(nodes)) for predictor in predictors.values()]
        for (node, outcome), *chances in zip(anchors[i:], *halves, *guesses):
            question = node.state.question
            kind = "prefixes" if node.depth else "roots"
            pool = question.id if node.depth else ""  # what shares a budget
            rows.append((kind, f"{question.num_hops} hops, {kind}", f"depth {node.depth}", pool,
                         outcome, *chances))
    return np.rec.fromrecords(rows, names=[
        "kind", "hops", "depth", "pool", "outcome", "true", "truth", *predictors])


def ceiling(policy, data, num):
    """The probe, taught by the bare rollouts of `num` prompts, or of all there are. It learns in
    two parts: the second one tells which penalty has predicted best."""
    teacher, trees = ProbePredictor(memory=10 ** 6), []
    questions = data.train[:num]
    for i in tqdm(range(0, len(questions), 100), "ceiling", leave=False):
        roots = [policy.root(question, data.env) for question in questions[i:i + 100]]
        grow(policy, data.env, roots, [BARE] * len(roots), ["ceiling", i])
        for root in roots:
            backup(root)
        trees += roots
    for part in (trees[::2], trees[1::2]):
        score_and_update(teacher, part)
    return teacher


def objective(rows, name):
    """J of the exact allocation by what `name` predicts, at roots or at prefixes."""
    pools = [rows[rows.pool == pool] for pool in dict.fromkeys(rows.pool)]
    rng = np.random.default_rng(0)
    total = 0.0
    for pool in pools * SHUFFLES:
        pool = rng.permutation(pool)
        v, true, outcome = pool[name], pool["true"], pool["outcome"]
        if rows.kind[0] == "roots":
            total += mixed_prob(true, allocate_roots(v, PER_ROOT * len(v))).sum()
        else:
            total += flip_prob(true, outcome, expand_prefixes(v, outcome, PER_BARE * BARE)).sum()
    return total / SHUFFLES


def scores(sample, name, step):
    """How good `name` is, one dict per group of anchors: roots, prefixes, each within one hop
    count; each depth; and there each bin of predictions, which are tenths, from 0 to 9. None
    stands where a score is not defined."""
    bins = np.array([f"bins of {row.depth}: {min(int(10 * row[name]), 9)}" for row in sample])
    for labels in sample.kind, sample.hops, sample.depth, bins:
        for group in dict.fromkeys(labels):
            rows = sample[labels == group]
            pair = rows[name], rows.true, np.ones(len(rows))
            yield {"step": step, "group": group, "anchors": len(rows), "predictor": name,
                   "predicted": rows[name].mean(), "true": rows.true.mean(),
                   "brier": brier(*pair), "auroc": auroc(*pair),
                   "bias": np.mean(rows[name] - rows.true),
                   "closed": None if "depth" in group else closed(rows, name)}


def closed(rows, name):
    """Share of the regret that `name` closes; None where the truth does no better than a
    constant."""
    base = objective(rows, "constant")
    gap = objective(rows, "truth") - base
    return (objective(rows, name) - base) / gap if gap > 0 else None


# ---------------------------------------------------------------- showing
def draw(rows, x, panels, file):
    """Four panels (y, group), with a line per predictor over the column `x`. It goes through
    all rows whose group begins like this."""
    names = dict.fromkeys(row["predictor"] for row in rows)
    figure = Picture(figsize=(8, 8), layout="constrained")
    for axes, (y, group) in zip(figure.subplots(2, 2).flat, panels):
        for name, style, colour in zip(names, cycle(STYLES[:8]), cycle(COLOURS)):
            line = sorted((row[x], row[y]) for row in rows
                          if row["predictor"] == name and row["group"].startswith(group))
            if line:
                axes.plot(*zip(*line), style, color=colour, label=name)
        axes.set(title=group, xlabel=x, ylabel=y)
    figure.legend(handles=figure.axes[0].lines, loc="outside upper center", ncols=4)
    figure.write(file)


def draw_all(table, folder):
    """The course: scores from point to point of the run. Reliability: predicted against true
    success at the last point."""
    draw(table, "step", [("auroc", "roots"), ("auroc", "prefixes"), ("closed", "roots"),
                         ("closed", "prefixes")], f"{folder}/predictor.png")
    last = [row for row in table
            if row["step"] == table[-1]["step"] and row["anchors"] >= FEWEST]
    draw(last, "predicted", [("true", f"bins of depth {depth}") for depth in range(4)],
         f"{folder}/predictor_reliability.png")


# ---------------------------------------------------------------- the command
def measure(run, anchors, points, out):
    """Repeat the run; at each pause write again all that is known by then."""
    config = read_config(run)
    evals = read_lines(Path(run, "evals.jsonl"))
    if not config.steps or not evals:
        raise UsageError(f"{run}: a run that has taken no step yet")
    if config.cold_start:
        raise UsageError(f"{run}: it had a cold start, which is not repeated here")
    if points < 1 or anchors < 2:
        raise UsageError("--points must be at least 1, --anchors 2")
    Path(out).mkdir(parents=True, exist_ok=True)
    policy = load_policy(config)
    data = load_data(config).that_fit(policy)
    check_inputs(run, load_checkpoint(run), inputs_of(policy, data))
    predictors = {name: make(policy, data.env, config.seed) for name, make in MAKERS.items()}
    serving = predictors[config.predictor]
    del predictors["oracle"]
    state = State.begin(config, data, evals[0]["tokens"])
    table = []
    for step in tqdm(range(1, config.steps + 1), "the run again", smoothing=0):
        trees, _ = train_step(config, state, policy, serving, data)
        for predictor in predictors.values():
            if predictor is not serving:
                score_and_update(predictor, trees)
        if step * points % config.steps < points:  # so often, and at the last step
            best = ceiling(policy, data, MORE_LABELS * len(state.prompts.counts))
            asked = predictors | {"ceiling": best}
            sample = draw_sample(policy, data.eval_env, data.eval, anchors, asked)
            for name in ["truth", *asked]:
                table += scores(sample, name, step)
            write_rows(f"{out}/predictor.csv", table)
            draw_all(table, out)
            tqdm.write(f"{out}: scores after step {step}")


def main(arguments=None):
    """-> exit code, as trace_mini.main."""
    parser = Parser(__doc__, prog="lab.score_predictor")
    parser.add_argument("run", help="folder of a run of trace_mini.py, which is only read")
    parser.add_argument("--anchors", type=int, default=500, help="roots and prefixes [500]")
    parser.add_argument("--points", type=int, default=4, help="pauses, evenly spread [4]")
    parser.add_argument("--out", default="runs/predictor", help="folder for what is measured")
    args = vars(parser.parse_args(arguments))
    return run_main("lab.score_predictor", lambda: measure(**args))


if __name__ == "__main__":
    sys.exit(main())
