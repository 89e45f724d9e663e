"""References in texts of experiment files: `${stages.NAME}`, `${models.NAME}`, `${data.NAME}`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from openrlhf_bd.cli.options import nearest
from openrlhf_bd.cli.yaml_files import Given
from openrlhf_bd.errors import ConfigError

KINDS = ("stages", "models", "data")
_REFERENCE = re.compile(r"\$\{([^{}]*)\}")


@dataclass(frozen=True, slots=True)
class Reference:
    """What `${kind.name}` names."""

    kind: str
    name: str

    def __str__(self) -> str:
        return f"${{{self.kind}.{self.name}}}"


def parse_references(text: str, where: str) -> list[Reference]:
    """The references in a text, in order.

    Args:
        text: any text.
        where: `file:line` of it, for messages.

    Raises:
        ConfigError: one has not the form of a reference.
    """
    if text.count("${") != len(_REFERENCE.findall(text)):
        raise ConfigError(f"{where}: {text!r} has a '${{' that does not close; expected ${{stages.NAME}}")
    found = []
    for inside in _REFERENCE.findall(text):
        kind, _, name = inside.partition(".")
        if kind not in KINDS or not name:
            guess = nearest(kind, KINDS)
            hint = f"; did you mean ${{{guess}.{name or 'NAME'}}}?" if guess else ""
            raise ConfigError(
                f"{where}: ${{{inside}}} is no reference; expected ${{stages.NAME}}, ${{models.NAME}} or "
                f"${{data.NAME}}{hint}"
            )
        found.append(Reference(kind, name))
    return found


def substitute(text: str, value_of: Callable[[Reference], str]) -> str:
    """A text with the values of its references, which `parse_references` has seen."""

    def value(match: re.Match[str]) -> str:
        kind, _, name = match.group(1).partition(".")
        return value_of(Reference(kind, name))

    return _REFERENCE.sub(value, text)


def references_of(given: Mapping[str, Given]) -> Iterator[tuple[str, Reference, str]]:
    """Option, reference and `file:line` of every reference in options."""
    for name, item in given.items():
        for text in _texts(item.value):
            for reference in parse_references(text, item.where):
                yield name, reference, item.where


def substitute_options(given: Mapping[str, Given], value_of: Callable[[Reference], str]) -> dict[str, Given]:
    """Options with the values of their references."""
    return {name: _substituted(item, value_of) for name, item in given.items()}


def _texts(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str)]


def _substituted(item: Given, value_of: Callable[[Reference], str]) -> Given:
    def replaced(value: Any) -> Any:
        return substitute(value, value_of) if isinstance(value, str) else value

    value = [replaced(part) for part in item.value] if isinstance(item.value, list) else replaced(item.value)
    return replace(item, value=value, text=replaced(item.text))
