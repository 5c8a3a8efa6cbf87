"""How good is the success predictor? python -m lab.score_predictor RUN_FOLDER [--out results]

Repeats the run from its configuration and pauses at several steps. All predictors learn from
the very same trees; at a pause each is scored on held-out questions, at their roots and at the
prefixes of new bare rollouts, against Monte-Carlo truth: fresh continuations of every anchor,
in two halves. "truth" is one half in the place of a predictor: the ceiling that the noise of
the truth leaves. Brier (lower is better) and AUROC are those of predictor.py; `bias` is the
mean of prediction − truth. "head, fresh" is a second head that learns from fresh leaves only;
"head, repeats" is the head's prediction, but the outcome of the bare rollout as often as a
continuation repeats it (--repeats).

`closed` is (J − J_constant) / (J_truth − J_constant): J is what the exact allocation by a
predictor is worth (mixed_prob at roots, flip_prob at prefixes) under the half that "truth" does
not see; 1 is as good as knowing the truth, 0 no better than the constant.
"""
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from allocator import allocate_roots, expand_prefixes, flip_prob, mixed_prob
from engine.draw import COLOURS, STYLES, Picture
from engine.loading import ModelError
from engine.runs import Parser, State, UsageError, read_config
from lab.tables import write_rows
from policy import load_policy
from predictor import PREDICTORS, auroc, brier, features, lessons, monte_carlo_value
from rollout import grow, prefill
from trace_mini import Config, train_step
from tree import prefixes, repeat_probs
from world.files import DataError
from world.questions import load_data

BARE = 3       # bare rollouts per prompt whose prefixes are scored, near what stage 1 deals
PER_ROOT = 2   # M / pool size in J, near what the default budget buys
PER_BARE = 2   # N in J, the default
SHUFFLES = 8   # J is a mean over random orders of the anchors: a constant has only ties
BINS = 10      # of the reliability curve
DRAWN = "truth", "head", "logistic", "head, repeats"  # in its picture


class Sample(NamedTuple):
    """n anchors of held-out questions at one point of a run, and what was predicted there."""
    depth: np.ndarray    # [n] turns from the root
    hops: np.ndarray     # [n] of the question: for the grouping of scores only
    owner: np.ndarray    # [n] number of the prompt
    outcome: np.ndarray  # [n] reward of the bare rollout that owns the prefix; 0 at roots
    truth: np.ndarray    # [2, n] mean rewards of the two halves of the continuations
    guesses: dict        # predictor -> [2, n]: what is compared with each half


