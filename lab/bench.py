"""Speed and memory, measured side by side in one run: python -m lab.bench

Machines are noisy, so nothing here is a pass or a fail. A row that has an alternative times
both in turn, A B A B ..., and gives the median of the pairwise ratios with their range; a
ratio above 1 means that ours is faster or smaller. All rows go to results/bench.json.
"""
import argparse
import difflib
import json
import multiprocessing
import statistics
import tempfile
import time
import tracemalloc
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

import trace_mini
from allocator import allocate_roots, expand_prefixes, flip_prob
from engine.runs import State, trim_memory, write_json
from lab.alternatives import (
    by_paths,
    credits_of,
    peak_megabytes,
    plain_prefixes,
    plain_react,
    plain_roots,
    trl_steps,
)
from policy import load_policy
from predictor import PREDICTORS
from rollout import forget_caches, grow
from trace_mini import Config, train_step
from tree import Node, leaves, nodes, path, path_ids, prefixes, sampled_tokens
from world.files import load_questions
from world.questions import load_data
from world.toy import make_world

REPEATS = 5
GROWTH = {"budget": (3000, 12_000, 48_000), "pool_size": (64, 256, 1024), "max_turns": (4, 8, 16),
          "articles": (1000, 10_000, 100_000)}


def measure(function, unit, per):
    """Seconds / per, or, where the unit is a rate, what the function returns per second."""
    start = time.perf_counter()
    done = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elapsed = time.perf_counter() - start
    return done / elapsed if unit.endswith("/s") else elapsed / per


def row_of(name, unit, ours, other=()):
    """One row: the medians of what was measured in turn, and of the pairwise ratios."""
    row = {"name": name, "ours": statistics.median(ours), "other": None, "unit": unit,
           "ratio": None, "spread": None}
    if other:
        ratios = sorted(a / b if unit.endswith("/s") else b / a for a, b in zip(ours, other))
        row.update(other=statistics.median(other), ratio=statistics.median(ratios),
                   spread=[ratios[0], ratios[-1]])
    return row


def compare(name, unit, ours, other=None, per=1.0, repeats=0):
    """A row from two functions, taken in turn."""
    functions = [ours, other] if other else [ours]
    return row_of(name, unit, *zip(*([measure(function, unit, per) for function in functions]
                                     for _ in range(repeats or REPEATS))))


def megabytes(function):
    """-> (result, memory that Python objects and NumPy arrays still hold after the call)."""
    tracemalloc.start()
    result = function()
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return result, held / 1e6


