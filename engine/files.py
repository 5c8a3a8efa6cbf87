"""The one way to write a file: aside, then renamed. A reader never meets half a file."""
import json
import os
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def write_aside(file):
    """-> a binary stream. At its end the file stands whole under its name; after an error the
    old one is still there."""
    aside = Path(f"{file}.part")
    with open(aside, "wb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(file)


def write_json(file, content):
    with write_aside(file) as stream:
        stream.write(json.dumps(content, indent=1).encode())
