"""What lasts: a run that is killed again and again, 2,000 steps, a pool of 100,000 questions. The
tests print their figures. TRACE_MINI_SMALL=1, as in .ci/run, does the same in small."""
import gc
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import SMALL, TINY, assert_same_numbers, metrics

import trace_mini
from allocator import ROOT_RULES
from engine.runs import checkpoint_files, load_checkpoint
from predictor import PREDICTORS, HeadPredictor
from trace_mini import HERE, Config, State, main, train_step
from tree import nodes
from world.questions import load_data

pytestmark = pytest.mark.long
EVERY = 2  # steps between checkpoints of the killed run
PLACES = ["while it starts", "anywhere", "while it writes a checkpoint"]


# ---------------------------------------------------------------- kills
def num_rows(folder):
    """Lines that are whole."""
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def newest(folder):
    """Step of the newest checkpoint, which must be sound; None before the first."""
    if checkpoint_files(folder):
        return load_checkpoint(folder)["state"]["schedule"]["step"]


def kill_somewhere(process, folder, place, rng):
    """SIGKILL at a random moment in one part of a run's life."""
    def wait_for(condition):
        while not condition():
            assert process.poll() is None, "the run ended by itself"
            time.sleep(0.001)

    rows = num_rows(folder) + rng.randrange(3)
    if place == "before the first checkpoint":
        wait_for((folder / "config.json").exists)
    elif place == "while it starts":
        time.sleep(rng.uniform(0, 6))
    else:
        wait_for(lambda: num_rows(folder) > rows)
        if place == "while it writes a checkpoint":
            wait_for(lambda: any(folder.glob("checkpoint/*.part")))
        else:
            time.sleep(rng.uniform(0, 0.5))
    process.kill()
    process.wait()


def test_killed_again_and_again(tmp_path, tell):
    """Whatever moment a SIGKILL comes at, the newest checkpoint is sound, at most the steps since
    it are redone, and at the end all numbers and files are those of an undisturbed run."""
    num_kills, rng, redone, half_written = 3 if SMALL else 20, random.Random(0), 0, 0
    whole, killed, log = tmp_path / "whole", tmp_path / "killed", open(tmp_path / "log", "w")

    def start(folder):
        """A run, or what is left of it, as a user starts it; without a checkpoint anew."""
        flags = [f"--resume={folder}"]
        if newest(folder) is None:
            shutil.rmtree(folder, ignore_errors=True)
            flags = [*TINY, f"--out={folder}", f"--steps={3 * num_kills + 4}",
                     f"--checkpoint-every={EVERY}", "--eval-questions=0:4,33:4,67:4,100:4"]
        return subprocess.Popen([sys.executable, "trace_mini.py", *flags], cwd=HERE, stdout=log,
                                stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})

    assert start(whole).wait() == 0
    for number in range(num_kills):
        place = PLACES[number % 3] if number else "before the first checkpoint"
        kill_somewhere(start(killed), killed, place, rng)
        lost = num_rows(killed) - (newest(killed) or 0)
        assert 0 <= lost <= EVERY
        redone += lost
        half_written += any(killed.glob("**/step*.part"))
    assert start(killed).wait() == 0
    assert half_written, "no kill came while a checkpoint was written"
    assert_same_numbers(killed, whole)
    ours, theirs = load_checkpoint(killed), load_checkpoint(whole)
    for part in ("state", "policy", "predictor"):
        torch.testing.assert_close(ours[part], theirs[part], rtol=0, atol=0)
    tell(f"{num_kills} kills in {3 * num_kills + 4} steps, {half_written} while a checkpoint was "
         f"written: {redone} steps redone, no line doubled or lost; metrics, evaluations, "
         "predictions, adapter and checkpoint are those of a run left alone")


# ---------------------------------------------------------------- load
def resident():
    """MB of memory that this process has now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e6


def test_thousands_of_steps(tmp_path, monkeypatch, tell):
    """Memory, file handles and the CPU time of a step stay what they were. The predictor forgets
    sooner than usual, so that what it remembers is full from the start, and every step trains."""
    num, window, seen = (200, 40, []) if SMALL else (2000, 400, [])

    def watched(*args):
        assert gc.get_freeze_count()  # what was there before is not searched at every step
        seen.append((time.process_time(), resident(), len(os.listdir("/proc/self/fd"))))
        return ROOT_RULES["trace"](*args)
    monkeypatch.setitem(ROOT_RULES, "watched", watched)
    monkeypatch.setitem(PREDICTORS, "short", partial(HeadPredictor, memory=100))
    monkeypatch.setattr(trace_mini, "advantages", lambda root, rule: dict.fromkeys(
        nodes(root)[1:], 0.1))  # also where there is no contrast
    assert main([*TINY, "--turn-tokens=2", f"--steps={num}", "--checkpoint-every=20",
                 "--root-rule=watched", "--predictor=short", f"--out={tmp_path}"]) == 0
    assert gc.get_freeze_count() == 0
    cpu, memory, handles = np.array(seen).T
    cpu = 1000 * np.diff(cpu)
    first, last = cpu[:window], cpu[-window:]
    grown = np.median(memory[-window // 2:]) - np.median(memory[window // 2:window])
    tell(f"{num} steps; first and last {window}: CPU per step, median {np.median(first):.0f} and "
         f"{np.median(last):.0f} ms, mean with checkpoints {first.mean():.0f} and "
         f"{last.mean():.0f} ms; memory {memory[window]:.0f} and {memory[-1]:.0f} MB; file handles "
         f"{handles[window]:.0f} and {handles[-1]:.0f}")
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == [*range(1, num + 1)]
    assert all(row["loss_tokens"] > 0 and not row["update_skipped"] for row in rows)
    assert handles[window:].max() <= handles[:window].max() and grown < 20, "MB"
    assert np.median(last) < 1.3 * np.median(first) and last.mean() < 1.3 * first.mean()


def test_a_pool_of_100000_questions(tell):
    """All of them candidates of one step: fed, predicted, and allocated to."""
    num = 10_000 if SMALL else 100_000
    config = Config(eval_questions=4, budget=400, pool_size=num, turn_tokens=8)
    data = load_data(config)
    questions = [replace(data.train[i % len(data.train)], id=f"q{i}") for i in range(num)]
    data = data._replace(train=questions)
    policy, state = trace_mini.load_policy(config), State.begin(config, data, 16.0)
    before, start_s = resident(), time.perf_counter()
    trees, row = train_step(config, state, policy, HeadPredictor(policy), data)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tell(f"a pool of {num:,} questions: one step in {time.perf_counter() - start_s:.0f} s (predict "
         f"{row['time_predict_s']:.0f} s, allocate {row['time_allocate_s']:.2f} s), memory "
         f"{before:.0f} MB before, {resident():.0f} MB after, {most / 1e3:.0f} MB at most")
    assert state.prompts.cursor == num and 0 < row["coverage"] < 0.01
    assert sum(m > 0 for _, m in row["pool"]) == len(trees)
