"""The shape of the code, counted: what keeps the method readable within the hour."""
import ast
import dataclasses
from graphlib import TopologicalSorter

import pytest

from trace_mini import HERE, Config

SOURCES = {file.stem: file.read_text() for file in HERE.glob("*.py")}
ROOT = sorted(SOURCES)
for file in HERE.glob("[elw]*/*.py"):  # engine, lab, world
    SOURCES[f"{file.parent.name}.{file.stem}"] = file.read_text()
COMPREHENSIONS = ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp


def imports(source):
    """Our modules that a module imports, within functions too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            start = getattr(node, "module", "")
            for alias in node.names:
                names |= {alias.name, start, f"{start}.{alias.name}"}
    return names & set(SOURCES)


@pytest.mark.parametrize("module", ROOT)
def test_a_root_module_is_short_and_plain(module):
    num_lines, tree = SOURCES[module].count("\n"), ast.parse(SOURCES[module])
    assert num_lines <= 330
    assert sum(isinstance(node, COMPREHENSIONS) for node in ast.walk(tree)) <= num_lines / 20


def test_imports_go_one_way():
    """Measuring depends on the method, never the other way round; and the engine knows of the
    method only what a turn is, and the text around it."""
    used = {module: imports(source) for module, source in SOURCES.items()}
    list(TopologicalSorter(used).static_order())  # CycleError where there is a ring
    for module, names in used.items():
        rooms = {name.split(".")[0] for name in names}
        assert "lab" not in rooms or module.startswith("lab."), module
        if module.startswith("engine."):
            assert rooms <= {"engine", "tree", "react_env"}, module
        assert "world.warm_start" not in names, module


def test_dials_are_few():
    assert len(dataclasses.fields(Config)) <= 30
