"""trace-mini: TRACE (arXiv 2606.11119) in a handful of files. Run me: python trace_mini.py

TRACE decides where in a forest of agent rollouts the next sample is worth most.
`train_step` below is its loop body, numbered like the method. What is simplified against
the paper, or left open by it and chosen here:

 1. One process and one GPU (or two CPU cores); sampling and update take turns.
 2. The predictor is a normalisation and one linear layer on the policy's own hidden states at the
    prompt and at the anchor, and three plain numbers (paper: not public).
 3. The tree-aware advantage is one of five by name (paper: not public). By default a turn y
    gets (V̂(y) − V̂(root)) / std: GRPO's advantage, averaged over the leaves below the turn.
    A turn that several rollouts share is trained once.
 4. One update per batch, on-policy: there is no ratio to clip, and no KL term.
 5. The budget of a step is in sampled tokens; the paper counts rollouts (M, N).
 6. Pool size, group size and learning rate were tried on a development wiki (results/PROTOCOL.md).
 7. Both stages are solved exactly: a prompt gets no bare rollout or at least two, and one that
    has no prefix hands its continuations back (paper: solvers not public).
 8. A generated toy Wikipedia and a policy of 1.2 M parameters stand in for the paper's multi-hop
    questions and models of 8 and 14 B; real files and models are a flag away.
"""
import argparse
import json
import sys
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, fields
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from allocator import CAP, PREFIX_RULES, ROOT_RULES, Anchors, Budget, expand_trees, mixed_prob
from engine.command_line import Parser, add_dials, check_dials, dial, flag_of, run_main
from engine.draw import draw_curve, tree_text
from engine.errors import NotFinite, UsageError, first_line
from engine.files import write_json
from engine.memory import best_device, trim_memory
from engine.runs import (Journal, LapTimer, ctrl_c, describe, fresh_folder, load_checkpoint,
                         save_checkpoint, say, start_folder, transcript)
from policy import load_policy
from predictor import PREDICTORS, predict, score_and_update
from rollout import MOST_TOKENS, grow, prefill
from tree import (ADVANTAGES, advantages, backup, has_contrast, leaves, nodes, path, prefixes,
                  sampled_tokens)
from world.files import write_predictions
from world.questions import Prompts, load_data

HERE = Path(__file__).resolve().parent
SHOW_EVERY = 10  # steps between printed episodes
MOST_BAD = 10    # steps in a row whose numbers are not finite, then a run stops by itself


class Arm(NamedTuple):
    """A method is a choice of names. One's own: a function and its line in the dict named
    here, then a flag of the same name, or a line in ARMS."""
    root_rule: str    # key of allocator.ROOT_RULES
    prefix_rule: str  # key of allocator.PREFIX_RULES
    advantage: str    # key of tree.ADVANTAGES
    predictor: str = "head"  # key of predictor.PREDICTORS


ARMS = {
    "grpo": Arm("uniform", "none", "grpo"),
    "pcl": Arm("pcl", "none", "grpo"),
    "treepo": Arm("uniform", "random", "treepo"),
    "root": Arm("trace", "none", "grpo"),
    "prefix": Arm("uniform", "trace", "grpo"),
    "trace": Arm("trace", "trace", "grpo"),
    "oracle": Arm("trace", "trace", "grpo", "oracle"),
}
POOL = {"uniform": 1, "pcl": 4, "mopps": 4}  # candidates per group; other rules: --pool-size
MEMORY = {"cache_tokens", "micro_batch_tokens"}  # dials that change no number but rounding
FREE = MEMORY | {"resume", "steps", "eval_only"}  # dials that may change when a run goes on
EXAMPLES = """\
examples:
  python trace_mini.py --method grpo --seed 1          plain GRPO on the toy wiki
  python trace_mini.py --resume runs/trace-toy-s0 --steps 60
  python trace_mini.py --model Qwen/Qwen2.5-0.5B-Instruct --data hotpot.json"""