def draw_sample(policy, data, predictors, key, num_anchors, num_continuations):
    """Half of the anchors are roots; prefixes fill the rest, prompt by prompt, since stage 2 needs
    all of a prompt: those of some 30 prompts, so the regret at prefixes is noisy."""
    roots = [policy.root(question, data.eval_env) for question in data.eval[:num_anchors // 2]]
    prefill(policy, roots)
    grow(policy, data.eval_env, roots, [BARE] * len(roots), key)
    rows = [(root, i, 0, 0.0) for i, root in enumerate(roots)]
    for i, root in enumerate(roots):
        if len(rows) < num_anchors:
            rows += [(node, i, reward, repeat) for (node, reward), repeat in zip(
                prefixes(root), repeat_probs(root))]
    anchors, owner, outcome, repeat = zip(*rows)
    truth = np.stack([monte_carlo_value(policy, data.eval_env, anchors, num_continuations // 2,
                                        (*key, half)) for half in "ab"])
    guesses = {name: np.stack([predictor.predict(features(anchors))] * 2)
               for name, predictor in predictors.items()}
    guesses["head, repeats"] = guesses["head"] + np.array(repeat) * (outcome - guesses["head"])
    return Sample(np.array([a.depth for a in anchors]),
                  np.array([a.state.question.num_hops for a in anchors]), np.array(owner),
                  np.array(outcome, int), truth, {"truth": truth[::-1], **guesses})


def objective(sample, rows, guess, truth):
    """J: worth under `truth` [n] of the exact allocation by `guess` [n] over the roots `rows`,
    or over the prefixes `rows`, each prompt on its own; ties in random order."""
    owner, stage_1 = sample.owner[rows], sample.depth[rows[0]] == 0
    groups = [rows] if stage_1 else [rows[owner == i] for i in np.unique(owner)]
    total, rng = 0.0, np.random.default_rng(0)
    for group in groups * SHUFFLES:
        group = rng.permutation(group)
        v, true, r = guess[group], truth[group], sample.outcome[group]
        total += (mixed_prob(true, allocate_roots(v, PER_ROOT * len(v))) if stage_1 else
                  flip_prob(true, r, expand_prefixes(v, r, PER_BARE * BARE))).sum()
    return total / SHUFFLES


def scores(sample):
    """One dict per group of anchors and predictor: roots, prefixes, the same within one hop
    count, and each depth. Means over the two halves; None where a score is not defined."""
    depth, hops = sample.depth, sample.hops
    groups = {"roots": depth == 0, "prefixes": depth > 0}
    groups |= {f"{name}, {h} hops": mask & (hops == h)
               for name, mask in groups.items() for h in np.unique(hops)}
    groups |= {f"depth {t}": depth == t for t in np.unique(depth[depth > 0])}
    for group, rows in ((group, np.flatnonzero(mask)) for group, mask in groups.items()):
        if not len(rows):
            continue
        halves = {name: list(zip(guess, sample.truth)) for name, guess in sample.guesses.items()}
        value = {name: np.mean([objective(sample, rows, *half) for half in pair])
                 for name, pair in halves.items()}
        gap = value["truth"] - value["constant"]
        known = gap > 0 and not group.startswith("depth")  # an allocation spans all depths
        for name, pair in halves.items():
            pair = [(v[rows], true[rows], np.ones(len(rows))) for v, true in pair]
            area = [auroc(*half) for half in pair]
            yield {"group": group, "anchors": len(rows), "predictor": name,
                   "brier": np.mean([brier(*half) for half in pair]),
                   "auroc": None if None in area else np.mean(area),
                   "bias": np.mean([np.mean(v - true) for v, true, _ in pair]),
                   "closed": (value[name] - value["constant"]) / gap if known else None}


def reliability(sample):
    """One dict per predictor, depth and bin of the prediction: how many anchors, their mean
    prediction, their mean truth."""
    for name, (v, _) in sample.guesses.items():
        true = sample.truth[0] if name == "truth" else sample.truth.mean(0)
        bins = np.minimum((v * BINS).astype(int), BINS - 1)
        for t, b in sorted(set(zip(sample.depth.tolist(), bins.tolist()))):
            rows = (sample.depth == t) & (bins == b)
            yield {"predictor": name, "depth": t, "bin": b, "anchors": int(rows.sum()),
                   "predicted": v[rows].mean(), "true": true[rows].mean()}


def draw_reliability(rows, file):
    """A panel for each of the first depths; on the diagonal, predictions come true. Bins of a few
    anchors are left out: their mean truth is noise."""
    figure, rows = Picture(figsize=(6.4, 6.6), layout="constrained"), [
        row for row in rows if row["predictor"] in DRAWN and row["anchors"] >= 5]
    for depth, axes in enumerate(figure.subplots(2, 2, sharex=True, sharey=True).flatten()):
        axes.plot([0, 1], [0, 1], color="lightgray", lw=4)
        axes.set(title=f"depth {depth}" if depth else "depth 0: roots")
        for i, name in enumerate(DRAWN):
            curve = [(row["predicted"], row["true"]) for row in rows
                     if (row["depth"], row["predictor"]) == (depth, name)]
            x, y = zip(*curve) if curve else ((), ())
            axes.plot(x, y, STYLES[i], color=COLOURS[i], ms=5, lw=1, label=name)
    figure.supxlabel("predicted success")
    figure.supylabel("true success")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4,
                  frameon=False)
    return figure.write(file)


def draw_course(rows, file):
    """AUROC and regret closed, at roots and at prefixes, from point to point of the run."""
    figure = Picture(figsize=(8, 6.4), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    for axes, (measure, group) in zip(panels.flatten(), (
            (m, g) for m in ("auroc", "closed") for g in ("roots", "prefixes"))):
        for i, name in enumerate(dict.fromkeys(row["predictor"] for row in rows)):
            curve = [(row["step"], row[measure]) for row in rows
                     if (row["group"], row["predictor"]) == (group, name)]
            if name != "head, repeats" or group == "prefixes":  # at roots it is the head's
                axes.plot(*zip(*curve), STYLES[i], color=COLOURS[i], ms=5, lw=1, label=name)
        axes.set(title=group if measure == "auroc" else "",
                 xlabel="step" if measure == "closed" else "",
                 ylabel={"auroc": "AUROC", "closed": "share of the regret closed"}[measure])
        axes.grid(alpha=0.3)
    figure.legend(*panels[0, 1].get_legend_handles_labels(), loc="outside upper center",
                  ncols=4, frameon=False)
    return figure.write(file)


def follow(config, policy, data, episode_tokens):
    """Repeat the run of `config` -> (step, predictors as they are then), step by step."""
    predictors = {name: make(policy, data.env, config.seed) for name, make in PREDICTORS.items()}
    serving, state = predictors[config.predictor], State()
    del predictors["oracle"]
    fresh = predictors["head, fresh"] = PREDICTORS["head"](policy, data.env, config.seed)
    state.first_cost(episode_tokens, config.num_continuations)
    while state.step < config.steps:
        trees, _ = train_step(config, state, policy, serving, data)
        for predictor in predictors.values():
            if predictor is not serving:
                anchors, *taught = lessons(trees, "fresh" if predictor is fresh else config.targets)
                predictor.update(features(anchors), *taught)
        yield state.step, predictors


def show(step, rows):
    """The scores of one point, a line per group of anchors."""
    names = list(dict.fromkeys(row["predictor"] for row in rows))
    print(f"step {step}: Brier, AUROC, bias, closed")
    print(" " * 26 + "".join(f" | {name:22}" for name in names))
    for i in range(0, len(rows), len(names)):
        print(f"{rows[i]['group']:20}{rows[i]['anchors']:6}", *(" ".join(
            f"{'-' if row[x] is None else format(row[x], '.2f'):>5}"
            for x in ("brier", "auroc", "bias", "closed"))
            for row in rows[i:i + len(names)]), sep=" |")


def run(args):
    config, evals = read_config(Config, args.run), Path(args.run) / "evals.jsonl"
    if not config.steps or not evals.exists() or not evals.stat().st_size:
        raise UsageError(f"{args.run}: a run that has taken no step yet")
    if min(args.points, args.anchors - 1, args.continuations - 1) < 1 or args.continuations % 2:
        raise UsageError("--points must be at least 1, --anchors 2, --continuations 2 and even")
    data = load_data(config)
    if len(data.eval) < args.anchors // 2:
        raise UsageError(f"--anchors {args.anchors}: half of them are roots, and the run holds out "
                         f"only {len(data.eval)} questions")
    policy, episode_tokens = load_policy(config), json.loads(evals.open().readline())["tokens"]
    points = {max(1, round(config.steps * (i + 1) / args.points)) for i in range(args.points)}
    table, bins = [], []
    for step, predictors in follow(config, policy, data, episode_tokens):
        if step in points:
            sample = draw_sample(policy, data, predictors, (config.seed, "score", step),
                                 args.anchors, args.continuations)
            show(step, rows := list(scores(sample)))
            table += [{"step": step, **row} for row in rows]
            bins += [{"step": step, **row} for row in reliability(sample)]
    if args.out:
        folder = Path(args.out)
        folder.mkdir(parents=True, exist_ok=True)
        write_rows(folder / "predictor.csv", table)
        write_rows(folder / "predictor_reliability.csv", bins)
        draw_course(table, folder / "predictor.png")
        draw_reliability([row for row in bins if row["step"] == step],
                         folder / "predictor_reliability.png")


def main(arguments=None):
    """-> exit code, as trace_mini.main."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("run", help="folder of a run of trace_mini.py; it is only read")
    parser.add_argument("--anchors", type=int, default=500, help="roots and prefixes [500]")
    parser.add_argument("--continuations", type=int, default=64, help="per anchor [64]")
    parser.add_argument("--points", type=int, default=4, help="pauses, evenly spread [4]")
    parser.add_argument("--out", default="", help="folder for two CSV files and two PNGs")
    try:
        run(parser.parse_args(arguments))
    except (UsageError, DataError, ModelError) as error:
        print(f"lab.score_predictor: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
