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
ADDRESS = re.compile(r"https://github\.com/[\w-]+/trace-mini")  # its owner: who publishes a copy
every_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def cells(file, kind="code"):
    return [cell for cell in nbformat.read(file, as_version=4).cells if cell.cell_type == kind]


def exercises(cells):
    """{name: (stub, check, what was printed)}"""
    found = {}
    for cell in cells:
        if match := EXERCISE.match(cell.source):
            found[match[1]] = match[2], match[3], cell.outputs[0].text
    return found


@every_file
def test_shape(file):
    """Short cells, run in order without a warning, that tell nothing about a machine."""
    prose, code = cells(file, "markdown"), cells(file)
    assert file.stat().st_size < 400_000
    assert "?" in prose[0].source and "Run time:" in prose[0].source
    assert prose[-1].source.startswith("**Answer.**")
    assert code[0].source == cells(FILES[0])[0].source and ADDRESS.search(code[0].source)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        lines = cell.source.split("\n")
        assert len(lines) <= 15 and max(map(len, lines)) < 80, cell.source
        for output in cell.outputs:
            output.get("data", {}).pop("image/png", None)
            assert output.output_type != "error" and output.get("name") != "stderr", output
    assert not MACHINE.search(json.dumps(prose + code))


@pytest.mark.parametrize("file", LESSONS, ids=lambda file: file.stem)
def test_a_lesson(file):
    """A roadmap and a figure; one to three exercises, unsolved, but for the tour; prose without
    measured digits, which another CPU would change."""
    assert "draw_cycle(" in cells(file)[1].source
    assert file.read_text().count('"image/png"') >= 2
    unsolved = exercises(cells(file)).values()
    assert len(unsolved) in ([0] if file == FILES[0] else [1, 2, 3])
    assert all(text == "not solved yet\n" for *_, text in unsolved)
    for cell in cells(file, "markdown"):
        assert not re.search(r"\d\.\d", cell.source), cell.source


def test_every_exercise_is_solved_with_the_same_check():
    solved, stubs = exercises(cells(HERE / "notebooks" / "solutions.ipynb")), {}
    for file in LESSONS:
        stubs |= exercises(cells(file))
    assert len(LESSONS) == 7 and list(solved) == list(stubs)
    for name, (solution, check, text) in solved.items():
        assert solution.startswith(stubs[name][0].split("return None")[0].rstrip())
        assert (check, text) == (stubs[name][1], "solved\n")


@pytest.mark.long
@every_file
def test_executed(file, monkeypatch, tmp_path):
    """Lessons in a folder of their own, as on Colab: they fetch the last commit. Solutions where
    they are."""
    monkeypatch.setenv("TRACE_MINI_SMALL", "1")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    notebook, folder = nbformat.read(file, as_version=4), file.parent
    if file in LESSONS and (HERE / ".git").exists():
        folder = tmp_path
        [finds, *_] = [cell for cell in notebook.cells if cell.cell_type == "code"]
        finds.source, num = ADDRESS.subn(HERE.as_uri(), finds.source)
        assert num == 1
    NotebookClient(notebook, timeout=1800, kernel_name="python3",
                   resources={"metadata": {"path": folder}}).execute()
    printed = {text for *_, text in exercises(notebook.cells).values()}
    wanted = {"solved\n" if file.stem == "solutions" else "not solved yet\n"}
    assert printed == (set() if file == FILES[0] else wanted)
