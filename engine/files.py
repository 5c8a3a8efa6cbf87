"""Files: written aside and renamed, so that nobody reads half of one, and known by content."""
import io
import json
import os
from contextlib import contextmanager
from hashlib import blake2b, file_digest
from itertools import chain
from pathlib import Path

from engine.processes import team

EMBEDDED = Path(__file__).resolve().parents[1] / "world"  # holds the policies in the box


@contextmanager
def write_aside(file):
    """-> a binary stream. At its end the file stands whole under its name; after an error the
    old one is still there."""
    aside = Path(f"{file}.part")
    if team().rank:  # the first process writes
        yield io.BytesIO()
        return
    with open(aside, "wb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(file)


def write_json(file, content):
    with write_aside(file) as stream:
        stream.write(json.dumps(content, indent=1).encode())


def read_lines(file):
    """The rows of a JSON-lines file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def fingerprint(content):
    """A short hash of plain data."""
    return blake2b(repr(content).encode(), digest_size=8).hexdigest()


def fingerprint_of_files(where, *patterns):
    """Of one file, or of all in a folder with such names: a second per gigabyte. A name that is
    neither, as that of a hub's model, holds no files."""
    files, digests = [where], []
    if not os.path.isfile(where):
        files = chain(*[sorted(Path(where).glob(pattern)) for pattern in patterns])
    for file in files:
        with open(file, "rb") as stream:
            digests.append(file_digest(stream, "blake2b").hexdigest())
    return fingerprint(digests)


def model_folder(name):
    """tiny, tiny2: in the box, wherever we are started; else the name as it is."""
    embedded = EMBEDDED / name
    return str(embedded) if name.isalnum() and embedded.is_dir() else name