@dataclass
class Config:
    """Every dial of a run; the texts are what --help prints."""
    model: str = dial("tiny", "basic", "tiny (embedded), a hub id, or a folder")
    data: str = dial("toy", "basic", "toy, or a HotpotQA / 2WikiMultihopQA .json or MuSiQue "
                     ".jsonl file")
    eval_data: str = dial("", "basic", "another file to evaluate on (default: a fifth of --data)")
    method: str = dial("trace", "basic", "which arm", choices=ARMS)
    steps: int = dial(40, "basic", "training steps", 0)
    budget: int = dial(8000, "basic", "tokens sampled per step (thoughts and actions)", 1)
    seed: int = dial(0, "basic", "seed of everything that is random", 0)
    wiki_seed: int = dial(0, "basic", "seed of the toy wiki", 0)
    out: str = dial("", "basic", "run folder (default: runs/METHOD-DATA-sSEED, numbered if it "
                    "exists)")
    resume: str = dial("", "basic", "run folder to continue")
    checkpoint_every: int = dial(10, "basic", "steps between checkpoints", 1)
    show_tree: bool = dial(False, "basic", "also print the tree of a prompt with contrast, every "
                           f"{SHOW_EVERY} steps")

    learning_rate: float = dial(None, "method", "of AdamW on the LoRA weights (default: 1.2e-3 "
                                "for tiny, else 1e-4)", 0)
    num_continuations: int = dial(2, "method", "N: continuations per bare rollout", 0)
    pool_size: int = dial(32, "method", "candidate prompts per step (but pcl and mopps draw four, "
                          "uniform one, for every group they can pay)", 1)
    group_size: int = dial(8, "method", "leaves per prompt, about, of the arms with equal groups",
                           2)
    root_rule: str = dial("", "method", "stage 1 (default: the arm's own)", choices=ROOT_RULES)
    prefix_rule: str = dial("", "method", "stage 2 (default: the arm's own)", choices=PREFIX_RULES)
    advantage: str = dial("", "method", "tree credit (default: the arm's own)", choices=ADVANTAGES)
    predictor: str = dial("", "method", "default: the arm's own, mostly head", choices=PREDICTORS)

    four_bit: bool = dial(True, "memory", "load the base weights in 16 or 32 bits, without "
                          "bitsandbytes")  # the text is that of --no-4bit
    turn_tokens: int = dial(0, "memory", "tokens per turn at most (0: 40 for tiny, else 128)", 0,
                            MOST_TOKENS)
    context: int = dial(0, "memory", "tokens per path at most (0: 768 for tiny, else 4096)", 0)
    cache_tokens: int = dial(0, "memory", "cache columns of the episodes sampled together (0: as "
                             "many as fit, at most 131072)", 0)
    micro_batch_tokens: int = dial(4096, "memory", "tokens per backward pass", 1)

    eval_questions: int = dial(500, "evaluation", "held-out questions per evaluation", 1)
    final_eval_questions: int = dial(0, "evaluation", "held-out questions after the last step, "
                                     "where more than --eval-questions, the first of them", 0)
    eval_every: int = dial(0, "evaluation", "steps between evaluations (0: before and after "
                           "only)", 0)
    eval_only: bool = dial(False, "evaluation", "train nothing, score the whole --data file; of a "
                           "resumed run without one, the questions that it held out")

    def __post_init__(self):
        arm = ARMS.get(self.method)
        for name in Arm._fields:  # the method fills in what is not named
            if arm and not getattr(self, name):
                setattr(self, name, getattr(arm, name))
        check_dials(self)
        if self.prefix_rule == "none":
            self.num_continuations = 0
        if self.eval_data and (self.data == "toy" or self.scores_a_file):
            raise UsageError("--eval-data goes with training on a --data file; without one, or "
                             "with --eval-only, name the file as --data")

    @property
    def scores_a_file(self):
        """--eval-only of a whole file, not of the questions that a run held out."""
        return self.eval_only and (self.out != "" or not self.resume)


@dataclass
class State:
    """What a run carries from step to step besides the weights."""
    prompts: Prompts  # the shuffled questions, and what came of each
    budget: Budget    # what a rollout costs
    step: int = 0
    sampled_tokens: int = 0
    bad_steps: int = 0  # in a row, with numbers that were not finite

    @classmethod
    def begin(cls, config, data, episode_tokens=50.0):
        """`episode_tokens`: a guess of what an episode costs."""
        return cls(Prompts(data.train, config.seed),
                   Budget.guess(episode_tokens, config.num_continuations))

    def advance(self, num_bare, tokens):
        """One step is done: what it spent."""
        self.step += 1
        if not tokens:
            raise UsageError(f"step {self.step}: no question left room for a turn; --context must "
                             "be larger or --turn-tokens smaller, in a new run")
        self.sampled_tokens += tokens
        self.budget.spent(num_bare, tokens)

    def state_dict(self):
        return vars(self) | {"prompts": self.prompts.state_dict(), "budget": vars(self.budget)}

    @classmethod
    def load(cls, config, data, saved):
        prompts = Prompts(data.train, config.seed)
        prompts.load_state_dict(saved["prompts"])
        return cls(**saved | {"prompts": prompts, "budget": Budget(**saved["budget"])})


