"""trace-mini: TRACE (arXiv 2606.11119) in a handful of flat files. Run me: python trace_mini.py

TRACE decides where in a forest of agent rollouts the next sample is worth most.
`train_step` below is its loop body, numbered like the method. What is simplified against
the paper, or left open by it and chosen here:

 1. One process and one GPU (or two CPU cores); sampling and update take turns.
 2. The predictor is a normalisation and one linear layer on the policy's own hidden states at the
    prompt and at the anchor, and three plain numbers (paper: not public).
 3. The tree-aware advantage is one of five by name (paper: not public). By default a turn y
    gets (V̂(y) − V̂(root)) / std: GRPO's advantage, averaged over the leaves below the turn.
    A turn that several rollouts share is trained once.
 4. One update per batch, so there is nothing to clip, and no KL term.
 5. The budget of a step is in sampled tokens; the paper counts rollouts (M, N).
 6. Pool size, group size and learning rate were tried on a development wiki (results/PROTOCOL.md).
 7. Both stages are solved exactly: a prompt gets no bare rollout or at least two, and one that
    has no prefix hands its continuations back (paper: solvers not public).
 8. A generated toy Wikipedia and a policy of 1.2 M parameters stand in for the paper's multi-hop
    questions and models of 8 and 14 B; real files and models are a flag away.
"""
import sys
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from tqdm import tqdm

from allocator import PREFIX_RULES, ROOT_RULES, Anchors, deal_in_proportion, predicted_mixed_prob
from engine.draw import draw_curve, tree_text
from engine.loading import ModelError, first_line, knows_bare_prompt
from engine.runs import (
    MOST_BAD,
    Clock,
    Lines,
    NotFinite,
    State,
    UsageError,
    ctrl_c,
    describe,
    fresh_folder,
    load_checkpoint,
    own_dials,
    parse_config,
    save_checkpoint,
    say,
    start_folder,
    transcript,
    trim_memory,
    write_json,
)
from policy import load_policy
from predictor import PREDICTORS, concentrations, predict, score_and_update
from rollout import MOST_TOKENS, forget_caches, grow, prefill
from tree import (
    ADVANTAGES,
    TARGETS,
    advantages,
    backup,
    has_contrast,
    leaves,
    nodes,
    path,
    prefixes,
    sampled_tokens,
)
from world.files import DataError, write_predictions
from world.questions import draw_pool, load_data

HERE = Path(__file__).resolve().parent
LOWEST = {"steps": 0, "budget": 1, "num_continuations": 0, "pool_size": 1, "group_size": 2,
          "cap": 2, "concentration": 0, "floor": 0, "learning_rate": 0, "lora_rank": 1,
          "max_grad_norm": 0, "wiki_seed": 0,
           "temperature": 1e-3, "max_turns": 1, "eval_questions": 1,
          "checkpoint_every": 1, "articles": 100, "final_eval_questions": 0, "eval_every": 0,
          "seed": 0, "turn_tokens": 0, "observation_tokens": 0, "context": 0, "cache_tokens": 0,
          "micro_batch_tokens": 1, "logit_chunk": 1, "show_every": 0}
HIGHEST = {"floor": 1, "turn_tokens": MOST_TOKENS, "articles": 100_000}


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
NAMES = {"method": ARMS, "root_rule": ROOT_RULES, "prefix_rule": PREFIX_RULES,
         "advantage": ADVANTAGES, "predictor": PREDICTORS, "targets": TARGETS}


