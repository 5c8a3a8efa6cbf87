"""Speed and memory, measured side by side in one run: python -m lab.bench

Machines are noisy, so nothing here is a pass or a fail. A row that has an alternative times
both in turn, A B A B ..., and gives the median of the pairwise ratios with their range. A ratio
above 1 means that ours is faster or smaller. All rows go to results/bench.json.

Where there is an NVIDIA GPU, the part `cards` says what fits on one of 6 to 24 GiB: PyTorch's
memory is capped to what such a card leaves to it. Nothing is downloaded: the models have the
shapes of Qwen2.5 and random weights (those of 7B take 16 GB of memory, then of disk). Their
tokens per second are real, what they write is not.
"""
import json
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from itertools import chain
from multiprocessing import get_context

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from engine.command_line import Parser, run_main
from engine.errors import UsageError
from engine.files import write_json
from lab.alternatives import (
    by_path,
    peak_megabytes,
    plain_react,
    still_policy,
    trl_steps,
)
from predictor import PREDICTORS
from rollout import grow
from trace_mini import HERE, State, train_step
from tree import Node, nodes, path_ids, prefixes, sampled_tokens

REPEATS = 5
LIVE = (16, 64, 256)    # episodes that are sampled at once
CARDS = (24, 12, 8, 6)  # GiB
TAKEN = 0.6             # GiB of a card that CUDA itself and a desktop take, about
NUM_WORDS = 151_936     # of Qwen2.5
SHAPES = {  # width, width of the MLP, layers, heads, key-value heads, are words tied?
    "0.5B": (896, 4864, 24, 14, 2, True),
    "1.5B": (1536, 8960, 28, 12, 2, True),
    "3B": (2048, 11008, 36, 16, 2, True),
    "7B": (3584, 18944, 28, 28, 4)}


# ---------------------------------------------------------------- rows
def row_of(name, unit, measured):
    """A row from what was measured [1 or 2, repeats]: ours, and the other's."""
    ours, *others = np.array(measured)
    row = {"name": name, "ours": np.median(ours), "other": None, "unit": unit, "ratio": None,
           "spread": None}
    for other in others:
        ratios = ours / other if unit == "tok/s" else other / ours
        row.update(other=np.median(other), ratio=np.median(ratios),
                   spread=[ratios.min(), ratios.max()])
    return row


def compare(name, unit, work, *choices):
    """A row from work(choice), for both choices in turn: seconds, or the tokens that it returns per
    second. On a GPU too: all work ends by asking it for a number."""
    measured = []
    for _ in range(REPEATS):
        for choice in choices:
            start = time.perf_counter()
            tokens = work(choice)
            seconds = time.perf_counter() - start
            measured.append(tokens / seconds if unit == "tok/s" else seconds)
    return row_of(name, unit, np.reshape(measured, (REPEATS, 2)).T)