# ---------------------------------------------------------------- the loop
def train_step(config, state, policy, predictor, data):
    """One step of TRACE -> (trees, metrics). The numbers are those of the method's steps."""
    lap, key = LapTimer(), (config.seed, state.step)
    rng = np.random.default_rng([config.seed, 2, state.step])

    # 1. Draw a candidate pool of prompts. The schedule is `budget` tokens per step from the
    #    start: what earlier steps overspent or left is carried over.
    tokens_left = config.budget * (state.step + 1) - state.sampled_tokens
    num_bare = state.budget.num_bare(tokens_left)
    pool = draw_pool(config, state, policy, data, num_bare)
    prefill(policy, pool)
    v, sure = predict(predictor, pool)
    lap("predict")

    # 2. Stage 1: how many bare rollouts each prompt gets.
    m = allocate_pool(config, state, pool, v, sure, num_bare, rng)
    roots = [root for root, count in zip(pool, m) if count]
    v, m = v[m > 0], m[m > 0]
    lap("allocate")

    # 3. Sample the bare rollouts.
    bare = grow(policy, data.env, roots, m, key, keep=True)
    state.prompts.record(roots)
    lap("sample")

    # 4. Stage 2: how many continuations each prefix of these rollouts gets.
    found = [prefixes(root) for root in roots]
    anchors = [prefix.node for prefix in chain(*found)]
    chances, sure = predict(predictor, anchors)
    lap("predict")
    k = allocate_prefixes(config, found, chances, sure, m, rng)
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
    updated = policy.update([advantages(root, config.advantage) for root in roots])
    lap("update")

    state.advance(len(bare), sum(map(sampled_tokens, roots)))
    return roots, {"step": state.step, "method": config.method, "seed": config.seed,
                   "sampled_tokens": state.sampled_tokens,
                   **measure(roots, v, m, bare, continuations), **scores, **updated,
                   "coverage": state.prompts.coverage, **lap.metrics()}


def bare_group(config):
    """Bare rollouts per prompt of the arms with equal groups."""
    return max(2, round(config.group_size / (1 + config.num_continuations)))


