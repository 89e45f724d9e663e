"""`docs/paper_index.md` names functions and tests that are there."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROWS = [line.split("|")[1:-1] for line in (ROOT / "docs/paper_index.md").read_text(encoding="utf-8").splitlines()]
ROWS = [cells for cells in ROWS if len(cells) == 3 and "---" not in cells[0]][1:]
FUNCTIONS = sorted({name for row in ROWS for name in re.findall(r"`((?:[a-z_]+\.)+[A-Za-z_.]+)`", row[1])})
TESTS = sorted({name for row in ROWS for name in re.findall(r"`([a-z_/]+\.py(?:::\w+)?)`", row[2])})


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_there(name: str) -> None:
    """Each dotted name is a module, a class, a function, or an attribute of a class."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(["openrlhf_bd", *parts[:length]]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return
    raise AssertionError(f"openrlhf_bd.{name} is not there")


@pytest.mark.parametrize("name", TESTS)
def test_tests_are_there(name: str) -> None:
    """Each path is a file below tests/unit or the repository, and has the test that is named."""
    path, _, test = name.partition("::")
    file = ROOT / path if path.startswith("tests/") else ROOT / "tests/unit" / path
    assert file.exists(), f"{file} is not there"
    names = {node.name for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if hasattr(node, "name")}
    assert not test or test in names
