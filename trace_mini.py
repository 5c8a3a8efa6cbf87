"""trace-mini: TRACE (arXiv 2606.11119) in a handful of files. Run me: python trace_mini.py

TRACE decides where in a forest of agent rollouts the next sample is worth most. `train_step`
below is its loop body, numbered like the method. Simplified, or chosen where the paper is silent:

 1. Sampling and update take turns, on one GPU or two CPU cores. Processes can share a step.
 2. The paper names the predictor's loss, not its network. --method trace has a linear layer with
    that loss, on the policy's hidden states; the default a logistic regression.
 3. A turn's advantage is (V̂(turn) − V̂(root)) / std. A turn that rollouts share is trained once.
 4. One update per batch, on-policy: no ratio to clip, no KL term. The learning rate decays.
 5. The budget of a step is in sampled tokens; the paper counts rollouts (M, N).
 6. A toy Wikipedia and a policy of 1.2 M parameters stand in for real questions and models.

Examples:
  python trace_mini.py --method grpo --seed 1
  python trace_mini.py --resume runs/trace-probe-toy-s0 --steps 60
  python trace_mini.py --model Qwen/Qwen2.5-0.5B-Instruct --data hotpot.json
"""
import sys
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from allocator import (CAP, PREFIX_RULES, ROOT_RULES, Anchors, deal_roots, expand_trees,
                       mixed_prob)
from engine.command_line import check_dials, dial, load_dials, parse_dials, run_main
from engine.errors import UsageError
from engine.files import write_json
from engine.memory import best_device, describe_memory, settled, trim_memory
from engine.processes import team
from engine.report import tree_rows
from engine.runs import (Journal, LapTimer, check_inputs, ctrl_c, fresh_folder, inputs_of,
                         known_of, load_checkpoint, save_run, start_folder)
from engine.schedule import Schedule, due_evaluations, parse_evaluations
from engine.tell import (describe_run, describe_scores, describe_step, progress_bar, say, show,
                         tree_metrics)
from policy import load_policy
from predictor import PREDICTORS, predict, score_and_update
from rollout import MOST_TOKENS, grow, prefill
from tree import ADVANTAGES, advantages, backup, prefixes, sampled_tokens
from world.cold_start import cold_start
from world.files import write_predictions
from world.questions import Prompts, load_data, summarise
from world.toy import HOP_MIX

HERE = Path(__file__).resolve().parent


class Arm(NamedTuple):
    """An arm is what --method names: a choice of rules. For one of your own write a function, put
    it into the dict named here, and choose it by its flag or by a line in ARMS."""
    root_rule: str    # key of allocator.ROOT_RULES
    prefix_rule: str  # key of allocator.PREFIX_RULES
    advantage: str    # key of tree.ADVANTAGES
    predictor: str = "head"  # key of predictor.PREDICTORS
    pool_size: int = 32      # candidates, where the root rule leaves the choice


ARMS = {
    "grpo": Arm("uniform", "none", "grpo"),
    "pcl": Arm("pcl", "none", "grpo"),
    "treepo": Arm("uniform", "random", "treepo"),
    "root": Arm("trace", "none", "grpo"),
    "prefix": Arm("uniform", "trace", "grpo"),
    "trace": Arm("trace", "trace", "grpo"),
    "trace-probe": Arm("trace", "trace", "grpo", "probe", 96),
    "oracle": Arm("trace", "trace", "grpo", "oracle"),
}
POOL = {"uniform": 1, "pcl": 4, "mopps": 4}  # candidates per group; other rules: the arm's


