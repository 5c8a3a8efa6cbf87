"""The README: what it names exists, its commands are commands, and it stays short."""
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache

import pytest
import yaml

from runs import parse_config
from trace_mini import HERE, Config

TEXT = (HERE / "README.md").read_text()
COMMANDS = sorted(set(re.findall(r"(?:^|`|&& )python (\w+\.py(?: [^`#\n]*)?)", TEXT, re.MULTILINE)))


def test_it_is_short():
    """At most 1,200 words besides tables, code and comments."""
    text = re.sub(r"```.*?```|^\|.*?$|<!--.*?-->", "", TEXT, flags=re.DOTALL | re.MULTILINE)
    assert len(text.split()) <= 1200


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_every_file_that_it_names_is_there(name):
    text = (HERE / name).read_text()
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    names = re.findall(r"`([\w./]+\.(?:py|md|json|png|cff|ipynb))`", text)
    runs_leave = {"config.json", "metrics.jsonl", "evals.jsonl", "curve.png", "predictions.json"}
    assert links
    for file in {*links, *names} - runs_leave:
        assert (HERE / file).exists(), file


@cache
def usage(script):
    return subprocess.run([sys.executable, script, "--help"], cwd=HERE, check=True,
                          capture_output=True, text=True).stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command):
    script, *flags = shlex.split(re.sub(r" S\b", " 1", command).replace(" mine", " trace"))
    if script == "trace_mini.py" and "--help" not in flags and "--resume" not in flags:
        parse_config(Config, "", flags)  # exits or raises where a flag or value is wrong
    elif any(flag.startswith("--") for flag in flags):
        assert all(flag in usage(script) for flag in flags if flag.startswith("--"))
    assert (HERE / script).exists()


def test_the_figure_is_drawn_by_its_command(tmp_path):
    for file in HERE.glob("*.py"):
        shutil.copy(file, tmp_path)
    (tmp_path / "results").mkdir()
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, check=True,
                          capture_output=True, text=True)
    assert "◆ Search[The Silent Bridge]" in done.stdout
    assert (tmp_path / "results" / "tree.png").read_bytes().startswith(b"\x89PNG")


def test_the_choices_are_those_of_the_program():
    """The numbered list is the one that opens trace_mini.py, word for word."""
    def items(text):
        part = re.search(r"^ ?1\. .*?(?=^\"\"\"|^#)", text, re.DOTALL | re.MULTILINE)[0]
        return [" ".join(item.split()) for item in re.split(r"^ ?\d+\. ", part, flags=re.M)[1:]]
    ours = items((HERE / "trace_mini.py").read_text())
    assert len(ours) > 5 and items(TEXT) == ours


def test_every_symbol_is_in_its_file():
    table = TEXT.split("## Symbols")[1].split("\n## ")[0]
    rows = re.findall(r"^\|.*\| (.*`.*) \| (`\w+\.py`.*) \|$", table, re.MULTILINE)
    assert len(rows) > 10
    for names, files in rows:
        code = "".join((HERE / file).read_text() for file in re.findall(r"`(.*?)`", files))
        for name in re.findall(r"`(?:\w+\.)?(\w+)", names):
            assert re.search(rf"\b{name}\b", code), name


def test_every_metric_is_one_of_a_run():
    rows = TEXT.split("## Metrics")[1].split("\n## ")[0]
    code = "".join((HERE / name).read_text() for name in ("trace_mini.py", "policy.py",
                                                          "predictor.py"))
    names = re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?) \|", rows, re.MULTILINE)))
    assert len(names) > 10 and all(f'"{name}"' in code or f"{name}=" in code for name in names)


def test_citation_names_the_paper():
    citation = yaml.safe_load((HERE / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "license"} <= set(citation)
    assert "2606.11119" in str(citation["references"])
