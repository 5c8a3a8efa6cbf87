"""The run folder: metrics, trees, checkpoints, adapter.

Nothing is overwritten: a fresh run gets a fresh folder. A checkpoint is one file, written
aside, flushed and renamed, and the one before it is kept, so that a kill at any moment loses
at most the steps since the last one. It also holds the lengths of the metrics files; resuming
cuts them back to there. It says whose it is, and is refused where it is damaged or another's.
"""
import io
import json
import math
import os
import re
import shutil
import signal
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from zipfile import ZipFile

import torch
from safetensors import SafetensorError

from engine.command_line import changed_dials, command_of, flag_of, own_dials, without_path
from engine.draw import draw_curve
from engine.errors import UsageError, first_line
from engine.files import read_lines, write_aside, write_json
from engine.processes import team
from engine.report import write_report
from engine.tell import describe_scores, say

PARTS = {"config", "inputs", "state", "policy", "predictor", "lengths"}  # of every checkpoint
MOST_BYTES = 100  # of a folder's name


def fresh_folder(config):
    """A path for a new run: its --out, which must not hold one, or a new name in runs/."""
    return team().first(lambda: free_folder(config))


def free_folder(config):
    """Where nothing stands yet."""
    out = config.out
    if out:
        if (Path(out) / "config.json").exists():
            raise UsageError(f"--out {out}: holds a run already; --resume {out} goes on with it")
        return Path(out)
    kind = "eval" if config.eval_only else config.method
    name = f"{kind}-{Path(config.data).stem}-s{config.seed}"
    changed = changed_dials(config)
    for flag in map(flag_of, own_dials(config)):
        if flag in changed and flag not in ("--data", "--seed"):
            value = os.path.basename(changed[flag])
            name += flag[1:] + re.sub(r"[^\w.,=-]+", "_", value and f"-{value}")
    name = Path("runs") / name.encode(errors="replace")[:MOST_BYTES].decode(errors="ignore")
    folder, number = name, 1
    while folder.exists():
        number += 1
        folder = Path(f"{name}-{number}")
    return folder


def start_folder(folder, dials, fresh):
    """Make the folder, with the dials in config.json; a fresh one must not hold any."""
    team().first(lambda: make_folder(folder, dials, fresh))


def make_folder(folder, dials, fresh):
    """In one process."""
    try:
        (folder / "checkpoint").mkdir(parents=True, exist_ok=True)
        if fresh:
            (folder / "config.json").touch(exist_ok=False)  # two runs may start together
        write_json(folder / "config.json", dials)
    except OSError as error:
        raise UsageError(f"--out {folder}: {error.strerror}") from None


class Journal:
    """metrics.jsonl, evals.jsonl and trees.jsonl, which a resumed run cuts back to its last
    checkpoint."""

    def __init__(self, folder, lengths):
        """`lengths`: bytes of each that the checkpoint knows; none in a fresh run."""
        self.streams, self.is_new = {}, not lengths.get("evals")  # nothing evaluated yet
        team().first(lambda: self.open(folder, lengths))

    def open(self, folder, lengths):
        """In the first process, which writes them."""
        for name in ("metrics", "evals", "trees"):
            stream, length = open(folder / f"{name}.jsonl", "ab"), lengths.get(name, 0)
            if name == "trees" and stream.tell() < length:
                length = 0  # the run can do without them
            if stream.tell() < length:
                raise UsageError(f"{stream.name}: shorter than the checkpoint says, changed by "
                                 "hand; bring it back, or start again in another folder")
            stream.truncate(length)
            stream.seek(length)
            self.streams[name] = stream
            if name != "trees":
                check_lines(Path(stream.name))

    def write(self, name, row):
        """A number that is not finite becomes null: JSON knows no NaN."""
        known = {}
        for key, value in row.items():
            strange = isinstance(value, float) and not math.isfinite(value)
            known[key] = None if strange else value
        if name in self.streams:
            self.streams[name].write(json.dumps(known).encode() + b"\n")
            self.streams[name].flush()

    def sync(self):
        """Bring all to the disk, before a checkpoint relies on it; -> lengths in bytes."""
        for stream in self.streams.values():
            os.fsync(stream.fileno())
        return {name: stream.tell() for name, stream in self.streams.items()}


def check_lines(file):
    """UsageError where a line is not whole: after the next steps no report could be written."""
    try:
        read_lines(file)
    except ValueError:
        raise UsageError(f"{file}: a line is damaged, changed by hand; bring it back, or start "
                         "again in another folder") from None


def checkpoint_file(folder, step):
    return Path(folder, "checkpoint", f"step-{step:06d}.pt")


def checkpoint_files(folder):
    """All checkpoints of a run, oldest first."""
    return sorted(Path(folder, "checkpoint").glob("step-*.pt"))