def draw_pool(config, state, policy, data, num_bare):
    """Roots of candidate prompts, enough for all bare rollouts that the schedule buys."""
    size = config.pool_size
    if config.root_rule in POOL:
        size = POOL[config.root_rule] * max(1, num_bare // bare_group(config))
    questions = state.prompts.draw(max(size, -(-num_bare // CAP)))
    return [policy.root(question, data.env) for question in questions]


def allocate_pool(config, state, pool, v, sure, num_bare, rng):
    """Stage 1 by the run's rule -> m [pool]."""
    wins, losses = state.prompts.seen(pool)
    anchors = Anchors(v, successes=wins, failures=losses, concentration=sure,
                      group_size=bare_group(config))
    return ROOT_RULES[config.root_rule](anchors, num_bare, rng)


def allocate_prefixes(config, found, v, sure, m, rng):
    """Stage 2 by the run's rule -> k [n], for the n prefixes `found` tree by tree."""
    owner = np.repeat(np.arange(len(found)), [len(some) for some in found])
    outcome = np.array([prefix.outcome for prefix in chain(*found)], int)
    cost = np.array([max(1, prefix.tokens_left) for prefix in chain(*found)])
    anchors = Anchors(v, outcome, cost=cost, concentration=sure)
    return expand_trees(anchors, owner, m, config.num_continuations, config.prefix_rule, rng)


def measure(roots, v, m, bare, continuations):
    """What a step's trees look like; GUIDE.md explains each number."""
    num_leaves = len(bare) + len(continuations)
    turns = [node for root in roots for node in nodes(root)[1:]]
    predicted = mixed_prob(v, [root.num_leaves for root in roots])
    return {"leaves": num_leaves,
            "reward_mean": float(np.mean([leaf.reward for leaf in bare])),
            "effective_ratio": float(np.mean([has_contrast(root) for root in roots])),
            "predicted_effective_ratio": float(np.mean(predicted)),
            "active_prompts": len(roots), "group_sizes": dict(sorted(Counter(m.tolist()).items())),
            "leaves_per_prompt": num_leaves / len(roots),
            "cut_observations": sum(node.cut_observation for node in turns),
            "overflowed_episodes": sum(node.overflowed for node in turns)}


# ---------------------------------------------------------------- evaluation
def evaluate(policy, env, questions, progress=None, first=None):
    """Greedy episodes -> {em, em_first (of the `first` questions), f1 (0 to 1), tokens (sampled,
    per episode), by_hops, by_kind, by_trap (exact match of groups; toy questions name the traps
    they hold), predictions}."""
    scores, predictions, tokens, size = {}, {}, 0, policy.num_live
    for i in range(0, len(questions), size):
        roots = [policy.root(question, env) for question in questions[i:i + size]]
        for leaf in grow(policy, env, roots, [1] * len(roots), greedy=True):
            question = leaf.state.question
            predictions[question.id] = leaf.state.prediction or ""
            scores[question.id] = question.score(leaf.state.prediction)
        tokens += sum(map(sampled_tokens, roots))
        if progress:
            progress(len(roots))
    hops, kinds, traps = defaultdict(list), defaultdict(list), defaultdict(list)
    for question in questions:
        em = scores[question.id]["em"]
        hops[str(question.num_hops)].append(em)
        kinds[question.kind].append(em)
        for trap in getattr(question, "traps", ()):
            traps[trap].append(em)
    ems = [scores[question.id]["em"] for question in questions]
    return {"em": mean(ems), "em_first": mean(ems[:first]),
            "f1": mean([score["f1"] for score in scores.values()]),
            "tokens": tokens / len(questions), "by_hops": means(hops), "by_kind": means(kinds),
            "by_trap": means(traps), "predictions": predictions}


def mean(values):
    return float(np.mean(values))


def means(groups):
    return {name: mean(values) for name, values in sorted(groups.items())}


# ---------------------------------------------------------------- a run and its folder
def train(config, policy, data, folder, saved=None, stopped=()):
    """Train in a run folder, from the start or from a checkpoint on, to the last step or until
    there is something in `stopped`."""
    predictor = PREDICTORS[config.predictor](policy, data.env, config.seed)
    state = State.begin(config, data)
    if saved:
        state = State.load(config, data, saved["state"])
        policy.load_state_dict(saved["policy"])
        predictor.load_state_dict(saved["predictor"])
    journal = Journal(folder, saved["lengths"] if saved else None)

    def save():
        policy.save_adapter(folder / "adapter")
        draw_curve(folder)
        save_checkpoint(folder, state.step, {
            "config": own_dials(config), "state": state.state_dict(), "lengths": journal.sync(),
            "policy": policy.state_dict(), "predictor": predictor.state_dict()})

    def score(questions):
        with tqdm(total=len(questions), desc="evaluate", unit="question", leave=False) as bar:
            result = evaluate(policy, data.eval_env, questions, bar.update, config.eval_questions)
        write_predictions(folder, questions, result.pop("predictions"))
        journal.write("evals", {"step": state.step, "sampled_tokens": state.sampled_tokens,
                                "num_questions": len(questions), **result})
        by_hops = [f"{hops}: {100 * em:.0f} %" for hops, em in result["by_hops"].items()]
        say(f"held-out exact match {100 * result['em']:.1f} %, F1 {100 * result['f1']:.1f} % after "
            f"{state.sampled_tokens:,} sampled tokens; by hops {', '.join(by_hops)}")
        return result

    some = data.eval[:config.eval_questions]
    if journal.sync()["evals"] == 0:
        save()
        state = State.begin(config, data, score(some)["tokens"])
        save()
    for _ in tqdm(range(state.step, config.steps), initial=state.step, total=config.steps,
                  desc=config.method, unit="step"):
        trees, row = train_step(config, state, policy, predictor, data)
        trim_memory()
        say(describe(row))
        if state.step % SHOW_EVERY == 0:
            show(trees, policy, config.show_tree)
        bad = row["update_skipped"] or row["predictor_skipped"]
        state.bad_steps = state.bad_steps + 1 if bad else 0
        last, broken = state.step == config.steps, state.bad_steps >= MOST_BAD
        stop = bool(stopped)  # once: Ctrl-C may come at any moment
        if last or (config.eval_every and state.step % config.eval_every == 0):
            result = score(data.eval if last and config.final_eval_questions else some)
            row.update(eval_em=result["em"], eval_f1=result["f1"])
        journal.write("metrics", row)
        if last or stop or broken or state.step % config.checkpoint_every == 0:
            save()
        if broken:
            raise NotFinite(f"{folder}: saved and stopped after step {state.step}: in the last "
                            f"{state.bad_steps} steps a loss or gradient was not finite, and they "
                            "taught nothing; try a new run with a smaller --learning-rate")
        if stop and not last:
            return say(f"saved after step {state.step}; go on with: "
                       f"python trace_mini.py --resume {folder}")
    say(f"done: metrics.jsonl, curve.png, predictions and adapter/ are in {folder}")


def show(trees, policy, show_tree):
    """Print an episode, and a tree with contrast where there is one."""
    say(transcript(policy, path(leaves(trees[0])[0])))
    if show_tree:
        say(tree_text(next(filter(has_contrast, trees), trees[0]), policy.wrote))


def eval_only(policy, data, folder):
    """Score every question of the file, train nothing."""
    with tqdm(total=len(data.eval), desc="evaluate", unit="question") as bar:
        result = evaluate(policy, data.eval_env, data.eval, bar.update)
    write_predictions(folder, data.eval, result.pop("predictions"))
    write_json(folder / "eval.json", result)
    say(f"{len(data.eval)} questions: exact match {100 * result['em']:.1f} %, "
        f"F1 {100 * result['f1']:.1f} %")


# ---------------------------------------------------------------- command line
def own_dials(config):
    """What makes a run and its checkpoints its own."""
    return {name: value for name, value in asdict(config).items() if name not in FREE | {"out"}}


def parse_config(arguments=None):
    """-> Config. With `--resume DIR` the flags are read twice: the second time, what that run was
    started with are their defaults, and what would make another run of it is refused. With
    --eval-only it may score another file, into another folder."""
    parser = Parser(__doc__, epilog=EXAMPLES, formatter_class=argparse.RawTextHelpFormatter)
    add_dials(parser, Config)
    given = parser.parse_args(arguments)
    if not given.resume:
        return Config(**vars(given))
    saved = read_config(given.resume)
    parser.set_defaults(**asdict(saved) | {"out": ""})
    dials = vars(parser.parse_args(arguments))
    if dials["out"] == saved.out and not dials["eval_only"]:
        dials["out"] = ""  # it goes on where it is
    other_file = dials["data"] != saved.data
    if dials["eval_only"] and other_file != bool(dials["out"]):
        raise UsageError("--resume --eval-only: --data names another file, and --out a folder for "
                         "its scores; neither goes alone")
    if other_file:
        dials["eval_data"] = ""
    for name, value in dials.items():
        if name in FREE or (dials["eval_only"] and name in ("data", "eval_data", "out")):
            continue
        if value != getattr(saved, name) and (name != "out" or value):
            raise UsageError(f"--resume {given.resume}: that run has {flag_of(name)} "
                             f"{getattr(saved, name)}, not {value}; only --steps, the memory dials "
                             "and --eval-only, with --data and --out, may change")
    return Config(**dials)


def read_config(folder, **changed):
    """Config of the run in `folder`, with some dials changed."""
    file = Path(folder) / "config.json"
    try:
        dials = json.loads(file.read_text()) | changed
        for field in fields(Config):
            value = dials.get(field.name, field.default)
            right = field.type is type(value) or (field.type is float and type(value) is int)
            if not right and value is not field.default:
                raise TypeError(f"{field.name} is {value!r}")
        return Config(**dials)
    except UsageError:
        raise
    except OSError:
        raise UsageError(f"{folder}: no run there (no config.json)") from None
    except (ValueError, TypeError) as error:
        raise UsageError(f"{file}: not a configuration of ours ({error})") from None


def run(config):
    """What the command does: train, go on, or score."""
    saved = load_checkpoint(config.resume) if config.resume else None
    if saved and not config.eval_only and saved["state"]["step"] >= config.steps:
        return say(f"{config.resume}: already at its last step; --steps N goes further")
    own, folder = config.resume and not config.scores_a_file, Path(config.resume)
    if not own:
        name = "toy" if config.data == "toy" else Path(config.data).stem
        folder = fresh_folder(config.out, f"{config.method}-{name}-s{config.seed}")
    todo = f"{config.steps} steps of {config.budget:,} sampled tokens"
    say(f"{folder}: {config.method}, model {config.model}, data {config.data}, seed {config.seed}, "
        f"on {best_device()}; {'evaluation' if config.eval_only else todo}")
    data, policy = load_data(config), load_policy(config)
    if not config.eval_only or not own:
        resume = config.resume if config.eval_only else ""
        start_folder(folder, asdict(config) | {"resume": resume}, fresh=not own)
    say(policy.memory_line())
    if policy.notice:
        say(policy.notice)
    if config.eval_only:
        if saved:
            policy.load_state_dict(saved["policy"])
        return eval_only(policy, data, folder)
    with ctrl_c() as stopped:
        train(config, policy, data, folder, saved, stopped)


def main(arguments=None):
    """-> exit code, as run_main has it."""
    def work():
        try:
            run(parse_config(arguments))
        except torch.OutOfMemoryError as error:
            raise UsageError(f"{first_line(error)} Smaller --micro-batch-tokens, --cache-tokens or "
                             "--context take less") from None
    return run_main("trace_mini.py", work, "; a run goes on with --resume DIR")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character ends no run
    sys.exit(main())
