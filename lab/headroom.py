"""Is allocation worth it on my model and data? python -m lab.headroom --model M --data FILE

Takes the flags of trace_mini.py; with --resume DIR it asks the policy of that run. It rolls out
some questions many times. Of the rollouts of a prompt, one half tells how the exact optimum would
deal, and the other half what that is worth: so chance alone gains nothing. The truth, known
better, gains at least as much.

headroom of stage 1  expected mixed groups of the exact optimum over those of equal groups on random
                     prompts, at the same number of bare rollouts. Near 1 there is little to win
headroom of stage 2  expected flips of the exact optimum over those of random prefixes, likewise

Both are nan where nothing was ever solved, or everything always.
"""
import sys
import time
from math import comb

import numpy as np
from tqdm import tqdm

from allocator import CAP, allocate_roots, expand_prefixes
from engine.command_line import Parser, run_main
from engine.errors import UsageError
from engine.files import write_json
from engine.runs import check_inputs, inputs_of, load_checkpoint
from policy import load_policy
from predictor import monte_carlo_value
from rollout import grow
from trace_mini import parse_config
from tree import prefixes
from world.questions import Prompts, load_data

GROUP = 8           # bare rollouts of a prompt where groups are equal
PER_PROMPT = 2, 4, 8  # bare rollouts per candidate that are dealt: few mean a large pool
BARE = 3            # bare rollouts per prompt whose prefixes are measured, near what stage 1 deals
PER_BARE = 2        # continuations per bare rollout, the default
BATCH = 16          # anchors that are measured between two moves of the bar
MOST_TREES = 40     # prompts whose prefixes are measured


def alike(wins, num, k):
    """Chance that k of `num` outcomes, drawn without putting back, are all among the `wins`: of p^k
    an estimate without bias. int arrays [n] -> [n]"""
    return np.array([comb(w, draw) / comb(num, draw) for w, draw in zip(wins, k)])


def mixed(wins, num, m):
    """Estimate of mixed_prob, likewise."""
    return np.where(m > 1, 1 - alike(wins, num, m) - alike(num - wins, num, m), 0.0)


def headroom_of_roots(wins, num, per_prompt):
    """wins [2, n] of `num` rollouts each -> expected mixed groups of the optimum by one half, told
    by the other, over those of equal groups, at per_prompt * n rollouts."""
    found = 0.0
    for known, told in (wins, wins[::-1]):
        found += mixed(told, num, allocate_roots(known / num, per_prompt * len(known))).sum() / 2
    equal = np.mean(mixed(wins.ravel(), num, np.full(wins.size, GROUP)))
    return found / (equal * per_prompt * wins.shape[1] / GROUP) if equal else float("nan")


def headroom_of_prefixes(trees, num):
    """trees: (wins [2, prefixes], outcomes [prefixes]) of each prompt -> expected flips of the
    optimum by one half, told by the other, over those of random prefixes."""
    found, random = 0.0, 0.0
    for wins, outcomes in trees:
        for known, told in (wins, wins[::-1]):
            repeats = np.where(outcomes == 1, told, num - told)
            k = expand_prefixes(known / num, outcomes, PER_BARE * BARE)
            found += (1 - alike(repeats, num, k)).sum()
            random += expected_random(repeats, num)
    return found / random if random else float("nan")


def expected_random(repeats, num):
    """Expected flips of PER_BARE * BARE continuations, each at a random one of these prefixes,
    whose outcome so many of `num` continuations repeat: k at a prefix is binomial."""
    budget, n, flips = PER_BARE * BARE, len(repeats), 0.0
    for k in range(budget + 1):
        chance = comb(budget, k) * (1 / n) ** k * (1 - 1 / n) ** (budget - k)
        flips += chance * (1 - alike(repeats, num, np.full(n, k))).sum()
    return flips


