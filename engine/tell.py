"""What a run tells: the numbers of a step's trees, and the lines that it prints."""
import math
import os
import sys
from itertools import chain

from tqdm import tqdm

from engine.draw import tree_text
from engine.processes import team
from tree import has_contrast, leaves, nodes, path, path_ids

SHOW_EVERY = 10  # steps
LAPS = "sample", "predict", "allocate", "update"  # of a step: their seconds are its time
DIM, ALARM = "\033[2m", "\033[1;31m"  # what a terminal understands


def tree_metrics(pool, roots, bare, continuations):
    """What a step's trees look like, after backup; GUIDE.md explains each number. `pool`: pairs of
    Ṽ and m of all candidates. The bare rollouts stand root by root."""
    num_leaves, turns = len(bare) + len(continuations), list(chain(*map(nodes, roots)))
    rewards, mixed_groups = iter([leaf.reward for leaf in bare]), 0
    for root in roots:
        mixed_groups += len({next(rewards) for _ in root.children}) == 2
    return {"pool": [(round(float(v), 3), int(m)) for v, m in pool],
            "leaves": num_leaves, "active_prompts": len(roots),
            "leaves_per_prompt": num_leaves / len(roots),
            "reward_mean": sum(leaf.reward for leaf in bare) / len(bare),
            "effective_ratio": sum(map(has_contrast, roots)) / len(roots),
            "bare_effective_ratio": mixed_groups / len(roots),
            "mixed_of_8": sum(map(mixed_of_8, roots)) / len(roots),
            "cut_observations": sum(turn.cut_observation for turn in turns),
            "overflowed_episodes": sum(turn.overflowed for turn in turns)}


def mixed_of_8(root):
    """Chance that eight leaves of a tree, drawn at random, are mixed; all of them where there are
    fewer. So trees of many leaves compare with those of few."""
    num, wins = root.num_leaves, round(root.value * root.num_leaves)
    drawn = min(8, num)
    alike = math.comb(wins, drawn) + math.comb(num - wins, drawn)
    return 1 - alike / math.comb(num, drawn)


# ---------------------------------------------------------------- lines
def say(text):
    """A line that does not tear a progress bar."""
    if team().rank == 0:
        tqdm.write(text)


def progress_bar(*args, **options):
    """One for all processes."""
    return tqdm(*args, disable=team().rank > 0, **options)


def coloured(text, colour):
    """The text in a colour, where there is a terminal that wants one (no-color.org)."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"{colour}{text}\033[0m"


def describe_run(folder, config, device):
    """What is about to happen, in one line."""
    todo = f"{config.steps} steps of {config.budget:,} sampled tokens"
    return (f"{folder}: {config.method}, model {config.model}, data {config.data}, seed "
            f"{config.seed}, on {device}; {'evaluation' if config.eval_only else todo}")


def describe_scores(row):
    """An evaluation in one line."""
    if row["em"] is None:
        return "predictions without scores: the file tells no answers"
    after = ""
    if "sampled_tokens" in row:
        after = f" after {row['sampled_tokens']:,} sampled tokens"
    by_hops = [f"{hops}: {100 * em:.0f} %" for hops, em in row["by_hops"].items()]
    return (f"held-out exact match {100 * row['em']:.1f} %, F1 {100 * row['f1']:.1f} % on "
            f"{row['num_questions']:,} questions{after}; by hops {', '.join(by_hops)}")


def describe_step(row):
    """A training step in two lines of 80 columns: what happened, and what it cost."""
    seconds = [row[f"time_{name}_s"] for name in LAPS]
    happened = (f"step {row['step']:3d} | reward {row['reward_mean']:.2f} | Effective Ratio "
                f"{row['effective_ratio']:.2f} (bare {row['bare_effective_ratio']:.2f}, predicted "
                f"{row['predicted_effective_ratio']:.2f})")
    cost = (f"  {row['active_prompts']} prompts x {row['leaves_per_prompt']:.1f} leaves | "
            f"{row['sampled_tokens'] / 1000:,.0f} k tokens so far | {sum(seconds):.1f} s, "
            f"sampling {seconds[0]:.1f} s")
    lines = [happened, coloured(cost, DIM)]
    skipped = [name for name in ("update", "predictor") if row[f"{name}_skipped"]]
    if skipped:
        lines.append(coloured(f"  SKIPPED, as not finite: {', '.join(skipped)}", ALARM))
    return "\n".join(lines)


def show(policy, trees, step, with_tree):
    """Of the first of every SHOW_EVERY steps print an episode, and, if asked for, a tree: the first
    one with contrast if there is one."""
    if step % SHOW_EVERY != 1:
        return
    say(transcript(policy, path(leaves(trees[0])[0])))
    if with_tree:
        say(tree_text(next(filter(has_contrast, trees), trees[0]), policy.wrote))


def transcript(policy, line):
    """One episode, the nodes of its path, as text: what the policy wrote and was shown."""
    prompt = policy.text(path_ids(line[0]))
    texts = [prompt[prompt.rindex("Question: "):]]  # without the examples
    texts += [policy.text(node.ids) for node in line[1:]]
    question = line[-1].state.question
    return (f"--- an episode (reward {line[-1].reward:.0f}, answer: "
            f"{' / '.join(question.answers)})\n{''.join(texts)}\n---")
