"""Speed and memory, measured side by side in one run: python bench.py

Machines are noisy, so nothing here is a pass or a fail. A row that has an alternative times
both in turn, A B A B ..., and gives the median of the pairwise ratios with their range; a
ratio above 1 means that ours is faster. All rows go to results/bench.json.
"""
import argparse
import difflib
import json
import statistics
import tempfile
import time
import tracemalloc
from pathlib import Path

import torch
from transformers import StoppingCriteria

from policy import load_policy
from react_env import load_questions, split_completion
from rollout import ended, grow, observation_ids
from runs import write_json
from toy_wiki import make_world
from trace_mini import Config, load_data
from tree import Node, leaves, nodes, path, path_ids, prefixes, sampled_tokens

REPEATS = 5


def measure(function, unit, per):
    """Seconds / per, or, where the unit is a rate, what the function returns per second."""
    start = time.perf_counter()
    done = function()
    elapsed = time.perf_counter() - start
    return done / elapsed if unit.endswith("/s") else elapsed / per


def compare(name, unit, ours, other=None, per=1.0, repeats=REPEATS):
    """One row: the medians of `ours` and `other`, taken in turn, and of their ratio."""
    pairs = [(measure(ours, unit, per), measure(other, unit, per) if other else None)
             for _ in range(repeats)]
    row = {"name": name, "ours": statistics.median(a for a, _ in pairs), "other": None,
           "unit": unit, "ratio": None, "spread": None}
    if other:
        ratios = sorted(a / b if unit.endswith("/s") else b / a for a, b in pairs)
        row.update(other=statistics.median(b for _, b in pairs),
                   ratio=statistics.median(ratios), spread=[ratios[0], ratios[-1]])
    return row


def megabytes(function):
    """-> (result, memory that Python objects and NumPy arrays still hold after the call)."""
    tracemalloc.start()
    result = function()
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return result, held / 1e6


