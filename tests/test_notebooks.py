"""The notebooks as they are committed, and (long) executed in their small setting."""
import json
import re

import nbformat
import pytest
from nbclient import NotebookClient

from trace_mini import HERE

FILES = sorted((HERE / "notebooks").glob("*.ipynb"))
LESSONS = [file for file in FILES if file.stem != "solutions"]
MACHINE = re.compile(r"(?<![\w.])/(?:home|root|tmp|work|usr|opt|mnt|Users)/|[A-Z]:\\\\")
EXERCISE = re.compile(r"# (\d\d, exercise \d)\n(.*?)\n\n\n(.*)", re.DOTALL)  # name, stub, check


def cells(file, kind="code"):
    return [cell for cell in nbformat.read(file, as_version=4).cells if cell.cell_type == kind]


def printed(cell):
    return "".join(output.get("text", "") for output in cell.outputs)


def pictures(file):
    return sum("image/png" in output.get("data", {}) for cell in cells(file)
               for output in cell.outputs)


def exercises(file):
    """{name: (stub, check, what was printed)}"""
    found = [(EXERCISE.match(cell.source), printed(cell)) for cell in cells(file)]
    return {match[1]: (match[2], match[3], text) for match, text in found if match}


def test_there_are_six_and_the_solutions():
    assert [file.stem[:2] for file in FILES] == ["01", "02", "03", "04", "05", "06", "so"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_shape(file):
    prose, code = cells(file, "markdown"), cells(file)
    assert file.stat().st_size < 400_000
    assert "?" in prose[0].source and "Run time:" in prose[0].source
    assert prose[-1].source.startswith("**Answer.**")
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        lines = cell.source.split("\n")
        assert len(lines) <= 15 and max(map(len, lines)) < 80, cell.source
        for output in cell.outputs:
            assert output.output_type != "error" and output.get("name") != "stderr", output
    for cell in prose + code:  # also what was printed, but for the pictures
        text = json.dumps([cell.source, [
            output.get("text", output.get("data", {}).get("text/plain"))
            for output in cell.get("outputs", ())]])
        assert not MACHINE.search(text), text


@pytest.mark.parametrize("file", LESSONS, ids=lambda file: file.stem)
def test_a_lesson(file):
    """A roadmap and a figure; one to three exercises, unsolved; prose without measured digits."""
    assert "draw_cycle(" in cells(file)[0].source and pictures(file) >= 2
    assert 1 <= len(exercises(file)) <= 3
    assert all(text == "not solved yet\n" for _, _, text in exercises(file).values())
    for cell in cells(file, "markdown"):
        assert not re.search(r"\d\.\d", cell.source), "another CPU would change it"


def test_every_exercise_is_solved_with_the_same_check():
    want = {name: (stub.split("return None")[0], check) for file in LESSONS
            for name, (stub, check, _) in exercises(file).items()}
    solved = exercises(HERE / "notebooks" / "solutions.ipynb")
    assert list(solved) == list(want)
    for name, (solution, check, text) in solved.items():
        stub, own_check = want[name]
        assert solution.startswith(stub.rstrip()) and check == own_check and text == "solved\n"


@pytest.mark.long
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_executed(file, monkeypatch):
    monkeypatch.setenv("TRACE_MINI_SMALL", "1")
    notebook = nbformat.read(file, as_version=4)
    NotebookClient(notebook, timeout=1800, kernel_name="python3",
                   resources={"metadata": {"path": file.parent}}).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code" and EXERCISE.match(cell.source):
            assert printed(cell) == ("solved\n" if file.stem == "solutions" else "not solved yet\n")
