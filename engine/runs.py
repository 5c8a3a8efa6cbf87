"""The run folder: config, metrics, checkpoints, and what a run prints.

Nothing is overwritten: a fresh run gets a fresh folder. A checkpoint is one file, written
aside, flushed and renamed, and the one before it is kept, so that a kill at any moment loses
at most the steps since the last one. It also holds the lengths of the metrics files; resuming
cuts them back to there. It says whose it is, and is refused where it is damaged or another's.
"""
import argparse
import ctypes
import dataclasses
import gc
import io
import json
import math
import os
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import torch
from tqdm import tqdm

from tree import leaves, path

DECAY = 0.9  # of counted outcomes and tokens, whenever a step adds to them
MEMORY = {"cache_tokens", "micro_batch_tokens", "gradient_checkpointing", "logit_chunk"}  # dials
FREE = MEMORY | {"resume", "steps", "eval_only"}  # what may change when a run goes on
MOST_BAD = 10  # steps in a row whose numbers are not finite, then a run stops by itself
COST_DECAY = 0.7  # per step, of the counts from which the cost of a rollout is forecast


class UsageError(ValueError):
    """Something the user can mend, in one line."""


class NotFinite(ArithmeticError):
    """Why a run stopped by itself, in one line."""


def fresh_folder(out, name):
    """A path for a new run: `out`, which must not hold one, or runs/`name`, numbered."""
    if out:
        if any((Path(out) / name).exists() for name in ("config.json", "metrics.jsonl")):
            raise UsageError(f"--out {out}: holds a run already; --resume {out} goes on with it")
        return Path(out)
    folder, number = Path("runs") / name, 1
    while folder.exists():
        number += 1
        folder = Path("runs") / f"{name}-{number}"
    return folder


def start_folder(folder, config, fresh):
    """Make the folder, with config.json in it; a fresh one must not hold any."""
    try:
        (folder / "checkpoint").mkdir(parents=True, exist_ok=True)
        if fresh:
            (folder / "config.json").touch(exist_ok=False)  # two runs may start together
        write_json(folder / "config.json", dataclasses.asdict(config)
                   | {"resume": config.resume if config.eval_only else ""})
    except OSError as error:
        raise UsageError(f"--out {folder}: {error.strerror}") from None