def measure(config, num_questions, num_rollouts):
    """-> {what: number}"""
    if config.eval_only or (config.cold_start and not config.resume):
        raise UsageError("headroom is that of the questions to train on, with a policy as it is: "
                         "no --eval-only, no --cold-start")
    data, policy = load_data(config), load_policy(config)
    data = data.that_fit(policy)
    if config.resume:
        saved = load_checkpoint(config.resume)
        check_inputs(config.resume, saved, inputs_of(policy, data))
        policy.load_state_dict(saved["policy"])
    began, half = time.time(), num_rollouts // 2
    questions = Prompts(data.train, config.seed).draw(num_questions)
    roots = [policy.root(question, data.env) for question in questions]

    def count(anchors, what):
        """Successes [2, n] of `half` fresh rollouts each, twice."""
        wins = []
        for i in tqdm(range(0, len(anchors), BATCH), what, leave=False):
            some = anchors[i:i + BATCH] * 2
            values = monte_carlo_value(policy, data.env, some, half, (config.seed, what, i))
            wins.append(np.rint(values * half).astype(int).reshape(2, -1))
        return np.concatenate(wins, 1)

    wins = count(roots, "questions")
    total = wins.sum(0)
    grow(policy, data.env, roots[:MOST_TREES], [BARE] * len(roots[:MOST_TREES]), (config.seed, 0))
    trees, num_prefixes = [], 0
    for root in tqdm(roots[:MOST_TREES], "prefixes", leave=False):
        found = prefixes(root)
        if found:
            outcomes = np.array([prefix.outcome for prefix in found], int)
            trees.append((count([prefix.node for prefix in found], root.state.question.id),
                          outcomes))
            num_prefixes += len(found)
    found = {"questions": len(roots), "prefixes": num_prefixes, "rollouts": 2 * half,
             "dead": np.mean(total == 0), "mastered": np.mean(total == 2 * half),
             "reward": total.mean() / (2 * half),
             "mixed_of_8": mixed(total, 2 * half, np.full(len(total), GROUP)).mean()}
    for per_prompt in PER_PROMPT:
        found[f"roots_{per_prompt}"] = headroom_of_roots(wins, half, per_prompt)
    return found | {"prefix_flips": headroom_of_prefixes(trees, half),
                    "minutes": (time.time() - began) / 60}


def describe(found):
    """-> lines"""
    yield (f"{found['questions']} questions and {found['prefixes']} prefixes, {found['rollouts']} "
           f"rollouts each, in {found['minutes']:.1f} minutes")
    yield (f"dead (never solved): {100 * found['dead']:.0f} %, mastered (always): "
           f"{100 * found['mastered']:.0f} %, mean reward {found['reward']:.2f}")
    yield f"Effective Ratio of groups of eight: {found['mixed_of_8']:.2f}"
    for per_prompt in PER_PROMPT:
        yield (f"headroom of stage 1, {per_prompt} bare rollouts per candidate: "
               f"{found[f'roots_{per_prompt}']:.2f}")
    yield (f"headroom of stage 2, {PER_BARE} continuations per bare rollout: "
           f"{found['prefix_flips']:.2f}")


def main(arguments=None):
    """-> exit code, as trace_mini.main."""
    parser = Parser(__doc__, prog="lab.headroom", epilog="and all flags of trace_mini.py")
    parser.add_argument("--questions", type=int, default=100, help="[%(default)s]")
    parser.add_argument("--rollouts", type=int, default=64, help="of each, in two halves [64]")
    parser.add_argument("--json", metavar="FILE", help="to write the numbers to, too")
    args, others = parser.parse_known_args(arguments)

    def work():
        if args.questions < 2 or args.rollouts < 2 * CAP:  # one half must hold the largest group
            raise UsageError(f"--questions must be at least 2, --rollouts {2 * CAP}")
        found = measure(parse_config(others), args.questions, args.rollouts)
        print(*describe(found), sep="\n")
        if args.json:
            write_json(args.json, found)
    return run_main("lab.headroom", work)


if __name__ == "__main__":
    sys.exit(main())