def alone(function, *arguments):
    """What the function returns, called in a process of its own, with memory of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


# ---------------------------------------------------------------- parts of a step
def engine(dials):
    """Sampling, continuing, updating."""
    policy, data = still_policy(dials)

    def new_roots(num):
        return [policy.root(question, data.env) for question in data.train[:num]]

    def sample(play, roots):
        """An episode from each root -> sampled tokens."""
        play(policy, data.env, roots, [1] * len(roots))
        return sum(map(sampled_tokens, roots))

    def proceed(forked):
        """An episode from a copy of each anchor: these stay as they are."""
        return sample(grow, [Node(path_ids(node), 0, node.state, hidden=node.hidden,
                                  cache=node.cache if forked else None) for node in anchors])
    for num in LIVE:
        yield compare(f"sample, {num} live episodes (other: generate on the full history)",
                      "tok/s", lambda play: sample(play, new_roots(num)), grow, plain_react)
    roots = new_roots(LIVE[0])
    grow(policy, data.env, roots, [2] * len(roots), keep=True)
    anchors = [prefix.node for root in roots for prefix in prefixes(root)]
    yield compare("continue from prefixes, forked (other: prefilled again)", "tok/s", proceed,
                  True, False)
    grow(policy, data.env, anchors, [4] * len(anchors))
    _, trees, metrics = two_steps(policy, data)
    yield update("update of a default step", policy, trees)
    yield update("update", policy, roots)
    times = {key: value for key, value in metrics.items() if key.startswith("time_")}
    for part in ("predict", "allocate"):
        share = 100 * times[f"time_{part}_s"] / sum(times.values())
        yield row_of(f"share of a step: {part}", "%", [[share]])


def update(name, policy, trees):
    credits = [dict.fromkeys(nodes(root), 1.0) for root in trees]
    turns = list(chain(*credits))
    num_path_tokens = sum(node.length for node in turns if node.is_leaf)
    shared = 100 - 100 * sum(len(node.ids) for node in turns) / num_path_tokens
    return compare(f"{name}, {shared:.0f} % of the tokens shared (other: path by path)", "s",
                   policy.update, credits, list(by_path(trees)))


# ---------------------------------------------------------------- whole steps
def two_steps(policy, data):
    """-> (sampled tokens per second, trees and metrics of the second step)"""
    state = State.begin(policy.config, data)
    predictor = PREDICTORS["head"](policy, data.env, 0)
    start = time.perf_counter()
    for _ in range(2):
        trees, metrics = train_step(policy.config, state, policy, predictor, data)
    return metrics["sampled_tokens"] / (time.perf_counter() - start), trees, metrics


def our_steps(dials, gib=0):
    """-> (sampled tokens per second, peak in MB), in what a card of so many GiB leaves.
    ValueError where that is more than all of the one here."""
    if gib:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((gib - TAKEN) * 2 ** 30 / total)
    return two_steps(*still_policy(dials))[0], peak_megabytes()


def step(dials):
    """Training steps against those of TRL on about as many sampled tokens."""
    name, works = "TRL's GRPOTrainer", [our_steps, trl_steps]
    if not find_spec("trl"):
        name, works = "TRL's GRPOTrainer, not run: pip install trl", [our_steps]
    measured = []
    for _ in range(REPEATS):
        measured.append([alone(work, dials) for work in works])
    speed, memory = np.transpose(measured)
    yield row_of(f"a training step (other: {name})", "tok/s", speed)
    yield row_of(f"its peak memory (other: {name})", "MB", memory)


# ---------------------------------------------------------------- cards
def make_model(folder, sizes):
    """Random weights in 16 bits, and the embedded policy's tokenizer with its vocabulary filled
    up by words that no text holds."""
    config = LlamaConfig(vocab_size=NUM_WORDS, max_position_embeddings=32768, **dict(zip(
        ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "tie_word_embeddings"), sizes)))
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(HERE / "world" / "tiny")
    tokenizer.add_tokens([f"<|{i}|>" for i in range(len(tokenizer), NUM_WORDS)])
    tokenizer.save_pretrained(folder)


def cards(dials):
    """Training steps in the memory that a card leaves; 0 tok/s where they do not fit."""
    for shape, sizes in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            make_model(folder, sizes)
            for gib in CARDS:
                name = f"a training step of Qwen2.5 {shape} in NF4 on {gib} GiB"
                case = dials | {"model": folder, "turn_tokens": 48}  # no turn ends before that
                try:
                    speed, _ = alone(our_steps, case, gib)
                except (torch.OutOfMemoryError, UsageError) as error:
                    if "memory" not in str(error):
                        raise
                    name, speed = f"{name}: does not fit", 0.0
                except ValueError:  # the card here is smaller
                    continue
                yield row_of(name, "tok/s", [[speed]])


PARTS = {"step": step}
if torch.cuda.is_available():
    PARTS["cards"] = cards
PARTS["engine"] = engine  # last: from then on this process holds memory of the GPU


def main(arguments=None):
    parser = Parser(__doc__, prog="lab.bench")
    parser.add_argument("--model", default="tiny", help="as in trace_mini.py [%(default)s]")
    parser.add_argument("--only", choices=PARTS, help="print the rows of one part, write nothing")
    args = parser.parse_args(arguments)
    rows = []
    for part in [args.only] if args.only else PARTS:
        for row in PARTS[part]({"model": args.model}):
            print(json.dumps(row))
            rows.append(row)
    if not args.only:
        write_json(HERE / "results" / "bench.json", rows)


if __name__ == "__main__":
    sys.exit(run_main("lab.bench", main))
