"""The README: what it names exists, its commands are commands, and it stays short."""
import json
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
import yaml
from test_instruct import make_model

from allocator import Anchors, equal_groups
from engine.runs import parse_config
from lab.tables import read_rows
from policy import load_policy
from trace_mini import HERE, Config, main
from world.toy import make_questions, make_world

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


@pytest.mark.parametrize("command", [
    c if c.startswith("trace_mini.py") and "--help" not in c and "--resume" not in c else
    pytest.param(c, marks=pytest.mark.long) for c in COMMANDS])  # those start a process each
def test_every_command_parses(command):
    script, *flags = shlex.split(re.sub(r" S\b", " 1", command).replace(" mine", " trace"))
    if script == "trace_mini.py" and "--help" not in flags and "--resume" not in flags:
        parse_config(Config, "", flags)  # exits or raises where a flag or value is wrong
    elif any(flag.startswith("--") for flag in flags):
        known = re.findall(r"--[\w-]+", usage(script))
        assert all(flag in known for flag in flags if flag.startswith("--"))
    assert (HERE / script).exists()


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """What the commands name, small: models, a file of questions, folders of runs."""
    folder = tmp_path_factory.mktemp("readme")
    world = make_world(100, 3)
    pages = [[title, list(world.wiki.sentences(title))] for title in world.wiki.titles]
    (folder / "hotpot.json").write_text(json.dumps([
        {"_id": q.id, "question": q.text, "answer": q.answers[0], "type": q.kind,
         "supporting_facts": [], "context": pages} for q in make_questions(world, 20)]))
    qwen, data = make_model(folder / "qwen", "qwen"), str(folder / "hotpot.json")
    assert main(["--out", str(folder / "run"), *SMALL, "--steps", "1"]) == 0
    return {"Qwen/Qwen2.5-1.5B-Instruct": qwen, "path/to/any-causal-lm": qwen, "M": qwen,
            "hotpot.json": data, "F": data, "SCORES": str(folder / "scores"), "S": "1",
            "DIR": str(folder / "run"), "runs/trace-toy-s0": str(folder / "run"), "mine": "pcl",
            "60": "2"}


SMALL = ("--budget 300 --eval-questions 4 --articles 100 --pool-size 4 --max-turns 2 "
         "--turn-tokens 8 --steps 1").split()


@pytest.mark.long
@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("trace_mini.py")])
def test_every_command_of_the_loop_runs(command, places, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [places.get(word, word) for word in shlex.split(command)[1:]]
    if "--help" in flags:
        assert "[40]" in usage("trace_mini.py")
    else:
        assert main(flags + SMALL * ("--resume" not in flags and "--eval-only" not in flags)) == 0


@pytest.mark.long
def test_every_command_of_the_wiki_runs(tmp_path):
    """--build-tiny with two steps per stage, on a copy."""
    for file in HERE.glob("*.py"):
        shutil.copy(file, tmp_path)
    short = ("import sys, warm_start as w; fit = w.fit; w.report = lambda *a, **k: None; "
             "w.fit = lambda model, data, steps, *a, **k: fit(model, data, 2, *a, **k); "
             "import toy_wiki; sys.argv[1:] = ['--build-tiny']; toy_wiki.main()")
    for command, word in ((["-m", "world.toy"], "Question ("), (["-c", short], "flawed: step"),
                          (["-m", "world.toy", "--oracle", "200"], "200 of 200 solved")):
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, check=True,
                              capture_output=True, text=True)
        assert word in done.stdout
    assert load_policy(Config(model=str(tmp_path / "tiny"))).num_words <= 1024


def test_the_figure_is_drawn_by_its_command(tmp_path):
    for file in HERE.glob("*.py"):
        shutil.copy(file, tmp_path)
    (tmp_path / "results").mkdir()
    done = subprocess.run([sys.executable, "-m", "world.example"], cwd=tmp_path, check=True,
                          capture_output=True, text=True)
    assert "◆ Search[The Silent Bridge]" in done.stdout
    assert (tmp_path / "results" / "tree.png").read_bytes().startswith(b"\x89PNG")


def measured():
    """Lines of the table of speed and memory, from results/bench.json."""
    for row in json.loads((HERE / "results" / "bench.json").read_text()):
        other, ratio = "–", "–"
        if row["other"] is not None:
            low, high = row["spread"]
            other = f"{row['other']:.3g} {row['unit']}"
            ratio = f"{row['ratio']:.3g} ({low:.3g} to {high:.3g})"
        yield f"| {row['name']} | {row['ours']:.3g} {row['unit']} | {other} | {ratio} |"


def predicted():
    """Lines of the table of predictors, from the last step in results/predictor.csv."""
    rows = read_rows(HERE / "results" / "predictor.csv")
    last = [row for row in rows if row["step"] == rows[-1]["step"]]
    for name in dict.fromkeys(row["predictor"] for row in last):
        cells = [name]
        for group in ("roots", "prefixes"):
            row = next(row for row in last if (row["group"], row["predictor"]) == (group, name))
            cells += [f"{row[x]:.2f}" for x in ("brier", "auroc", "bias", "closed")]
        yield f"| {' | '.join(cells)} |"


def credited():
    """Lines of the table of advantages, from results/gradients.csv."""
    for row in read_rows(HERE / "results" / "gradients.csv"):
        cells = [f"{row[x]:.3f} ± {row[x + '_error']:.3f}"
                 for x in ("snr", "cosine_1", "cosine_10")]
        yield f"| {row['arm']} | {row['advantage']} | {' | '.join(cells)} |"


@pytest.mark.parametrize("lines", [measured, predicted, credited])
def test_every_measured_number_is_that_of_its_file(lines):
    found = "\n".join(lines())
    assert found and found in TEXT


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


def test_the_rule_of_ones_own_is_one():
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL) if "_RULES" in b]
    exec(block, names := {"ROOT_RULES": {}, "equal_groups": equal_groups})
    pool = Anchors(np.array([0.5, 0.1, 0.5]), successes=np.array([0.0, 0.0, 3.0]))
    assert names["ROOT_RULES"]["mine"](pool, 8, None).tolist() == [4, 4, 0]


def test_citation_names_the_paper():
    citation = yaml.safe_load((HERE / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "license"} <= set(citation)
    assert "2606.11119" in str(citation["references"])
