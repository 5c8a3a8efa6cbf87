"""What lasts: a run killed again and again, 2,000 steps, 100,000 questions. They
print their figures; TRACE_MINI_SMALL=1, as in .ci/run, does the same in small."""
import gc
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from statistics import median

import numpy as np
import pytest
import torch
from conftest import SMALL, metrics, timeless

import trace_mini
from engine.runs import State, load_checkpoint
from predictor import PREDICTORS, HeadPredictor
from trace_mini import HERE, Config, main, train_step
from tree import nodes
from world.questions import load_data

pytestmark = pytest.mark.long
TINY = ["--articles", "100", "--eval-questions", "4", "--pool-size", "2", "--budget", "40",
        "--max-turns", "2", "--num-continuations", "1", "--group-size", "2", "--seed", "7"]
EVERY = 2  # steps between checkpoints of the killed run


# ---------------------------------------------------------------- kills
def start(log, *flags):
    """A run as a user starts it -> process."""
    return subprocess.Popen([sys.executable, "trace_mini.py", *flags], cwd=HERE, stdout=log,
                            stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})


def num_rows(folder):
    """Lines that are whole."""
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def newest(folder):
    """Step of the newest checkpoint, which must be sound; None before the first."""
    if not list(folder.glob("checkpoint/step-*.pt")):
        return None
    return load_checkpoint(folder)["state"]["step"]


def wait_for(process, condition):
    """Returns a millisecond or so after it holds."""
    while not condition():
        assert process.poll() is None, "the run ended by itself"
        time.sleep(0.001)


def kill_somewhere(process, folder, place, rng):
    """SIGKILL at a random moment in one part of a run's life."""
    rows = num_rows(folder) + rng.randrange(3)
    if place == "before the first checkpoint":
        wait_for(process, (folder / "config.json").exists)
    elif place == "while it starts":
        time.sleep(rng.uniform(0, 6))
    else:
        wait_for(process, lambda: num_rows(folder) > rows)
        if place == "while it writes a checkpoint":
            wait_for(process, lambda: any(folder.glob("checkpoint/*.part")))
        else:
            time.sleep(rng.uniform(0, 0.5))
    process.kill()
    process.wait()