def option(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class Config:
    """Every dial of a run; the texts are what --help prints."""
    model: str = option("tiny", "tiny (embedded), a hub id, or a folder")
    data: str = option("toy", "toy, or a HotpotQA / 2WikiMultihopQA .json or MuSiQue .jsonl file")
    eval_data: str = option("", "another file to evaluate on (default: a fifth of --data)")
    method: str = option("trace", f"which arm: {', '.join(ARMS)}")
    steps: int = option(40, "training steps")
    seed: int = option(0, "seed of everything that is random")
    out: str = option("", "run folder (default: runs/METHOD-DATA-sSEED, numbered if it exists)")
    resume: str = option("", "run folder to continue")
    eval_only: bool = option(False, "train nothing, score the whole --data file; of a resumed run "
                            "without one, the questions that it held out")
    # the text is that of --no-4bit
    four_bit: bool = option(True, "load the base weights in 16 or 32 bits, without bitsandbytes")
    budget: int = option(8000, "tokens sampled per step (thoughts and actions)")
    num_continuations: int = option(2, "N: continuations per bare rollout")
    pool_size: int = option(32, "candidate prompts per step (but pcl and mopps draw four, uniform "
                            "one, for every group they can pay)")
    group_size: int = option(8, "leaves per prompt, about, of the arms with equal groups")
    cap: int = option(16, "most bare rollouts of one prompt")
    root_rule: str = option("", f"stage 1: {', '.join(ROOT_RULES)} (default: the arm's own)")
    prefix_rule: str = option("", f"stage 2: {', '.join(PREFIX_RULES)} (default: the arm's own)")
    concentration: float = option(0.0, "trace rules: pseudo-count of a Beta posterior around the "
                                  "predictions, to which a prompt's own counts are added (0: they "
                                  "are taken as certain; the predictor beta has its own)")
    floor: float = option(0.0, "trace rules: share of the rollouts that is spread uniformly")
    cost_aware: bool = option(False, "trace prefixes: gain per expected token, not per rollout")
    advantage: str = option("", f"tree credit: {', '.join(ADVANTAGES)} (default: the arm's own)")
    predictor: str = option("", f"{', '.join(PREDICTORS)} (default: the arm's own, mostly head)")
    targets: str = option("all", "the predictor learns from all leaves, or from fresh ones only")
    learning_rate: float = option(None, "of AdamW on the LoRA weights (default: 1.2e-3 for tiny, "
                                  "else 1e-4)")
    lora_rank: int = option(16, "rank of the LoRA adapters")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm")
    temperature: float = option(1.0, "of sampling in training; evaluation is greedy")
    max_turns: int = option(8, "turns per episode, Finish included")
    turn_tokens: int = option(0, "tokens per turn at most (0: 40 for tiny, else 128)")
    observation_tokens: int = option(0, "an observation is cut here (0: 160 for tiny, else 256)")
    context: int = option(0, "tokens per path at most (0: 768 for tiny, else 4096)")
    cache_tokens: int = option(0, "cache columns of the episodes sampled together (0: as many as "
                               "fit, at most 131072)")
    micro_batch_tokens: int = option(4096, "padded tokens per backward pass")
    gradient_checkpointing: bool = option(False, "recompute activations in the update: slower, "
                                          "far less memory (by itself where they would not fit)")
    logit_chunk: int = option(2 ** 25, "logits held at once in the update")
    eval_questions: int = option(500, "held-out questions per evaluation")
    final_eval_questions: int = option(0, "held-out questions after the last step, where more "
                                       "than --eval-questions, which are the first of them")
    eval_every: int = option(0, "steps between evaluations (0: before and after only)")
    checkpoint_every: int = option(10, "steps between checkpoints")
    articles: int = option(1000, "size of the toy wiki")
    wiki_seed: int = option(0, "seed of the toy wiki")
    show_every: int = option(10, "steps between printed episodes")
    show_tree: bool = option(False, "with each of them, the tree of a prompt with contrast")

    def __post_init__(self):
        for name, names in NAMES.items():  # the method comes first: it fills in the others
            if name in Arm._fields and not getattr(self, name):
                setattr(self, name, getattr(ARMS[self.method], name))
            if getattr(self, name) not in names:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: "
                                 f"choose from {', '.join(names)}")
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        here = HERE / "world" / self.model  # tiny, tiny2: wherever we are started
        self.model_path = str(here) if self.model.isalnum() and here.is_dir() else self.model
        self.bare_prompt = knows_bare_prompt(self.model_path)
        if self.learning_rate is None:
            self.learning_rate = 1.2e-3 if self.bare_prompt else 1e-4
        for name, low in LOWEST.items():
            high = HIGHEST.get(name, 1e12)
            if not low <= getattr(self, name) <= high:
                raise UsageError(f"--{name.replace('_', '-')} must be from {low} to {high:g}, "
                                 f"got {getattr(self, name)}")
        if self.eval_data and (self.data == "toy" or self.eval_only and not self.resume):
            raise UsageError("--eval-data goes with training on a --data file; without one, or "
                             "with --eval-only, name the file as --data")
        sizes = (40, 160, 768) if self.bare_prompt else (128, 256, 4096)
        for name, size in zip(("turn_tokens", "observation_tokens", "context"), sizes):
            setattr(self, name, getattr(self, name) or size)
        self.num_continuations *= self.prefix_rule != "none"