def save_run(folder, step, known, journal, parts):
    """Bring a run to the disk: adapter/, curve.png, report.html, and checkpoint/step-000010.pt
    with the state_dict of all `parts` by name and what is `known` of the run (`known_of`). The
    checkpoint before it is kept. All processes hold the same: the first one writes it."""
    if team().rank:
        return
    save_adapter(parts["policy"].model, folder, model_card(folder, known))
    draw_curve(folder)
    write_report(folder, known["command"])
    content = known | {"lengths": journal.sync()}
    for name, part in parts.items():
        content[name] = part.state_dict()
    torch.save(content, buffer := io.BytesIO())  # into a file it would hide that a disk is full
    with write_aside(checkpoint_file(folder, step)) as stream:
        stream.write(buffer.getbuffer())
    for old in checkpoint_files(folder)[:-2]:
        old.unlink()


def load_checkpoint(folder):
    """Content of the newest checkpoint. UsageError when there is none, or it is damaged, or its
    dials are not those of config.json."""
    files = checkpoint_files(folder)
    if not files:
        raise UsageError(f"{folder}: no checkpoint there, nothing to go on with; start again in "
                         "another folder")
    then = "there is none before it, so start again in another folder"
    if len(files) > 1:
        then = f"delete it to go on from {files[-2].name}"
    try:
        with ZipFile(files[-1]) as archive:  # torch takes changed bytes for weights
            if archive.testzip():
                raise ValueError
        saved = torch.load(files[-1], weights_only=True, map_location="cpu")
        if not PARTS <= set(saved):
            raise ValueError
    except Exception:  # zip, pickle and torch each have many of their own
        raise UsageError(f"{files[-1]}: damaged, or no checkpoint of ours; {then}") from None
    config = json.loads(Path(folder, "config.json").read_text())
    for name, value in saved["config"].items():
        if config.get(name) != value:
            raise UsageError(f"{folder}: config.json says {name} {config.get(name)}, and "
                             f"{files[-1].name} {value}. If config.json was edited, put {value} "
                             f"back; if the checkpoint is another run's, {then}")
    return saved


def known_of(config, policy, data):
    """What a checkpoint tells of a run besides its state: its own dials, what it reads, and a
    command that makes it."""
    return {"config": own_dials(config), "inputs": inputs_of(policy, data),
            "command": command_of(config)}


def inputs_of(policy, data):
    """{what a run reads: fingerprint of its content}."""
    return {"model": policy.fingerprint, **data.fingerprints()}


def check_inputs(folder, saved, inputs):
    """UsageError where the content of what a run reads, {what: fingerprint}, is not what it
    began with. `saved`: its checkpoint, None in a fresh run."""
    known = saved["inputs"] if saved else inputs
    for name, value in inputs.items():
        if known[name] != value:
            raise UsageError(f"--resume {folder}: {name}: not what the run began with; bring it "
                             "back, or start a new run")


def model_card(folder, known):
    """Text of adapter/README.md: what was trained, by which command, and how it scores."""
    evals = read_lines(folder / "evals.jsonl")
    scores = describe_scores(evals[-1]) if evals else "Nothing was evaluated yet."
    return f"""\
---
library_name: peft
---
# LoRA weights for {without_path(known["config"]["model"])}

Trained by trace-mini (TRACE, arXiv 2606.11119) with

    {known["command"]}

{scores}
"""


def save_adapter(model, folder, card=""):
    """Write adapter/ in peft's format, with a card of our own: PeftModel.from_pretrained(base,
    folder) loads it. Written aside: it never holds half a file. (Left to find out whether
    embeddings are to be saved, peft would ask the hub.)"""
    aside, folder = folder / "adapter.part", folder / "adapter"
    shutil.rmtree(aside, ignore_errors=True)  # what a kill may have left
    try:
        model.save_pretrained(aside, save_embedding_layers=False)
    except SafetensorError as error:  # a full disk
        raise OSError(first_line(error)) from None
    (aside / "README.md").write_bytes(card.encode(errors="replace"))
    folder.mkdir(exist_ok=True)
    for file in aside.iterdir():
        file.replace(folder / file.name)
    aside.rmdir()


class LapTimer:
    """Seconds by name: `lap("sample")` adds what has passed since the last call."""

    def __init__(self):
        self.seconds, self.last = Counter(), time.perf_counter()
        self.together = team().seconds

    def __call__(self, name):
        now = time.perf_counter()
        self.seconds[name] += now - self.last
        self.last = now

    def metrics(self):
        seconds = self.seconds | {"together": team().seconds - self.together}
        return {f"time_{name}_s": round(value, 3) for name, value in seconds.items()}


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