def test_killed_again_and_again(tmp_path, tell):
    """Whatever moment a SIGKILL comes at, the newest checkpoint is sound, at most the steps since
    it are redone, and at the end all numbers and files are those of an undisturbed run."""
    num_kills, rng = 3 if SMALL else 20, random.Random(0)
    num_steps, redone, half_written = 3 * num_kills + 4, 0, set()
    flags = [*TINY, "--steps", str(num_steps), "--checkpoint-every", str(EVERY),
             "--eval-every", "5"]
    places = ["anywhere", "while it writes a checkpoint", "while it starts"]
    places = ["before the first checkpoint", *(num_kills * places)][:num_kills]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with open(tmp_path / "log", "w") as log:
        assert start(log, "--out", str(whole), *flags).wait() == 0
        for number, place in enumerate(places, 1):
            step = newest(killed)
            if step is None:  # what the error line says
                shutil.rmtree(killed, ignore_errors=True)
            process = start(log, *(["--resume", str(killed)] if step is not None else
                                   ["--out", str(killed), *flags]))
            kill_somewhere(process, killed, place, rng)
            step, rows = newest(killed), num_rows(killed)
            lines = (killed / "metrics.jsonl").read_text().split("\n") if rows else []
            assert [json.loads(line)["step"] for line in lines[:rows]] == [*range(1, rows + 1)]
            assert rows - (step or 0) in range(EVERY + 1)
            parts = {f"{file.relative_to(killed)}": file.stat().st_mtime_ns
                     for file in killed.glob("**/*.part")}
            redone += rows - (step or 0)
            half_written |= {part for part in parts.items() if part[0].startswith("checkpoint/")}
            tell(f"kill {number:2d} {place:28s} after step {rows:2d}, newest checkpoint "
                 f"{'-' if step is None else step}, half written: {', '.join(parts) or '-'}")
        assert start(log, "--resume", str(killed)).wait() == 0
    assert half_written, "no kill came while a checkpoint was written"
    assert [timeless(row) for row in metrics(killed)] == [timeless(row) for row in metrics(whole)]
    for name in ("evals.jsonl", "predictions.json", "adapter/adapter_model.safetensors"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    ours, theirs = (load_checkpoint(folder) for folder in (killed, whole))
    for saved in (ours, theirs):  # the only thing that knows the times
        del saved["state"]["metrics_bytes"]
    assert same(ours, theirs)
    tell(f"{num_kills} kills in {num_steps} steps, {len(half_written)} while a checkpoint was "
         f"written: at most {redone} steps redone, no line doubled or lost; metrics, evaluations, "
         "predictions, adapter and checkpoint are those of a run left alone")


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


# ---------------------------------------------------------------- load
def resident():
    """MB of memory that this process has now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e6


def test_thousands_of_steps(tmp_path, monkeypatch, tell):
    """Memory, file handles and the CPU time of a step stay what they were. The predictor forgets
    sooner than usual, so that what it remembers is full from the start, and every step trains."""
    num, window, seen = (200, 40, []) if SMALL else (2000, 400, [])
    monkeypatch.setitem(PREDICTORS, "head", partial(HeadPredictor, memory=100))
    monkeypatch.setattr(trace_mini, "advantages", lambda root, rule: dict.fromkeys(
        nodes(root)[1:], 0.1))

    def watched(*args):
        seen.append((time.process_time(), resident(), len(os.listdir("/proc/self/fd"))))
        return train_step(*args)
    monkeypatch.setattr(trace_mini, "train_step", watched)
    gc.freeze()  # what is there already is not searched at every step
    start_s = time.perf_counter()
    try:
        assert main([*TINY, "--turn-tokens", "2", "--steps", str(num), "--show-every", "500",
                     "--checkpoint-every", "20", "--out", str(tmp_path / "run")]) == 0
    finally:
        gc.unfreeze()
    cpu, memory, handles = np.array(seen).T
    costs = [1000 * median(part) for part in (np.diff(cpu)[:window], np.diff(cpu)[-window:])]
    means = [1000 * np.mean(part) for part in (np.diff(cpu)[:window], np.diff(cpu)[-window:])]
    held = [median(part) for part in (memory[window // 2:window], memory[-window // 2:])]
    rows = metrics(tmp_path / "run")
    tell(f"{num} steps in {time.perf_counter() - start_s:.0f} s; first and last {window}: CPU "
         f"per step, median {costs[0]:.0f} and {costs[1]:.0f} ms, mean with checkpoints "
         f"{means[0]:.0f} and {means[1]:.0f} ms; memory {held[0]:.0f} and {held[1]:.0f} MB; file "
         f"handles {handles[window]:.0f} and {handles[-1]:.0f}")
    assert [row["step"] for row in rows] == [*range(1, num + 1)]
    assert all(row["loss_tokens"] > 0 and not row["update_skipped"] for row in rows)
    assert handles[window:].max() <= handles[:window].max()
    assert held[1] - held[0] < 20, "MB"
    assert costs[1] < 1.3 * costs[0] and means[1] < 1.3 * means[0]


def test_a_pool_of_100000_questions(tell):
    """All of them candidates of one step: fed, predicted, and allocated to."""
    num = 10_000 if SMALL else 100_000
    dials = {"articles": 1000, "eval_questions": 4, "budget": 400, "pool_size": num,
             "max_turns": 2, "turn_tokens": 8}
    config = Config(**dials)
    data = load_data(config)
    questions = [replace(data.train[i % len(data.train)], id=f"q{i}") for i in range(num)]
    policy, state = trace_mini.load_policy(config), State()
    predictor = PREDICTORS["head"](policy, data.env, 0)
    state.first_cost(16.0, config.num_continuations)
    before, start_s = resident(), time.perf_counter()
    trees, row = train_step(config, state, policy, predictor, data._replace(train=questions))
    seconds = time.perf_counter() - start_s
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tell(f"a pool of {num:,} questions: one step in {seconds:.0f} s (predict "
         f"{row['time_predict_s']:.0f} s, allocate {row['time_allocate_s']:.2f} s), memory "
         f"{before:.0f} MB before, {resident():.0f} MB after, {most / 1e3:.0f} MB at most")
    assert state.cursor == num and 0 < row["coverage"] < 0.01
    assert sum(row["group_sizes"].values()) == len(trees)