# ---------------------------------------------------------------- the loop
def train_step(config, state, policy, predictor, data):
    """One step of TRACE -> (trees, metrics). The numbers are those of the method's steps."""
    env, clock, key = data.env, Clock(), (config.seed, state.step)
    rng = np.random.default_rng([config.seed, 2, state.step])
    group_size = max(2, round(config.group_size / (1 + config.num_continuations)))
    dials = {"group_size": group_size, "cap": config.cap, "floor": config.floor,
             "cost_aware": config.cost_aware}

    # 1. Candidate pool, large enough for all bare rollouts (M) that the schedule buys.
    num_bare = state.num_bare(config.budget)
    size = POOL.get(config.root_rule, 0) * max(1, num_bare // group_size) or config.pool_size
    questions, state.cursor = draw_pool(
        data.train, max(size, -(-num_bare // config.cap)), state.cursor, config.seed)
    pool = [policy.root(question, env) for question in questions]
    with clock("predict"):
        prefill(policy, pool)
        v = predict(predictor, pool)
        sure = concentrations(predictor, pool, config.concentration)

    # 2. Stage 1: which prompts are rolled out, and how often.
    with clock("allocate"):
        seen = np.array([state.visits.get(root.state.question.id, (0.0, 0.0)) for root in pool])
        m = ROOT_RULES[config.root_rule](Anchors(
            v, successes=seen[:, 0], failures=seen[:, 1], concentration=sure, **dials),
            num_bare, rng)
    forget_caches([root for root, count in zip(pool, m) if not count])
    roots, v, sure, seen, m = ([root for root, count in zip(pool, m) if count],
                               v[m > 0], sure[m > 0], seen[m > 0], m[m > 0])

    # 3. Bare rollouts.
    with clock("sample"):
        bare = grow(policy, env, roots, m, key)
    state.count_bare(roots)

    # 4. Stage 2: where each prompt continues from, among the prefixes of its own rollouts.
    owned = [prefixes(root) for root in roots]
    anchors = [node for pairs in owned for node, _ in pairs]
    with clock("predict"):
        chances = predict(predictor, anchors)
        sure_there = concentrations(predictor, anchors, config.concentration)
    with clock("allocate"):
        cost = state.expected_tokens(anchors)
        can = np.array([len(pairs) > 0 for pairs in owned])
        shares = deal_in_proportion(m * can, config.num_continuations * int(m.sum()))
        k, start = np.zeros(len(anchors), int), 0
        for root, pairs, share in zip(roots, owned, shares):
            own = slice(start, start := start + len(pairs))
            outcomes = np.array([reward for _, reward in pairs], int)
            k[own] = PREFIX_RULES[config.prefix_rule](
                Anchors(chances[own], outcomes, concentration=sure_there[own], cost=cost[own],
                        **dials), int(share), rng)

    # 5. Continuations, from the prefixes themselves.
    with clock("sample"):
        continuations = grow(policy, env, anchors, k, key)
    forget_caches(pool)  # nothing grows from here any more

    # 6. Targets, bottom up.
    for root in roots:
        backup(root)

    # 7. The predictor: scored on what it has not seen yet, then updated.
    with clock("predict"):
        scores = score_and_update(predictor, roots, config.targets)

    # 8. The policy: tree credit, and one update.
    with clock("update"):
        credits = [advantages(root, config.advantage) for root in roots]
        updated = policy.update([credit for credit in credits if credit])

    tokens = sum(map(sampled_tokens, roots))
    if not tokens:
        raise UsageError(f"step {state.step + 1}: no question left room for a turn; --context must "
                         "be larger or --turn-tokens smaller, in a new run")
    state.advance(len(bare), tokens)
    turns = [node for root in roots for node in nodes(root)[1:]]
    return roots, {
        "step": state.step, "method": config.method, "seed": config.seed,
        "sampled_tokens": state.sampled_tokens, "leaves": len(bare) + len(continuations),
        "reward_mean": float(np.mean([leaf.reward for leaf in bare])),
        "effective_ratio": float(np.mean([has_contrast(root) for root in roots])),
        "predicted_effective_ratio": float(np.mean(predicted_mixed_prob(
            v, np.array([root.num_leaves for root in roots]), sure, *seen.T))),
        "active_prompts": len(roots), "group_sizes": dict(sorted(Counter(m.tolist()).items())),
        "leaves_per_prompt": (len(bare) + len(continuations)) / len(roots),
        "coverage": len(state.visits) / len(data.train), **scores, **updated,
        "cut_observations": sum(node.cut_observation for node in turns),
        "overflowed_episodes": sum(node.overflowed for node in turns),
        **{f"time_{name}_s": round(clock[name], 3) for name in clock}}


# ---------------------------------------------------------------- evaluation
def evaluate(policy, env, questions, progress=None, first=None):
    """Greedy episodes -> {em, em_first (of the `first` questions), f1 (0 to 1), tokens (sampled,
    per episode), by_hops, by_kind, by_trap (exact match of groups; toy questions name the traps
    they hold), predictions}."""
    scores, predictions, tokens = {}, {}, 0
    size = max(1, policy.cache_tokens // policy.context)
    for i in range(0, len(questions), size):
        roots = [policy.root(q, env) for q in questions[i:i + size]]
        for leaf in grow(policy, env, roots, [1] * len(roots), temperature=0):
            question = leaf.state.question
            predictions[question.id] = leaf.state.prediction or ""
            scores[question.id] = question.score(leaf.state.prediction)
        tokens += sum(sampled_tokens(root) for root in roots)
        forget_caches(roots)
        if progress:
            progress(len(roots))

    def mean_by(keys):
        groups = defaultdict(list)
        for q in questions:
            for key in keys(q):
                groups[str(key)].append(scores[q.id]["em"])
        return {name: float(np.mean(values)) for name, values in sorted(groups.items())}

    return {"em": float(np.mean([s["em"] for s in scores.values()])),
            "em_first": float(np.mean([scores[q.id]["em"] for q in questions[:first]])),
            "f1": float(np.mean([s["f1"] for s in scores.values()])),
            "tokens": tokens / len(questions), "by_hops": mean_by(lambda q: [q.num_hops]),
            "by_kind": mean_by(lambda q: [q.kind]),
            "by_trap": mean_by(lambda q: getattr(q, "traps", ())), "predictions": predictions}


# ---------------------------------------------------------------- a run and its folder
def train(config, policy, data, folder, saved=None, stopped=()):
    """Train in a run folder, from the start or from a checkpoint on, to the last step or until
    there is something in `stopped`."""
    predictor = PREDICTORS[config.predictor](policy=policy, env=data.env, seed=config.seed)
    state = State()
    if saved:
        state = State(**saved["state"])
        policy.load_state_dict(saved["policy"])
        predictor.load_state_dict(saved["predictor"])
    metrics = Lines(folder / "metrics.jsonl", state.metrics_bytes)
    evals = Lines(folder / "evals.jsonl", state.evals_bytes)

    def save():
        policy.save_adapter(folder / "adapter")
        draw_curve(folder)
        state.metrics_bytes, state.evals_bytes = metrics.sync(), evals.sync()
        save_checkpoint(folder, state.step, {
            "config": own_dials(asdict(config)), "state": vars(state),
            "policy": policy.state_dict(), "predictor": predictor.state_dict()})

    def score(last=False):
        every = last and config.final_eval_questions
        questions = data.eval if every else data.eval[:config.eval_questions]
        with tqdm(total=len(questions), desc="evaluate", unit="question", leave=False) as bar:
            result = evaluate(policy, data.eval_env, questions, bar.update, config.eval_questions)
        write_predictions(folder, questions, result.pop("predictions"))
        evals.write({"step": state.step, "sampled_tokens": state.sampled_tokens,
                     "num_questions": len(questions), **result})
        say(f"held-out exact match {100 * result['em']:.1f} %, F1 {100 * result['f1']:.1f} % after "
            f"{state.sampled_tokens:,} sampled tokens; by hops " + ", ".join(
                f"{hops}: {100 * em:.0f} %" for hops, em in result["by_hops"].items()))
        return result

    if state.num_costed == 0:
        save()
        state.first_cost(score()["tokens"], config.num_continuations)
        save()
    for _ in tqdm(range(state.step, config.steps), initial=state.step, total=config.steps,
                  desc=config.method, unit="step"):
        trees, row = train_step(config, state, policy, predictor, data)
        trim_memory()
        say(describe(row))
        if config.show_every and state.step % config.show_every == 0:
            say(transcript(policy, path(leaves(trees[0])[0])))
            if config.show_tree:
                say(tree_text(next(filter(has_contrast, trees), trees[0]), policy.wrote))
        bad = row["update_skipped"] or row["predictor_skipped"]
        state.bad_steps = state.bad_steps + 1 if bad else 0
        last, broken = state.step == config.steps, state.bad_steps >= MOST_BAD
        stop = bool(stopped)  # once: Ctrl-C may come at any moment
        if last or (config.eval_every and state.step % config.eval_every == 0):
            result = score(last)
            row.update(eval_em=result["em"], eval_f1=result["f1"])
        metrics.write(row)
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


def eval_only(config, policy, data, folder):
    """Score every question of the file, train nothing."""
    with tqdm(total=len(data.eval), desc="evaluate", unit="question") as bar:
        result = evaluate(policy, data.eval_env, data.eval, bar.update)
    write_predictions(folder, data.eval, result.pop("predictions"))
    write_json(folder / "eval.json", result)
    say(f"{len(data.eval)} questions: exact match {100 * result['em']:.1f} %, "
        f"F1 {100 * result['f1']:.1f} %")


# ---------------------------------------------------------------- command line
def run(config):
    saved = load_checkpoint(Path(config.resume)) if config.resume else None
    if saved and not config.eval_only and saved["state"]["step"] >= config.steps:
        return say(f"{config.resume}: already at its last step; --steps N goes further")
    own = saved and not (config.eval_only and config.out)  # not the scores of another file
    folder = Path(config.resume)
    if not own:
        data = "toy" if config.data == "toy" else Path(config.data).stem
        folder = fresh_folder(config.out, f"{config.method}-{data}-s{config.seed}")
    todo = "evaluation" if config.eval_only else (
        f"{config.steps} steps of {config.budget:,} sampled tokens")
    say(f"{folder}: {config.method}, model {config.model}, data {config.data}, seed {config.seed}, "
        f"on {config.device}; {todo}")
    data, policy = load_data(config), load_policy(config)
    if not config.eval_only or not own:
        start_folder(folder, config, fresh=not own)
    if config.eval_only and saved:
        policy.load_state_dict(saved["policy"])
    say(policy.memory_line())
    if policy.notice:
        say(policy.notice)
    if config.eval_only:
        return eval_only(config, policy, data, folder)
    with ctrl_c() as stopped:
        train(config, policy, data, folder, saved, stopped)


def main(arguments=None):
    """-> exit code: 0; 1 where the numbers broke down; 2 for what the user can mend; 130 for a
    Ctrl-C that stopped at once. One line says what it was."""
    try:
        run(parse_config(Config, __doc__, arguments))
    except (UsageError, DataError, ModelError) as error:
        print(f"trace_mini.py: {error}", file=sys.stderr)
        return 2
    except NotFinite as error:
        print(f"trace_mini.py: {error}", file=sys.stderr)
        return 1
    except (OSError, SafetensorError) as error:  # a full disk, above all
        print(f"trace_mini.py: {first_line(error)}; once that is mended, a run goes on with "
              "--resume DIR", file=sys.stderr)
        return 2
    except torch.cuda.OutOfMemoryError as error:
        print(f"trace_mini.py: {first_line(error)} Smaller --micro-batch-tokens, --cache-tokens "
              "or --context take less, and so does --gradient-checkpointing; a run goes on with "
              "--resume DIR and other memory dials", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("trace_mini.py: stopped at once; a run goes on from its newest checkpoint with "
              "--resume DIR", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character ends no run
    sys.exit(main())
