"""Which allocation gives the better gradient? Arms side by side on one policy that stands still.

`python -m lab.gradients RUN` takes the policy of a run folder; every arm draws batches of its budget,
its predictor learning online as in a run, and no gradient is ever applied. A row per arm and
advantage rule; all rules are measured on the very same trees:

    loss_share  loss tokens per sampled token
    snr         signal to noise of one batch: |E g|² / E|g − E g|²
    agreement   cosine of the arm's mean gradient E g with the reference; nan without a signal
    cosine_1    expected cosine of one batch with the reference, near agreement · √(snr / (1 + snr))
    cosine_10   the same for the mean of ten batches, about what the optimiser's momentum sees

each with a standard error (jackknife over batches). Squares and products of means are taken over
pairs of different batches, so that noise does not count as signal. The reference is the gradient
of the mean success on held-out questions: bare rollouts in groups, reward minus the group's
mean, divided by no standard deviation; its own noise is known from its two halves.
"""
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from engine.loading import ModelError
from engine.runs import (
    Parser,
    State,
    UsageError,
    load_checkpoint,
    parse_config,
    read_config,
    trim_memory,
)
from lab.tables import write_rows
from policy import load_policy
from predictor import PREDICTORS
from rollout import forget_caches, grow
from trace_mini import Config, train_step
from tree import ADVANTAGES, advantages, backup
from world.files import DataError
from world.questions import load_data

ARMS = {arm: f"--method {arm}" for arm in ("grpo", "pcl", "treepo", "root", "prefix", "trace")} | {
    "trace, pool 256": "--method trace --pool-size 256",
    "trace, beta": "--method trace --predictor beta"}
GROUP = 8  # rollouts per prompt of the reference


def record(policy):
    """From now on the policy's updates change nothing; -> list that collects the gradients."""
    kept = []
    policy.config.max_grad_norm = np.inf
    policy.optimizer.step = lambda: kept.append(torch.cat(
        [p.grad.flatten() for p in policy.trained]).double().cpu().numpy())
    return kept


