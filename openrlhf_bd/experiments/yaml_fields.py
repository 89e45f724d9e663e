"""YAML files that a pydantic model describes: errors name the file's line, and what was probably meant."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from openrlhf_bd.cli.options import nearest
from openrlhf_bd.cli.yaml_files import construct, parse_yaml, place_of
from openrlhf_bd.errors import ConfigError

# In the place of pydantic's words, by the type of its error.
_EXPECTED = {
    "dict_type": "a mapping",
    "list_type": "a list",
    "model_type": "a mapping",
    "string_pattern_mismatch": "letters, digits, '.', '_' and '-', with a letter or digit first",
    "string_type": "text",
}
_SCALARS = (str, int, float, bool, type(None))
Fields = TypeVar("Fields", bound=BaseModel)


def read_fields(path: Path, model: type[Fields], *, asked_by: str) -> tuple[Fields, yaml.MappingNode]:
    """A YAML file as a model, with its nodes.

    Args:
        path: the file.
        model: what it must be.
        asked_by: what named the file, for messages.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown or given twice, or a value is of the wrong type.
    """
    root = parse_yaml(path, asked_by=asked_by)
    if not isinstance(root, yaml.MappingNode):
        keys = ", ".join(model.model_fields)
        raise ConfigError(f"{path}:1: expected a mapping with the keys {keys}")
    _refuse_twins(path, root)
    try:
        return model.model_validate(construct(path, root)), root
    except ValidationError as error:
        raise ConfigError(_message(path, root, model, error)) from None


def child(node: yaml.Node, *keys: str) -> yaml.Node:
    """The node below a mapping's keys; where one is missing the last that is there."""
    for key in keys:
        if not isinstance(node, yaml.MappingNode):
            return node
        found = [value for name, value in node.value if str(name.value) == key]
        if not found:
            return node
        node = found[0]
    return node


def _refuse_twins(path: Path, node: yaml.Node) -> None:
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_twins(path, item)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, yaml.Node] = {}
    for key, value in node.value:
        if str(key.value) in seen:
            first = place_of(path, seen[str(key.value)])
            raise ConfigError(f"{place_of(path, key)}: {key.value} is given twice, first at {first}; keep one")
        seen[str(key.value)] = key
        _refuse_twins(path, value)


def _message(path: Path, root: yaml.MappingNode, model: type[BaseModel], error: ValidationError) -> str:
    first = error.errors()[0]
    location = [str(part) for part in first["loc"] if part != "[key]"]
    if first["type"] == "extra_forbidden":
        *above, key = location
        fields = _fields(model, above)
        guess = nearest(key, fields)
        hint = f"; did you mean {guess}?" if guess else f"; expected one of {', '.join(fields)}"
        return f"{place_of(path, _key_node(root, location))}: {key} is not a key of {_named(above)}{hint}"
    return f"{place_of(path, _key_node(root, location))}: {_named(location)}: {_reason(first)}"


def _reason(error: ErrorDetails) -> str:
    """What is wrong with a value, in the words of our other messages."""
    if error["type"] == "value_error":
        return str(error["msg"]).removeprefix("Value error, ")
    expected = _EXPECTED.get(error["type"]) or str(error["msg"]).removeprefix("Input should be ")
    found = error["input"]
    return f"found {found!r}, expected {expected}" if isinstance(found, _SCALARS) else f"expected {expected}"


def _named(location: Sequence[str]) -> str:
    return ".".join(location) or "the file"


def _key_node(node: yaml.Node, location: Sequence[str]) -> yaml.Node:
    """The key that a location leads to: its line is where a person looks."""
    found = node
    for part in location:
        if not isinstance(node, yaml.MappingNode):
            break
        pairs = [(key, value) for key, value in node.value if str(key.value) == part]
        if not pairs:
            break
        found, node = pairs[0]
    return found


def _fields(model: type[BaseModel], location: Sequence[str]) -> list[str]:
    """Keys that the model has at a location: of `dict[str, Inner]` those of Inner, below any key."""
    for name in location:
        annotation = model.model_fields[name].annotation if name in model.model_fields else None
        for inner in (annotation, *get_args(annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                model = inner
    return list(model.model_fields)
