"""Folders are the architecture: imports point one way."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "openrlhf_bd"

# A room may import its own ring and those before it.
RINGS = (
    {"errors", "config", "records", "paths", "functional", "theory"},
    {"algorithms", "data", "store", "engines", "endpoint", "upstream"},
    {"teacher", "student", "rollout", "evaluation"},
    {"driver"},
    {"cli", "demo", "experiments"},
)
RING_OF = {room: number for number, ring in enumerate(RINGS) for room in ring}

# Who may import the heavy stacks.
STACKS = {
    "openrlhf": {"upstream"},
    "deepspeed": {"upstream", "student"},
    "vllm": {"engines", "teacher"},
    "ray": {"teacher", "student", "rollout", "evaluation", "driver", "cli", "experiments"},
}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_inwards(path: Path) -> None:
    """A file imports rooms of its own ring or of an inner one, and only the stacks that its room may know."""
    room = room_of(path)
    for module in imported_modules(path):
        first, *rest = module.split(".")
        if first == "openrlhf_bd" and rest:
            assert RING_OF[rest[0]] <= RING_OF[room], f"{room} imports {module}"
        if first in STACKS:
            assert room in STACKS[first], f"{room} imports {module}"