def reference(policy, data, kept, seed):
    """-> [2, parameters]: the gradient of mean success, from two halves of the questions."""
    halves, size = np.zeros((2, sum(p.numel() for p in policy.trained))), 32
    for i in tqdm(range(0, len(data.eval), size), desc="reference", leave=False):
        roots = [policy.root(question, data.eval_env) for question in data.eval[i:i + size]]
        grow(policy, data.eval_env, roots, [GROUP] * len(roots), (seed, "reference"))
        forget_caches(roots)
        for root in roots:
            backup(root)
        credits = [credit for root in roots if (credit := advantages(root, "root_value"))]
        if credits:
            halves[i // size % 2] += policy.update(credits)["loss_tokens"] * kept.pop()
        trim_memory()
    return halves


def measure(config, policy, data, kept, num_warm, num_batches):
    """-> ({advantage rule: gradients [num_batches, parameters]}, loss share) of an arm."""
    predictor = PREDICTORS[config.predictor](policy=policy, env=data.env, seed=config.seed)
    state, loss_tokens, sampled_tokens = State(), 0, 0
    gradients = {rule: [] for rule in dict.fromkeys((config.advantage, *ADVANTAGES))}
    state.first_cost(50, config.num_continuations)
    for _ in tqdm(range(num_warm + num_batches), desc=config.method, leave=False):
        before = state.sampled_tokens
        roots, row = train_step(config, state, policy, predictor, data)
        first = kept.pop() if kept else np.zeros(sum(p.numel() for p in policy.trained))
        if state.step > num_warm:
            loss_tokens += row["loss_tokens"]
            sampled_tokens += state.sampled_tokens - before
            gradients[config.advantage].append(first)
            for rule in gradients:
                if rule != config.advantage:
                    policy.update([credit for root in roots if (credit := advantages(root, rule))])
                    gradients[rule].append(kept.pop() if kept else 0 * first)
        trim_memory()
    return {rule: np.array(rows) for rule, rows in gradients.items()}, loss_tokens / sampled_tokens


def compare(gradients, halves):
    """{measure: (value, standard error)} of gradients [n, parameters]."""
    n, direction = len(gradients), halves.sum(0)
    across = halves[0] @ halves[1] / np.linalg.norm(halves, axis=1).prod()
    trust = (2 * across / (1 + across)) ** 0.5  # cosine of the reference with its own mean
    products, along = gradients @ gradients.T, gradients @ direction / np.linalg.norm(direction)

    def scores(rows):
        own, pairs = products[np.ix_(rows, rows)], len(rows) * (len(rows) - 1)
        square = max(0.0, (own.sum() - own.trace()) / pairs)  # |E g|²
        noise = own.trace() / len(rows) - square
        gain = along[rows].mean() / trust
        agreement = gain / square ** 0.5 if square else np.nan
        return np.array([square / noise, agreement, gain / (square + noise) ** 0.5,
                         gain / (square + noise / 10) ** 0.5])

    without = np.array([scores(np.delete(np.arange(n), i)) for i in range(n)])
    errors = ((n - 1) * without.var(0)) ** 0.5
    return dict(zip(("snr", "agreement", "cosine_1", "cosine_10"),
                    zip(scores(np.arange(n)), errors)))


def run(args):
    arms = args.arms.split("; ") if args.arms else list(ARMS)
    if min(args.batches - 2, args.warm, args.prompts - 33) < 0:
        raise UsageError("--batches must be at least 2, --warm 0 and --prompts 33: two "
                         "batches of 32 check each other")
    if args.out and not Path(args.out).resolve().parent.is_dir():
        raise UsageError(f"--out {args.out}: no such folder")
    if unknown := set(arms) - set(ARMS):
        raise UsageError(f"--arms {min(unknown)}: choose from {'; '.join(ARMS)}")
    base = read_config(Config, args.run, eval_questions=args.prompts, final_eval_questions=0,
                       updates_per_batch=1, kl=0.0)
    world = ["--wiki-seed", str(base.wiki_seed), "--model", base.model, "--seed", str(base.seed),
             "--budget", args.budget]
    configs = {name: parse_config(Config, "", [*flags.split(), *world])
               for name, flags in ARMS.items() if name in arms}
    data, policy = load_data(base), load_policy(base)
    policy.load_state_dict(load_checkpoint(Path(args.run))["policy"])
    kept, rows = record(policy), []
    halves = reference(policy, data, kept, base.seed)
    for name, config in configs.items():
        found, loss_share = measure(config, policy, data, kept, args.warm, args.batches)
        for rule, gradients in found.items():
            scores = compare(gradients, halves)
            rows.append({"arm": name, "advantage": rule, "batches": len(gradients),
                         "loss_share": loss_share} | {
                key: value for measure, pair in scores.items()
                for key, value in zip((measure, measure + "_error"), pair)})
            print(f"{name:16}{rule:11} loss share {loss_share:.2f}  " + "  ".join(
                f"{measure} {value:.3f} ± {error:.3f}"
                for measure, (value, error) in scores.items()), flush=True)
        if args.out:
            write_rows(args.out, rows)


def main(arguments=None):
    """-> exit code: 0, or 2 for what the user can mend."""
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("run", help="run folder whose newest checkpoint is measured")
    parser.add_argument("--arms", default="", help="some of: " + "; ".join(ARMS))
    parser.add_argument("--budget", default="8000", help="tokens of a batch [%(default)s]")
    parser.add_argument("--batches", type=int, default=60, help="per arm [%(default)s]")
    parser.add_argument("--warm", type=int, default=15,
                        help="batches before them: only the predictor learns [%(default)s]")
    parser.add_argument("--prompts", type=int, default=2048,
                        help="held-out questions of the reference [%(default)s]")
    parser.add_argument("--out", help="a CSV file")
    try:
        run(parser.parse_args(arguments))
    except (UsageError, DataError, ModelError) as error:
        print(f"lab.gradients: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