@dataclass
class Config:
    """Every dial of a run; the texts are what --help prints, the numbers behind them bounds."""
    model: str = dial("tiny", "basic", "tiny (in the box), a hub id, a folder, a .gguf file")
    data: str = dial("toy", "basic", "toy, or a file: HotpotQA, 2WikiMultihopQA, MuSiQue")
    eval_data: str = dial("", "basic", "file to evaluate on (default: a fifth of --data)")
    method: str = dial("trace-probe", "basic", "which arm", choices=ARMS)
    steps: int = dial(40, "basic", "training steps", free=True)
    budget: int = dial(8000, "basic", "tokens sampled per step", 1)
    seed: int = dial(0, "basic", "of everything that is random")
    wiki_seed: int = dial(0, "basic", "of the toy wiki")
    hop_mix: str = dial(HOP_MIX, "basic", "percent of tries for a chain of 1, 2, ... hops")
    out: str = dial("", "basic", "run folder (default: a new one in runs/)")
    resume: str = dial("", "basic", "run folder to go on with", free=True)
    cold_start: int = dial(0, "basic", "demonstrations before step 1 (toy only)")
    checkpoint_every: int = dial(10, "basic", "steps between checkpoints", 1, free=True)
    show_tree: bool = dial(False, "basic", "print a tree, too, with each episode", free=True)
    save_trees: int = dial(3, "basic", "trees of each step, for report.html", free=True)
    learning_rate: float = dial(None, "method", "at its peak (default: by the model)")
    num_continuations: int = dial(2, "method", "N: continuations per bare rollout", high=100)
    pool_size: int = dial(0, "method", "candidates (0: the arm's; not for uniform, pcl, mopps)")
    group_size: int = dial(8, "method", "leaves per prompt, about, of equal groups", 2)
    root_rule: str = dial("", "method", "stage 1 (default: the arm's)", choices=ROOT_RULES)
    prefix_rule: str = dial("", "method", "stage 2 (default: the arm's)", choices=PREFIX_RULES)
    advantage: str = dial("", "method", "credit (default: the arm's)", choices=ADVANTAGES)
    predictor: str = dial("", "method", "of success (default: the arm's)", choices=PREDICTORS)
    four_bit: bool = dial(True, "memory", "base weights in 16 or 32 bits")  # of --no-4bit
    turn_tokens: int = dial(0, "memory", "most per turn (0: by the model)", high=MOST_TOKENS)
    context: int = dial(0, "memory", "most tokens per path (0: by the model)")
    cache_tokens: int = dial(0, "memory", "of live episodes (0: what fits)", free=True)
    micro_batch_tokens: int = dial(4096, "memory", "per backward pass", 1, free=True)
    eval_questions: str = dial("0:500,25:100,50:100,75:100,100:500", "evaluation",
                               "percent of the steps:questions, ...; a number: both ends")
    eval_only: bool = dial(False, "evaluation", "train nothing, score --data", free=True)

    def __post_init__(self):
        arm = ARMS.get(self.method)
        for name in Arm._fields:  # the method fills in what is not named
            if arm and not getattr(self, name):
                setattr(self, name, getattr(arm, name))
        check_dials(self)
        self.evaluations = parse_evaluations(self.eval_questions)
        if self.prefix_rule == "none":
            self.num_continuations = 0
        if self.bare_group > CAP:
            raise UsageError(f"--group-size: at most {CAP} bare rollouts per prompt, got "
                             f"{self.bare_group}")
        if self.eval_data and (self.data == "toy" or self.scores_others):
            raise UsageError("--eval-data goes with training on a --data file")

    @property
    def scores_others(self):
        """--eval-only of other questions, whole, not of those that a run held out."""
        return self.eval_only and (self.out != "" or not self.resume)

    @property
    def bare_group(self):
        """Bare rollouts per prompt where groups are equal."""
        return max(2, round(self.group_size / (1 + self.num_continuations)))


class State(NamedTuple):
    """What a run carries from step to step besides the weights."""
    prompts: Prompts    # the shuffled questions, and what came of each
    schedule: Schedule  # steps and tokens so far, and what a rollout costs

    @classmethod
    def begin(cls, config, data, episode_tokens=50.0):  # a guess of what an episode costs
        schedule = Schedule(config.budget, config.num_continuations)
        schedule.guess(episode_tokens)
        return cls(Prompts(data.train, config.seed), schedule)

    def state_dict(self):
        return {"prompts": self.prompts.state_dict(), "schedule": vars(self.schedule)}

    def load_state_dict(self, saved):
        self.prompts.load_state_dict(saved["prompts"])
        vars(self.schedule).update(saved["schedule"])