def environment(num_articles):
    """The toy wiki and the loaders at `num_articles` articles."""
    yield compare(f"generate a wiki of {num_articles:,} articles", "s",
                  lambda: make_world(num_articles, 1))
    world, held = megabytes(lambda: make_world(num_articles, 1))
    yield {"name": "memory of that wiki", "ours": held, "other": None, "unit": "MB", "ratio": None,
           "spread": None}
    titles = world.wiki.titles[:: max(1, num_articles // 1000)]
    some = titles[::100]
    yield compare("search an exact title (other: a scan of all titles)", "ms",
                  lambda: [world.wiki.find(t) for t in titles],
                  lambda: [next(x for x in world.wiki.titles if x == t) for t in titles],
                  per=len(titles) / 1e3)
    yield compare("first missed title: builds the index", "s",
                    lambda: world.wiki.similar("Belkan"), repeats=1)
    missed = [title.split(" ")[-1] + " Belkan" for title in some]
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
    yield {"name": "memory of its questions and wiki", "ours": held, "other": None, "unit": "MB",
           "ratio": None, "spread": None}


def plain_react(policy, env, questions):
    """The alternative to forked sampling: transformers' generate on the whole left-padded
    history, turn after turn, with the same prompts and stop rule. -> sampled tokens"""
    class Ended(StoppingCriteria):
        def __call__(self, ids, scores, **kwargs):
            rows = ids[:, self.start:].tolist()
            return torch.tensor([bool(policy.may_end[row[-1]] and ended(policy, (row, row[:])))
                                 for row in rows], device=ids.device)

    stop, sampled, plain = Ended(), 0, policy.plain
    policy.plain = []  # as peft and bitsandbytes compute it
    live = [(env.reset(q), policy.root(q, env).ids.tolist()) for q in questions]
    while live:
        stop.start = max(len(ids) for _, ids in live)
        padded = torch.tensor([[0] * (stop.start - len(ids)) + ids for _, ids in live])
        mask = torch.tensor([[0] * (stop.start - len(ids)) + [1] * len(ids) for _, ids in live])
        with policy.sampling():
            out = policy.model.generate(
                input_ids=padded.to(policy.device), attention_mask=mask.to(policy.device),
                do_sample=True, temperature=1.0, top_k=0, top_p=1.0, stopping_criteria=[stop],
                max_new_tokens=policy.config.turn_tokens, pad_token_id=0)
        going_on = []
        for (episode, ids), row in zip(live, out[:, stop.start:].tolist()):
            turn = next((row[:n] for n in range(1, len(row)) if policy.may_end[row[n - 1]]
                         and ended(policy, (row[:n], row[:n]))), row)
            sampled += len(turn)
            text = policy.text(turn)
            episode = env.step(episode, split_completion(text)[1])
            more = observation_ids(policy, episode, text)[0]
            if not episode.done and len(ids + turn + more) + 64 < policy.context:
                going_on.append((episode, ids + turn + more))
        live = going_on
    policy.plain = plain
    return sampled


def trees_with_shared(policy, env, questions, share):
    """Trees in which about `share` of the tokens of all paths stand in a shared prefix."""
    roots = [policy.root(q, env) for q in questions]
    leaves_ = grow(policy, env, roots, [2] * len(roots), (0, 0))
    anchors = [min(path(leaf)[:-1], key=lambda n, leaf=leaf: abs(n.length / leaf.length - share))
               for leaf in leaves_]
    anchors = [a for a in anchors if a.depth > 0]
    grow(policy, env, anchors, [5] * len(anchors), (0, 1))
    own = sum(len(n.ids) for root in roots for n in nodes(root))
    return roots, 1 - own / sum(leaf.length for root in roots for leaf in leaves(root))


def by_paths(policy):
    """The alternative to packing: every path a row of a padded batch, similar lengths together.
    -> micro_batches and logprobs to stand in for the policy's own; loss and gradient are alike."""
    def micro_batches(weight):
        paths, left = sorted((path(node) for node in weight if node.is_leaf),
                             key=lambda nodes_: nodes_[-1].length), dict(weight)
        while paths:
            size = max(1, policy.config.micro_batch_tokens // paths[-1][-1].length)
            batch, paths = paths[-size:], paths[:-size]
            yield batch, [n for nodes_ in batch for n in nodes_ if left.pop(n, None)]

    def logprobs(rows):
        [(paths, owned)] = rows
        ids = torch.zeros(len(paths), max(nodes_[-1].length for nodes_ in paths), dtype=torch.long)
        for row, nodes_ in enumerate(paths):
            ids[row, :nodes_[-1].length] = torch.tensor(path_ids(nodes_[-1]))
        hidden = policy.body(input_ids=ids.to(policy.device), use_cache=False).last_hidden_state
        row_of = {node: row for row, nodes_ in enumerate(paths) for node in nodes_}
        at = [(row_of[n], n.parent.length + i) for n in owned for i in range(n.num_sampled)]
        row, column = torch.tensor(at, device=policy.device).T
        return policy.token_logprobs(hidden[row, column - 1], ids.to(policy.device)[row, column])
    return micro_batches, logprobs


def engine(policy, data):
    """Rows 1 to 3: sampling, continuing, updating."""
    for live in (64, 256):
        questions = data.train[:live]

        def ours():
            roots = [policy.root(q, data.env) for q in questions]
            grow(policy, data.env, roots, [1] * live, (time.perf_counter_ns(), 0))
            return sum(map(sampled_tokens, roots))
        yield compare(f"sample, {live} live episodes (other: generate on the full history)",
                      "tok/s", ours, lambda: plain_react(policy, data.env, questions))
    roots = [policy.root(q, data.env) for q in data.train[:64]]
    grow(policy, data.env, roots, [2] * 64, (0, 0))
    anchors = [node for root in roots for node, _ in prefixes(root)]

    def continued(cached):
        copies = [Node(path_ids(a), 0, a.state, hidden=a.hidden if cached else None,
                       cache=a.cache if cached else None) for a in anchors]
        grow(policy, data.env, copies, [1] * len(copies), (time.perf_counter_ns(), 0))
        return sum(map(sampled_tokens, copies))
    yield compare("continue from prefixes, forked (other: prefilled again)", "tok/s",
                  lambda: continued(True), lambda: continued(False))
    for share in (0.0, 0.3, 0.6, 0.9):
        trees, real = trees_with_shared(policy, data.env, data.train[:16], share)
        credits = [{n: 1.0 - 2 * (i % 2) for i, n in enumerate(nodes(root)[1:])} for root in trees]
        packed = policy.micro_batches, policy.logprobs

        def update(parts):
            policy.micro_batches, policy.logprobs = parts
            policy.update(credits)
            policy.micro_batches, policy.logprobs = packed
        yield compare(f"update, {100 * real:.0f} % of the tokens shared (other: path by path)", "s",
                      lambda: update(packed), lambda: update(by_paths(policy)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--articles", type=int, default=100_000, help="size of the wiki")
    parser.add_argument("--model", default="tiny", help="as in trace_mini.py")
    parser.add_argument("--only", choices=("environment", "engine"), help="one part; needs --out")
    parser.add_argument("--out", help="where the rows go [results/bench.json]")
    args = parser.parse_args()
    if args.only and not args.out:
        parser.error("--only writes a part of the rows: name a file of its own with --out")
    file = Path(args.out or "results/bench.json")
    parts = {"environment": lambda: environment(args.articles),
             "engine": lambda: engine(load_policy(config := Config(model=args.model)),
                                      load_data(config))}
    rows = []
    for name in [args.only] if args.only else parts:
        for row in parts[name]():
            rows.append(row)
            other = "" if row["other"] is None else (
                f"   other {row['other']:<8.3g} ratio {row['ratio']:.2f} "
                f"({row['spread'][0]:.2f} to {row['spread'][1]:.2f})")
            print(f"{row['name']:66s} {row['ours']:9.3g} {row['unit']:5s}{other}", flush=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, rows)


if __name__ == "__main__":
    main()