# ---------------------------------------------------------------- without a model
def environment(num_articles):
    """The toy wiki and the loaders at `num_articles` articles."""
    yield compare(f"generate a wiki of {num_articles:,} articles", "s",
                  lambda: make_world(num_articles, 1))
    world, held = megabytes(lambda: make_world(num_articles, 1))
    yield row_of("memory of that wiki", "MB", [held])
    titles = world.wiki.titles[:: max(1, num_articles // 1000)]
    yield compare("search an exact title (other: a scan of all titles)", "ms",
                  lambda: [world.wiki.find(t) for t in titles],
                  lambda: [next(x for x in world.wiki.titles if x == t) for t in titles],
                  per=len(titles) / 1e3)
    yield compare("first missed title: builds the index", "s",
                  lambda: world.wiki.similar("Belkan"), repeats=1)
    missed = [title.split(" ")[-1] + " Belkan" for title in titles[::100]]
    yield compare("similar titles of a missed one (other: difflib on all titles)", "ms",
                  lambda: [world.wiki.similar(t) for t in missed],
                  lambda: [difflib.get_close_matches(t, world.wiki.titles, 5) for t in missed],
                  per=len(missed) / 1e3)
    paragraphs = [[title, list(world.wiki.sentences(title))] for title in world.wiki.titles]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "hotpot.json"
        file.write_text(json.dumps([
            {"_id": str(i), "question": "?", "answer": "a", "type": "bridge", "level": "easy",
             "supporting_facts": [], "context": paragraphs[i:i + 10]}
            for i in range(0, len(paragraphs), 10)]))
        yield compare(f"load a HotpotQA file of {len(paragraphs):,} paragraphs", "s",
                      lambda: load_questions(file))
        _, held = megabytes(lambda: load_questions(file))
    yield row_of("memory of its questions and wiki", "MB", [held])


def allocation(num_roots, num_prefixes):
    """The exact solvers against the same in plain Python."""
    rng = np.random.default_rng(0)
    v, budget = rng.random(num_roots), 4 * num_roots
    yield compare(f"allocate {budget:,} rollouts to {num_roots:,} roots (other: plain Python)",
                  "s", lambda: allocate_roots(v, budget, 16), lambda: plain_roots(v, budget, 16))
    chances, r = rng.random(num_prefixes), rng.integers(2, size=num_prefixes)
    yield compare(f"expand {num_prefixes:,} prefixes (other: a heap in plain Python)", "s",
                  lambda: expand_prefixes(chances, r, num_prefixes), lambda: plain_prefixes(
                      flip_prob(chances, r, 1).tolist(), num_prefixes))


# ---------------------------------------------------------------- the engine
def trees_with_shared(policy, env, questions, share):
    """Trees in which about `share` of the tokens of all paths are shared: the more, the more
    continuations start from a place at `share` of the path."""
    roots = [policy.root(q, env) for q in questions]
    leaves_ = grow(policy, env, roots, [2] * len(roots), (0, 0))
    anchors = [min(path(leaf)[1:-1], key=lambda n, leaf=leaf: abs(n.length / leaf.length - share))
               for leaf in leaves_ if leaf.depth > 1]
    grow(policy, env, anchors, [round(3 / (1 - share))] * len(anchors), (0, 1))
    return roots


def shared_part(roots):
    """Of the tokens of all paths, the share that is not computed again where trees are packed."""
    own = sum(len(n.ids) for root in roots for n in nodes(root))
    return 1 - own / sum(leaf.length for root in roots for leaf in leaves(root))


def engine(policy, data, live=(64, 256), num_trees=16):
    """Rows 1 to 3: sampling, continuing, updating (at learning rate 0: the trees stay typical)."""
    def sampled(questions):
        roots = [policy.root(q, data.env) for q in questions]
        grow(policy, data.env, roots, [1] * len(roots), (time.perf_counter_ns(), 0))
        return sum(map(sampled_tokens, roots))

    for num in live:
        yield compare(
            f"sample, {num} live episodes (other: generate on the full history)", "tok/s",
            lambda: sampled(data.train[:num]), lambda: sum(
                sum(mask) for _, mask, _ in plain_react(policy, data.env, data.train[:num])))
    roots = [policy.root(q, data.env) for q in data.train[:live[0]]]
    grow(policy, data.env, roots, [2] * len(roots), (0, 0))
    anchors = [node for root in roots for node, _ in prefixes(root)]

    def continued(cached):
        copies = [Node(path_ids(a), 0, a.state, hidden=a.hidden if cached else None,
                       cache=a.cache if cached else None) for a in anchors]
        grow(policy, data.env, copies, [1] * len(copies), (time.perf_counter_ns(), 0))
        return sum(map(sampled_tokens, copies))
    yield compare("continue from prefixes, forked (other: prefilled again)", "tok/s",
                  lambda: continued(True), lambda: continued(False))
    forget_caches(roots)
    default = Steps(policy, data)
    default.run()
    for trees in (default.trees, *(trees_with_shared(
            policy, data.env, data.train[:num_trees], share) for share in (0.3, 0.6, 0.9))):
        packed, credits = (policy.micro_batches, policy.logprobs), credits_of(trees)

        def update(parts):
            policy.micro_batches, policy.logprobs = parts
            policy.update(credits)
            policy.micro_batches, policy.logprobs = packed
        name = "update of a default step," if trees is default.trees else "update,"
        yield compare(f"{name} {100 * shared_part(trees):.0f} % of the tokens shared (other: path "
                      "by path)", "s", lambda: update(packed), lambda: update(by_paths(policy)))


def gigaflops(policy, roots):
    """10^9 floating-point operations of one forward pass over trees, each token once: two per
    weight of a layer, 4 x width per layer and token that is attended to, two per weight of the
    head for sampled tokens."""
    weights = sum(m.in_features * m.out_features for m in policy.body.modules()
                  if hasattr(m, "base_layer"))
    shape, head = policy.body.config, policy.head.weight
    size = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    attention = 4 * shape.num_hidden_layers * shape.num_attention_heads * size
    turns = [n for root in roots for n in nodes(root)]
    seen = sum(sum(range(n.length - len(n.ids) + 1, n.length + 1)) for n in turns)
    return (2 * weights * sum(len(n.ids) for n in turns) + attention * seen
            + 2 * head.numel() * sum(n.num_sampled for n in turns)) / 1e9


def limit(policy, data, live=256, size=2048):
    """Row 6: the operations of the tokens that had to be computed, per second, against what the
    machine does in a plain matrix product. In the update a token costs a forward pass and as
    much again backward: the base weights are frozen. Recomputation is not counted."""
    left, right = (torch.randn(size, size, device=policy.device, dtype=policy.head.weight.dtype)
                   for _ in range(2))
    trees = []

    def product():
        for _ in range(4):
            left @ right
        return 4 * 2 * size ** 3 / 1e9

    def sampled():
        trees[:] = [policy.root(q, data.env) for q in data.train[:live]]
        grow(policy, data.env, trees, [1] * live, (0, 0))
        forget_caches(trees)
        return gigaflops(policy, trees)

    def updated():
        policy.update(credits_of(trees))
        return 2 * gigaflops(policy, trees)
    for name, ours in (("sample", sampled), ("update", updated)):
        yield compare(f"limit: {name} (other: a matrix product of {size})", "GF/s", ours, product)


# ---------------------------------------------------------------- whole steps
class Steps:
    """Training steps one at a time: `run()` -> sampled tokens."""

    def __init__(self, policy, data, **dials):
        self.config = Config(**{"model": policy.config.model, "learning_rate": 0.0} | dials)
        self.policy, self.data, self.state = policy, data or load_data(self.config), State()
        self.predictor = PREDICTORS[self.config.predictor](policy, self.data.env)
        self.state.first_cost(50.0, self.config.num_continuations)
        self.metrics = []

    def run(self):
        self.trees, row = train_step(self.config, self.state, self.policy, self.predictor,
                                     self.data)
        trim_memory()
        self.metrics.append(row)
        return sum(map(sampled_tokens, self.trees))


def our_steps(pipe, dials, num_groups):
    """Work of a process: for every message a step of TRACE; sends (sampled tokens, peak)."""
    steps = Steps(load_policy(Config(learning_rate=0.0, **dials)), None, **dials)
    while pipe.recv():
        pipe.send((steps.run(), peak_megabytes()))


def whole_step(num_groups=18, **dials):
    """Row 4: a step from pool to update against TRL's GRPOTrainer on about as many sampled
    tokens, each in a process of its own: memory does not mix."""
    workers, name = [our_steps], "TRL's GRPOTrainer"
    if find_spec("trl"):
        workers.append(trl_steps)
    else:
        name += ", not run: pip install trl"
    context, pipes, processes = multiprocessing.get_context("spawn"), [], []
    for work in workers:
        pipe, end = context.Pipe()
        processes.append(context.Process(target=work, args=(end, dials, num_groups), daemon=True))
        processes[-1].start()
        end.close()  # so that a process that ends is noticed
        pipes.append(pipe)

    def step(pipe):
        pipe.send(True)
        return pipe.recv()
    step(pipes[0])  # loading; and the first step's size is a guess
    try:
        for pipe in pipes[1:]:
            step(pipe)
    except (EOFError, OSError):  # it has said why
        pipes, name = pipes[:1], name + ", which failed"
    rates, peaks = [[] for _ in pipes], [[] for _ in pipes]
    for _ in range(REPEATS):
        for pipe, rate, peak in zip(pipes, rates, peaks):
            start = time.perf_counter()
            tokens, most = step(pipe)
            rate.append(tokens / (time.perf_counter() - start))
            peak[:] = [most]
    for pipe, process in zip(pipes, processes):
        pipe.send(False)
        process.join()
    yield row_of(f"a training step (other: {name})", "tok/s", *rates)
    yield row_of(f"its peak memory (other: {name})", "MB", *peaks)


def growth(policy, data, values=GROWTH):
    """Row 5: sampled tokens per second of whole steps as one dial grows, against its first value;
    and what predicting and allocating take of a step."""
    for dial, numbers in values.items():
        shared = data if dial in ("budget", "pool_size") else None
        runs = [Steps(policy, shared, **{"budget": values["budget"][0], dial: number})
                for number in numbers]
        for run in runs:
            run.run()  # the first step's size is a guess
        rates = [[] for _ in runs]
        for _ in range(REPEATS):
            for run, rate in zip(runs, rates):
                rate.append(measure(run.run, "tok/s", 1))
        for number, rate in zip(numbers[1:], rates[1:]):
            yield row_of(f"a training step, {dial} {number:,} (other: {numbers[0]:,})", "tok/s",
                         rate, rates[0])
        if dial == "budget":
            yield from shares(runs[1])


def shares(run):
    """Of whole steps: the pool's prefill, the predictor's head, the allocator, in %."""
    prefill, total = trace_mini.prefill, {"prefill": 0.0, "step": 0.0}

    def timed(*args):
        start = time.perf_counter()
        prefill(*args)
        total["prefill"] += time.perf_counter() - start
    trace_mini.prefill, run.metrics = timed, []
    for _ in range(REPEATS):
        total["step"] += measure(run.run, "s", 1)
    trace_mini.prefill = prefill
    head, allocate = (sum(row[f"time_{name}_s"] for row in run.metrics)
                      for name in ("predict", "allocate"))
    for name, part in (("prefill of the pool", total["prefill"]),
                       ("predictor's head", head - total["prefill"]), ("allocation", allocate)):
        yield row_of(f"share of a step: {name}", "%", [100 * part / total["step"]])


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--articles", type=int, default=100_000, help="size of the wiki")
    parser.add_argument("--model", default="tiny", help="as in trace_mini.py")
    parser.add_argument("--only", choices=PARTS, help="one part; needs --out")
    parser.add_argument("--out", help="where the rows go [results/bench.json]")
    args = parser.parse_args(arguments)
    if args.only and not args.out:
        parser.error("--only writes a part of the rows: name a file of its own with --out")
    file, rows, shared = Path(args.out or "results/bench.json"), [], []
    file.parent.mkdir(parents=True, exist_ok=True)
    for name in [args.only] if args.only else PARTS:
        if name in ("engine", "limit", "growth") and not shared:
            config = Config(model=args.model, learning_rate=0.0)  # the policy stays what it is
            shared = [load_policy(config), load_data(config)]
        for row in PARTS[name](args, *shared):
            rows.append(row)
            other = "" if row["other"] is None else (
                f"   other {row['other']:<8.3g} ratio {row['ratio']:.2f} "
                f"({row['spread'][0]:.2f} to {row['spread'][1]:.2f})")
            print(f"{row['name']:66s} {row['ours']:9.3g} {row['unit']:5s}{other}", flush=True)
        write_json(file, rows)


PARTS = {"environment": lambda args, *shared: environment(args.articles),
         "allocation": lambda args, *shared: allocation(1024, 100_000),
         "step": lambda args, *shared: whole_step(model=args.model),
         "engine": lambda args, *shared: engine(*shared),
         "limit": lambda args, *shared: limit(*shared),
         "growth": lambda args, *shared: growth(*shared)}


if __name__ == "__main__":
    main()