# ---------------------------------------------------------------- the loop
def train_step(config, state, policy, predictor, data):
    """One step of TRACE -> (trees, metrics). The numbers are those of the method's steps."""
    lap, step = LapTimer(), state.schedule.step
    key, rng = (config.seed, step), np.random.default_rng([config.seed, 2, step])

    # 1. Draw a candidate pool of prompts, more than the budget can roll out.
    num_bare = state.schedule.num_bare()
    pool = draw_pool(config, state, policy, data, num_bare)
    prefill(policy, pool)
    v = predict(predictor, pool)
    lap("predict")

    # 2. Stage 1: how many bare rollouts each prompt gets.
    wins, losses = state.prompts.seen(pool)
    anchors = Anchors(v, successes=wins, failures=losses, group_size=config.bare_group)
    m = deal_roots(anchors, num_bare, config.root_rule, rng)
    roots = [root for root, count in zip(pool, m) if count]
    pool = zip(v, m)  # of the others nothing else stays, above all no cache
    v, m = v[m > 0], m[m > 0]
    lap("allocate")

    # 3. Sample the bare rollouts.
    bare = grow(policy, data.env, roots, m, key, keep=True)
    state.prompts.record(roots)
    lap("sample")

    # 4. Stage 2: how many continuations each prefix of these rollouts gets.
    found = [prefixes(root) for root in roots]
    anchors = [prefix.node for prefix in chain(*found)]
    chances = predict(predictor, anchors)
    lap("predict")
    k = expand_trees(found, chances, m, config.num_continuations, config.prefix_rule, rng)
    lap("allocate")

    # 5. Sample the continuations, from the prefixes themselves.
    continuations = grow(policy, data.env, anchors, k, key)
    lap("sample")

    # 6. Targets, bottom up.
    for root in roots:
        backup(root)

    # 7. The predictor: scored on what it has not seen yet, then updated.
    scores = score_and_update(predictor, roots)
    lap("predict")

    # 8. The policy: tree credit, and one update.
    updated = policy.update([advantages(root, config.advantage) for root in roots],
                            policy.learning_rate * state.schedule.rate(config.steps))
    lap("update")

    finite = not (updated["update_skipped"] or scores["predictor_skipped"])
    state.schedule.advance(len(bare), sum(map(sampled_tokens, roots)), finite)
    return roots, {"step": step + 1, "method": config.method, "seed": config.seed,
                   "sampled_tokens": state.schedule.sampled_tokens,
                   "predicted_effective_ratio": float(mixed_prob(v, m).mean()),
                   "coverage": state.prompts.coverage, **scores, **updated, **lap.metrics(),
                   **tree_metrics(pool, roots, bare, continuations)}


