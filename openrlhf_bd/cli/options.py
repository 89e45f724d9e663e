"""The option tree read off the pydantic models: every leaf with its dotted name, its type in words and its default."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, Predicate
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from openrlhf_bd.config import Config

SECRETS = frozenset({"logger.wandb.key"})


@dataclass(frozen=True)
class Option:
    """One leaf of the configuration: `--<name>` and the YAML key `<name>`.

    Attributes:
        name: dotted name.
        section: model that holds the field.
        field: pydantic's description of it.
        default: value where nobody gives one, under preset `robust`.
    """

    name: str
    section: type[BaseModel]
    field: FieldInfo
    default: Any

    @property
    def key(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def types(self) -> tuple[Any, ...]:
        """Members of the annotated union, `None` as `NoneType`."""
        return _union_members(self.field.annotation)

    @property
    def optional(self) -> bool:
        return type(None) in self.types

    @property
    def is_flag(self) -> bool:
        return self.types == (bool,)

    @property
    def is_list(self) -> bool:
        return any(get_origin(member) in (list, tuple) for member in self.types)

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that the option takes, if it takes only certain ones."""
        literals = [member for member in self.types if get_origin(member) is Literal]
        return tuple(word for literal in literals for word in get_args(literal))

    @property
    def metavar(self) -> str:
        """One word for help: what kind of value follows the flag."""
        words = {bool: "BOOL", int: "INT", float: "NUMBER", str: "TEXT"}
        inner = [arg for member in self.types for arg in get_args(member) or (member,)]
        return next(words[kind] for kind in inner if kind in words)

    def check(self, value: Any) -> Any:
        """The value as the option's type.

        Raises:
            ValueError: it is none; the message is in plain words.
        """
        if isinstance(value, bool) and bool not in self.types:
            raise ValueError(describe_type(self))
        try:
            return getattr(self.section.model_validate({self.key: value}), self.key)
        except ValidationError:
            raise ValueError(describe_type(self)) from None


def _union_members(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) in (Union, types.UnionType):
        return get_args(annotation)
    return (annotation,)


@cache
def all_options() -> dict[str, Option]:
    """Every option by dotted name, in the order of the models."""
    return section_options(Config)


def section_options(section: type[BaseModel]) -> dict[str, Option]:
    """Every option of one section by its dotted name in it."""
    return {option.name: option for option in _walk(section, "")}


@cache
def all_sections() -> dict[str, type[BaseModel]]:
    """Every section by dotted name; the whole configuration is ""."""
    found: dict[str, type[BaseModel]] = {"": Config}
    for name, option in all_options().items():
        parts = name.split(".")[:-1]
        for depth in range(1, len(parts) + 1):
            parent = found[".".join(parts[: depth - 1])]
            child = parent.model_fields[parts[depth - 1]].annotation
            assert isinstance(child, type)
            found[".".join(parts[:depth])] = child
        assert found[".".join(parts)] is option.section
    return found


def _walk(section: type[BaseModel], prefix: str) -> Iterable[Option]:
    for key, field in section.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from _walk(annotation, f"{prefix}{key}.")
        else:
            yield Option(f"{prefix}{key}", section, field, field.get_default(call_default_factory=True))


def nearest(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate that a person most likely meant, or None."""
    known = list(candidates)
    matches = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    if matches:
        # Of equally near ones the first that is declared.
        ratios = {match: difflib.SequenceMatcher(None, match, word).ratio() for match in matches}
        return min(matches, key=lambda match: (-ratios[match], known.index(match)))
    # The last part alone is often right while its section is not: --batch_size, --student.max_norm.
    last = word.rpartition(".")[2]
    by_last_part = {name.rpartition(".")[2]: name for name in reversed(known)}
    matches = difflib.get_close_matches(last, list(by_last_part), n=1, cutoff=0.75)
    return by_last_part[matches[0]] if matches else None


def describe_type(option: Option) -> str:
    """What the option takes, in words: "a whole number greater than 0, or none"."""
    words = [
        _describe(member, option.field.metadata if len(option.types) == 1 else ())
        for member in option.types
        if member is not type(None)
    ]
    return " or ".join(words) + (", or none" if option.optional else "")


def _describe(annotation: Any, metadata: Iterable[Any]) -> str:
    if get_origin(annotation) is Annotated:
        annotation, *metadata = get_args(annotation)
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(str(value) for value in get_args(annotation))
    if get_origin(annotation) is list:
        return f"a list of {_PLURALS[get_args(annotation)[0]]}"
    if get_origin(annotation) is tuple:
        members = get_args(annotation)
        return f"{len(members)} {_PLURALS[members[0]]}"
    return " ".join([_NAMES[annotation], *_describe_bounds(metadata)])


def _describe_bounds(metadata: Iterable[Any]) -> list[str]:
    bounds = []
    for item in _flatten(metadata):
        if isinstance(item, Gt):
            bounds.append(f"greater than {item.gt:g}")
        elif isinstance(item, Ge):
            bounds.append(f"of at least {item.ge:g}")
        elif isinstance(item, Lt):
            bounds.append(f"less than {item.lt:g}")
        elif isinstance(item, Le):
            bounds.append(f"of at most {item.le:g}")
        elif isinstance(item, Predicate) and item.func is bool:
            bounds.append("other than 0")
    return [" and ".join(bounds)] if bounds else []


def _flatten(metadata: Iterable[Any]) -> Iterable[Any]:
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from item.metadata
        else:
            yield item


_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_PLURALS = {int: "whole numbers", float: "numbers", str: "texts"}
