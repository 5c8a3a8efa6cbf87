"""What fits on which card, and how fast: python -m lab.bench_gpu (one NVIDIA GPU, planned for 20 min)

Nothing is downloaded: random weights in the shapes of Qwen2.5 (up to 16 GB in the temporary
folder), loaded and used as trace_mini.py does, with PyTorch's memory capped to what a card of 6,
8, 12 or 24 GiB leaves to it. Each case is a process of its own, so that one that does not fit
ends alone, and this one holds no memory of the GPU. Its row goes to results/gpu.json; what stands
there is not run again, so the same line goes on after a kill. The last rows are whole steps of
the tiny policy, in one run and in several at once, as `ablate.py --jobs` starts them.

A case fits if live episodes fill their context in their last turn, and if full paths go through
the update. Speed is measured on toy questions. Random weights write random words: every turn
runs to its last token, so tokens per second are real, and the answers are not. They are spread
over 151,936 words, most of which no text encodes to: prompts are longer than with Qwen's own.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from engine.loading import ModelError
from engine.runs import write_json
from lab.alternatives import credits_of
from policy import load_policy
from rollout import forget_caches, grow
from trace_mini import HERE, Config
from tree import Node, leaves, path, sampled_tokens
from world.questions import load_data

# hidden size, MLP size, layers, heads, key-value heads, words, one matrix for input and output?
SHAPES = {"test": (64, 64, 2, 2, 1, 2048, True),
          "0.5B": (896, 4864, 24, 14, 2, 151_936, True),
          "1.5B": (1536, 8960, 28, 12, 2, 151_936, True),
          "3B": (2048, 11008, 36, 16, 2, 151_936, True),
          "7B": (3584, 18944, 28, 28, 4, 151_936, False)}
CARDS = (24, 12, 8, 6)  # GiB; on the largest also 16-bit weights and the alternatives
TAKEN = 0.6             # GiB of a card that CUDA itself and a desktop take, about
UPDATE = 32_768         # tokens of paths, prompts and observations included
RUNS = (1, 4, 8)        # of the tiny policy at once
RUN = ["--steps", "8", "--eval-questions", "1"]
DIALS = {"articles": 100, "eval_questions": 1, "max_turns": 3, "turn_tokens": 48}
TEST = DIALS | {"context": 1280, "cache_tokens": 2560, "turn_tokens": 8, "max_turns": 2}


def make_model(folder, shape):
    """Random weights in 16 bits, written tensor by tensor, and the tiny policy's tokenizer with
    its vocabulary filled up by words that no text encodes to."""
    from safetensors.torch import save_file
    from transformers import Qwen2Config, Qwen2ForCausalLM
    hidden, mlp, layers, heads, shared_heads, words, tied = SHAPES[shape]
    config = Qwen2Config(
        hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=shared_heads, vocab_size=words,
        tie_word_embeddings=tied, max_position_embeddings=32768, eos_token_id=0, bos_token_id=0,
        architectures=["Qwen2ForCausalLM"])
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    device, files = "cuda" if torch.cuda.is_available() else "cpu", {}
    for name, like in model.named_parameters():  # a tied matrix comes once
        weight = torch.ones(like.shape) if "norm" in name else torch.empty(
            like.shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02)
        files[name] = f"{name}.safetensors"
        save_file({name: weight.bfloat16().cpu()}, folder / files[name], {"format": "pt"})
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": files})
    shutil.copy(HERE / "world" / "tiny" / "tokenizer_config.json", folder)
    tokenizer = json.loads((HERE / "world" / "tiny" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary.update({f"w{i}": i for i in range(len(vocabulary), words)})
    write_json(folder / "tokenizer.json", tokenizer)


# ---------------------------------------------------------------- one case
def seconds(work):
    """-> (seconds that it took on the device, what it returned)"""
    start = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def alone(leaf):
    """Root of a tree that holds the path of this leaf only: nothing is shared."""
    node = None
    for like in path(leaf):
        node = Node(like.ids, like.num_sampled, like.state, node, like.logprobs)
    return path(node)[0]


def measure(row, folder, seed=0):
    """Fill in the row of one case; `stage` says how far it came."""
    row["stage"] = "loading"
    config = Config(model=str(folder), four_bit=row["weights"] == "nf4",
                    **TEST if row["model"] == "test" else DIALS)
    data, policy = load_data(config), load_policy(config)
    live = max(1, policy.cache_tokens // policy.context)

    row["stage"] = "sampling full paths"
    rng, state = np.random.default_rng(seed), data.env.reset(data.train[0])
    room = policy.context - config.turn_tokens
    roots = [Node(rng.integers(1, 1024, room).astype(np.int32), 0, state) for _ in range(live)]
    grow(policy, data.env, roots, [1] * live, (seed, 0))
    row["stage"] = "updating on full paths"
    policy.update(credits_of(roots[:2]))
    forget_caches(roots)

    row["stage"] = "sampling"  # all live episodes, two per prompt, and one from each's last turn
    roots = [policy.root(question, data.env) for question in data.train[:-(-live // 2)]]
    took, _ = seconds(lambda: grow(policy, data.env, roots, [2] * len(roots), (seed, 1)))
    row["sampled_tok_s"] = sum(map(sampled_tokens, roots)) / took
    anchors = [path(leaf)[-2] for root in roots for leaf in leaves(root)]

    def proceed():
        before = sum(map(sampled_tokens, roots))
        took, _ = seconds(lambda: grow(policy, data.env, anchors, [1] * len(anchors), (seed, 2)))
        return (sum(map(sampled_tokens, roots)) - before) / took
    row["forked_tok_s"] = proceed()
    forget_caches(roots)
    again = proceed()  # in every case, so that all update the same trees
    if row["compare"]:
        row["prefilled_tok_s"] = again
    forget_caches(roots)

    row["stage"] = "updating"
    tokens = np.cumsum([sum(leaf.length for leaf in leaves(root)) for root in roots])
    roots = roots[:1 + int((tokens < UPDATE).sum())]
    scale = UPDATE / tokens[len(roots) - 1]
    policy.update(credits_of(roots[:1]))  # the first kernels are slow
    row["update_32k_s"] = seconds(lambda: policy.update(credits_of(roots)))[0] * scale
    if row["compare"]:
        paths = [alone(leaf) for root in roots for leaf in leaves(root)]
        row["paths_32k_s"] = seconds(lambda: policy.update(credits_of(paths)))[0] * scale
    row.update(stage="done", fits=True, context=policy.context, prompt_tokens=roots[0].length,
               planned_episodes=live, live_episodes=max(1, policy.cache_tokens // policy.context),
               cache_tokens=policy.cache_tokens, checkpointing=policy.checkpointing)


def capped(row, folder):
    """`measure`, in what memory the row's card would have; the folder's model is made first."""
    if not (folder / "tokenizer.json").exists():  # written last
        make_model(folder, row["model"])
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, (row["card_gib"] - TAKEN) * 2 ** 30 / total))
    try:
        measure(row, folder)
    except torch.cuda.OutOfMemoryError:
        row["fits"] = False
    except ModelError as error:
        if "does not fit" not in str(error):
            raise
        row["fits"] = False
    if torch.cuda.is_available():
        row["peak_gib"] = TAKEN + torch.cuda.max_memory_reserved() / 2 ** 30
        row["hardware"] = torch.cuda.get_device_name()


def at_once(row, folder):
    """Runs of the tiny policy side by side: the tokens/s of all, in whole steps but their first."""
    runs = [folder / f"{row['runs']}-{seed}" for seed in range(row["runs"])]
    threads = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // len(runs)))}
    processes = [subprocess.Popen(
        [sys.executable, HERE / "trace_mini.py", *RUN, "--seed", str(seed), "--out", run],
        env=os.environ | threads, stdout=subprocess.DEVNULL) for seed, run in enumerate(runs)]
    if any([process.wait() for process in processes]):
        raise RuntimeError("a run failed")
    row.update(stage="done", fits=True, sampled_tok_s=0.0)
    for run in runs:
        first, *steps = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        tokens = steps[-1]["sampled_tokens"] - first["sampled_tokens"]
        row["sampled_tok_s"] += tokens / sum(step[name] for step in steps for name in step
                                             if name.startswith("time_"))


# ---------------------------------------------------------------- all cases
def cases(shape, largest):
    """Rows to be filled in: NF4 on every card up to the real one, 16 bits on the largest."""
    if shape == "tiny":
        return [{"model": f"tiny, {num} at once", "weights": "nf4", "card_gib": largest,
                 "runs": num} for num in RUNS]
    cards = [card for card in CARDS if card <= largest]
    return [{"model": shape, "weights": weights, "card_gib": card, "fits": None,
             "compare": card == max(cards) and weights == "nf4"}
            for weights in ("nf4", "16 bits") for card in cards
            if weights == "nf4" or (card == max(cards) and shape != "test")]


def key(row):
    return row["model"], row["weights"], row["card_gib"]


def describe(row):
    """A line of the table of HEADER."""
    def number(name, digits=0):
        return f"{row[name]:,.{digits}f}" if row.get(name) is not None else "-"
    fits = "yes" if row["fits"] else f"no ({row['stage']})"
    return (f"| {row['model']} | {row['weights']} | {row['card_gib']} | {fits} | "
            f"{number('peak_gib', 1)} | {number('live_episodes')} | {number('sampled_tok_s')} | "
            f"{number('forked_tok_s')} / {number('prefilled_tok_s')} | "
            f"{number('update_32k_s', 1)} / {number('paths_32k_s', 1)} |")


HEADER = """\
| Qwen2.5 | weights | card, GiB | fits | peak, GiB | live episodes | tok/s (tiny: of whole \
steps) | tok/s forked / prefilled again | s per update of 32k tokens, packed / path by path |
|---|---|---|---|---|---|---|---|---|"""


def gibibytes():
    """Of this machine's card, asked in a process of its own, which ends."""
    ask = "import torch; print(torch.cuda.get_device_properties(0).total_memory)"
    return round(int(subprocess.check_output([sys.executable, "-c", ask])) / 2 ** 30)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=[*SHAPES, "tiny"],
                        help="one model; test is small and runs on CPU")
    parser.add_argument("--out", help="where the rows go [results/gpu.json]")
    parser.add_argument("--case", nargs=2, metavar=("JSON", "FOLDER"), help="used by itself")
    args = parser.parse_args(arguments)
    if args.case:
        row, folder = json.loads(args.case[0]), Path(args.case[1])
        (at_once if "runs" in row else capped)(row, folder)
        return print(json.dumps(row))
    if not torch.cuda.is_available() and args.shape != "test":
        print("bench_gpu.py: needs an NVIDIA GPU, --shape test --out FILE none", file=sys.stderr)
        return 2
    if args.shape == "test" and not args.out:
        parser.error("--shape test measures nothing: name a file of its own with --out")
    largest = min(CARDS) if args.shape == "test" else gibibytes()
    if largest < min(CARDS):
        print(f"bench_gpu.py: the smallest card that it measures has {min(CARDS)} GiB",
              file=sys.stderr)
        return 2
    file, num_failed = Path(args.out or HERE / "results" / "gpu.json"), 0
    rows = json.loads(file.read_text()) if file.exists() else []
    file.parent.mkdir(parents=True, exist_ok=True)
    print(HEADER)
    for shape in [args.shape] if args.shape else [*list(SHAPES)[1:], "tiny"]:
        with tempfile.TemporaryDirectory() as folder:
            for row in cases(shape, largest):
                if key(row) in map(key, rows):
                    continue
                done = subprocess.run([sys.executable, "-m", "lab.bench_gpu", "--case", json.dumps(row),
                                       folder], cwd=HERE,
                                      capture_output=True, text=True)
                if done.returncode:  # not a row: the next call tries again
                    num_failed += 1
                    print(f"{key(row)} failed: {done.stderr.strip()[-300:]}", file=sys.stderr)
                    continue
                rows.append(json.loads(done.stdout.strip().split("\n")[-1])
                            | {"torch": torch.__version__})
                write_json(file, rows)
                print(describe(rows[-1]), flush=True)
    return int(num_failed > 0)


if __name__ == "__main__":
    sys.exit(main())