def draw_pool(config, state, policy, data, num_bare):
    """Roots of candidate prompts, enough for all bare rollouts that the schedule buys."""
    size = POOL.get(config.root_rule, 0) * max(1, num_bare // config.bare_group)
    questions = state.prompts.draw(max(size or config.pool_size, -(-num_bare // CAP)))
    return [policy.root(question, data.env) for question in questions]


# ---------------------------------------------------------------- evaluation
def evaluate(policy, env, questions, progress=None, first=None):
    """Greedy episodes -> {tokens (sampled, per episode), predictions} and what `summarise` says."""
    scores, predictions, tokens = {}, {}, 0
    for i in range(0, len(questions), 500):
        roots = [policy.root(question, env) for question in questions[i:i + 500]]
        for leaf in grow(policy, env, roots, [1] * len(roots), greedy=True, progress=progress):
            question = leaf.state.question
            predictions[question.id] = leaf.state.prediction
            scores[question.id] = question.score(leaf.state.prediction)
        tokens += sum(map(sampled_tokens, roots))
    return summarise(questions, scores, first) | {"tokens": tokens / len(questions),
                                                  "predictions": predictions}


def score(policy, env, questions, folder, first=None):
    """`evaluate` with a bar; the predictions go to the folder in the official form."""
    with progress_bar(total=len(team().part(questions)), desc="evaluate", leave=False) as bar:
        result = evaluate(policy, env, questions, bar.update, first)
    write_predictions(folder, questions, result.pop("predictions"))
    return result


# ---------------------------------------------------------------- a run and its folder
def train(config, policy, data, folder, saved=None, stopped=()):
    """Train in a run folder, from the start or from a checkpoint on, to the last step or until
    there is something in `stopped`."""
    state = State.begin(config, data)
    predictor = PREDICTORS[config.predictor](policy, data.env, config.seed)
    parts = {"state": state, "policy": policy, "predictor": predictor}
    known, step = known_of(config, policy, data), 0
    journal = Journal(folder, saved["lengths"] if saved else {})
    if saved:
        step = saved["state"]["schedule"]["step"]
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    elif config.cold_start:
        cold_start(policy, config.cold_start, config.seed, folder, stopped)

    def assess(num):
        scores = score(policy, data.eval_env, data.eval[:num], folder, min(due.values()))
        row = {"step": step, "sampled_tokens": state.schedule.sampled_tokens, **scores}
        journal.write("evals", row)
        say(describe_scores(row))
        return row

    due = due_evaluations(config.evaluations, config.steps)
    if journal.is_new:
        save_run(folder, 0, known, journal, parts)  # before it evaluates: it may be killed there
        state.schedule.guess(assess(due[0])["tokens"])
        save_run(folder, 0, known, journal, parts)
    for step in progress_bar(range(step + 1, config.steps + 1), config.method, config.steps,
                             initial=step, unit="step"):
        trees, row = train_step(config, state, policy, predictor, data)
        trim_memory()
        say(describe_step(row))
        show(policy, trees, step, config.show_tree)
        last, stop = step == config.steps, team().any(stopped)  # once: it may change at any moment
        if step in due:
            result = assess(due[step])
            row |= {"eval_em": result["em"], "eval_f1": result["f1"]}
        journal.write("metrics", row)
        journal.write("trees", tree_rows(policy, trees[:config.save_trees], step))
        if last or stop or state.schedule.broken or step % config.checkpoint_every == 0:
            save_run(folder, step, known, journal, parts)
        state.schedule.check(folder)
        if stop and not last:
            return say(f"saved after step {step}; python trace_mini.py --resume {folder} goes on")
    say(f"done: {folder} holds report.html, curve.png, metrics.jsonl, predictions and adapter/")


# ---------------------------------------------------------------- command line
parse_config = partial(parse_dials, Config, __doc__)  # (arguments) -> Config
read_config = partial(load_dials, Config)  # (run folder) -> Config


def run(config):
    """What the command does: train, go on, or score."""
    saved = load_checkpoint(config.resume) if config.resume else None
    if saved and not config.eval_only and saved["state"]["schedule"]["step"] >= config.steps:
        return say(f"{config.resume}: already at its last step; --steps N goes further")
    goes_on = config.resume and not config.scores_others
    folder = Path(config.resume) if goes_on else fresh_folder(config)
    say(describe_run(folder, config, best_device()))
    data, policy = load_data(config), load_policy(config)
    data = data.that_fit(policy)
    check_inputs(config.resume, saved, inputs_of(policy, data))
    if saved:
        policy.load_state_dict(saved["policy"])
    if not (goes_on and config.eval_only):
        start_folder(folder, asdict(config), fresh=not goes_on)
    say(describe_memory(policy) + policy.notice + data.notice)
    if not config.eval_only:
        with ctrl_c() as stopped, settled():
            return train(config, policy, data, folder, saved, stopped)
    write_json(folder / "eval.json", result := score(policy, data.eval_env, data.eval, folder))
    say(describe_scores(result))


def main(arguments=None):
    """-> exit code, as run_main has it."""
    return run_main("trace_mini.py", lambda: run(parse_config(arguments)),
                    "; a run goes on with --resume DIR")


if __name__ == "__main__":
    sys.exit(main())