def write_json(file, content):
    """Written aside and renamed: a reader never meets half a file."""
    aside = Path(f"{file}.part")
    with open(aside, "w") as stream:
        json.dump(content, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(file)


class Lines:
    """A JSON-lines file that a resumed run cuts back to its last checkpoint."""

    def __init__(self, file, size):
        self.stream = open(file, "ab")
        if self.stream.tell() < size:
            raise UsageError(f"{file}: shorter than the checkpoint says, changed by hand; bring "
                             "it back, or start again in another folder")
        self.stream.truncate(size)
        self.stream.seek(size)

    def write(self, row):
        """A number that is not finite becomes null: JSON knows no NaN."""
        row = {name: None if isinstance(value, float) and not math.isfinite(value) else value
               for name, value in row.items()}
        self.stream.write(json.dumps(row).encode() + b"\n")
        self.stream.flush()

    def sync(self):
        """Bring all to the disk, before a checkpoint relies on it; -> length in bytes."""
        os.fsync(self.stream.fileno())
        return self.stream.tell()


def own_dials(dials):
    """Of {name: value}, what makes a run and its checkpoints its own."""
    return {name: value for name, value in dials.items() if name not in FREE | {"out"}}


def checkpoint_file(folder, step):
    return folder / "checkpoint" / f"step-{step:06d}.pt"


def save_checkpoint(folder, step, content):
    """Write checkpoint/step-000010.pt and keep the one before it."""
    file = checkpoint_file(folder, step)
    aside = file.with_suffix(".part")
    torch.save(content, buffer := io.BytesIO())  # into a file it would hide that a disk is full
    with open(aside, "wb") as stream:
        stream.write(buffer.getbuffer())
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(file)
    for old in sorted((folder / "checkpoint").glob("step-*.pt"))[:-2]:
        old.unlink()


def load_checkpoint(folder):
    """Content of the newest checkpoint. UsageError when there is none, or it is damaged, or its
    dials are not those of config.json (checkpoints that say nothing of dials are older)."""
    files = sorted((folder / "checkpoint").glob("step-*.pt"))
    if not files:
        raise UsageError(f"--resume {folder}: no checkpoint there, so nothing is trained yet; "
                         "delete the folder and start again")
    then = (f"delete it to go on from {files[-2].name}" if len(files) > 1 else
            "there is none before it, so start again in another folder")
    try:
        with ZipFile(files[-1]) as archive:  # torch takes changed bytes for weights
            if archive.testzip():
                raise ValueError
        saved = torch.load(files[-1], weights_only=True, map_location="cpu")
        State(**saved["state"]), saved["policy"], saved["predictor"]
    except Exception:  # zip, pickle and torch each have many of their own
        raise UsageError(f"{files[-1]}: damaged, or no checkpoint of ours; {then}") from None
    config = json.loads((folder / "config.json").read_text())
    if strange := sorted(saved.get("config", {}).items() - config.items()):
        raise UsageError(f"{files[-1]}: of another run, with {strange[0][0]} {strange[0][1]}, not "
                         f"{config.get(strange[0][0])}; {then}")
    return saved


@dataclass
class State:
    """What a run carries from step to step besides the weights."""
    step: int = 0
    cursor: int = 0                            # questions drawn so far
    sampled_tokens: int = 0
    num_costed: float = 0.0                    # bare rollouts, decayed by step, and the tokens
    tokens_costed: float = 0.0                 # ... they and their continuations took
    visits: dict = field(default_factory=dict)  # question id -> (successes, failures)
    below: dict = field(default_factory=dict)  # depth -> (bare rollouts, tokens they went on for)
    metrics_bytes: int = 0                     # lengths of the files at the last checkpoint
    evals_bytes: int = 0
    bad_steps: int = 0                         # in a row, with numbers that were not finite

    def first_cost(self, episode_tokens, num_continuations):
        """A guess, worth two rollouts: a continuation costs 0.6 of an episode."""
        self.num_costed = 2.0
        self.tokens_costed = 2 * max(1.0, episode_tokens) * (1 + 0.6 * num_continuations)

    def num_bare(self, budget):
        """M: bare rollouts that the schedule buys now, at least 2. The schedule is `budget`
        tokens per step from the start, so what earlier steps overspent or left is carried."""
        left = budget * (self.step + 1) - self.sampled_tokens
        return max(2, int(left * self.num_costed / max(self.num_costed, self.tokens_costed)))

    def count_bare(self, roots):
        """Add these prompts' bare rollouts, before any continuation, to the decayed counts."""
        below = {}  # depth -> tokens sampled after it, by rollout
        for root in roots:
            rewards = [leaf.reward for leaf in leaves(root)]
            wins, losses = self.visits.get(root.state.question.id, (0.0, 0.0))
            self.visits[root.state.question.id] = (
                DECAY * wins + sum(rewards), DECAY * losses + len(rewards) - sum(rewards))
            for leaf in leaves(root):
                for node in path(leaf)[:-1]:
                    tokens = sum(later.num_sampled for later in path(leaf)[node.depth + 1:])
                    below.setdefault(node.depth, []).append(tokens)
        for depth, tokens in below.items():
            num, total = self.below.get(depth, (0.0, 0))
            self.below[depth] = (DECAY * num + len(tokens), DECAY * total + sum(tokens))

    def expected_tokens(self, anchors):
        """Sampled tokens that a rollout from each anchor may cost, [n] >= 1: the mean by depth
        of bare rollouts, which unlike continuations were not picked by what came of them."""
        means = [total / num for num, total in (self.below.get(a.depth, (1, 1)) for a in anchors)]
        return np.maximum(1.0, means)

    def advance(self, num_bare, tokens):
        """One step is done: what it spent."""
        self.step += 1
        self.sampled_tokens += tokens
        self.num_costed = COST_DECAY * self.num_costed + num_bare
        self.tokens_costed = COST_DECAY * self.tokens_costed + tokens


def trim_memory():
    """Give the last step's memory back. Trees are cycles of references, which Python frees late,
    and glibc keeps the pieces: without this the default run grew by 15 MB a step."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:
        trim(0)


class Clock(dict):
    """Seconds by name: `with clock("sample"): ...` adds up."""

    def __init__(self):
        super().__init__(sample=0.0, predict=0.0, allocate=0.0, update=0.0)

    @contextmanager
    def __call__(self, name):
        start = time.perf_counter()
        yield
        self[name] += time.perf_counter() - start


@contextmanager
def ctrl_c():
    """-> list that the first Ctrl-C puts something into; the second one stops at once."""
    stopped = []

    def note(*_):
        stopped.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        say("Ctrl-C: finishing this step; once more stops at once")
    before = signal.signal(signal.SIGINT, note)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


# ---------------------------------------------------------------- command line
class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def parse_config(Config, description, arguments):
    """-> Config. `--resume DIR` takes the configuration of the run; only --steps and the memory
    dials may change. With --eval-only it may score another file, into another folder."""
    parser = Parser(description=description.split("\n")[0], allow_abbrev=False)
    for dial in dataclasses.fields(Config):
        flag, extra = "--" + dial.name.replace("_", "-"), dict(dial.metadata)
        if dial.name == "four_bit":
            parser.add_argument("--no-4bit", dest="four_bit", action="store_false",
                                default=argparse.SUPPRESS, **extra)
        elif dial.type is bool:
            parser.add_argument(flag, action="store_true", default=argparse.SUPPRESS, **extra)
        else:
            if dial.default is not None:
                extra["help"] += f" [{dial.default}]"
            parser.add_argument(flag, type=dial.type, default=argparse.SUPPRESS,
                                metavar=dial.type.__name__.upper(), **extra)
    given = vars(parser.parse_args(arguments))
    if "resume" not in given:
        return Config(**given)
    if other := sorted(set(given) - FREE - ({"data", "out"} if "eval_only" in given else set())):
        raise UsageError("--resume goes on with the run's own configuration; beside it stand only "
                         "--steps, the memory dials and --eval-only with --data and --out, not "
                         f"--{other[0].replace('_', '-')}")
    if ("data" in given) != ("out" in given):
        raise UsageError("--resume --eval-only: --data names another file, and --out a folder for "
                         "its scores; neither goes alone")
    if "eval_only" in given:
        given = {"out": "", **given} | ({"eval_data": ""} if "data" in given else {})
    return read_config(Config, given["resume"], **given)


def read_config(Config, folder, **changed):
    """Configuration of the run in `folder`, with some dials changed."""
    file = Path(folder) / "config.json"
    try:
        dials = {**json.loads(file.read_text()), **changed}
        for dial in dataclasses.fields(Config):
            value = dials.get(dial.name, dial.type())
            if type(value) not in (dial.type, int if dial.type is float else dial.type):
                raise TypeError(f"{dial.name} is {value!r}")
        return Config(**dials)
    except UsageError:
        raise
    except OSError:
        raise UsageError(f"{folder}: no run there (no config.json)") from None
    except (ValueError, TypeError) as error:
        raise UsageError(f"{file}: not a configuration of ours ({error})") from None


# ---------------------------------------------------------------- what a run prints
def say(text):
    tqdm.write(text)


def describe(row):
    """One line per step, with units."""
    auroc = row["predictor_auroc"]
    bad = [name for name in ("update", "predictor") if row[f"{name}_skipped"]]
    return (f"step {row['step']:3d} | reward {row['reward_mean']:.2f} | Effective Ratio predicted "
            f"{row['predicted_effective_ratio']:.2f} realised {row['effective_ratio']:.2f} | "
            f"{row['active_prompts']} prompts x {row['leaves_per_prompt']:.1f} leaves | "
            f"{row['sampled_tokens']:,} tokens | predictor AUROC "
            f"{'-' if auroc is None else f'{auroc:.2f}'} | "
            f"seconds: sample {row['time_sample_s']:.1f} predict {row['time_predict_s']:.1f} "
            f"allocate {row['time_allocate_s']:.2f} update {row['time_update_s']:.1f}"
            + (f" | SKIPPED, as not finite: {', '.join(bad)}" if bad else ""))


def transcript(policy, path):
    """One episode as text: what the policy wrote and what it was shown."""
    prompt, *turns = (policy.text(node.ids) for node in path)
    question = path[-1].state.question
    text = prompt[prompt.rindex("Question: "):] + "".join(turns)  # without the examples
    return (f"--- an episode (reward {path[-1].reward:.0f}, answer: "
            f"{' / '.join(question.answers)})\n{text}\n---")
