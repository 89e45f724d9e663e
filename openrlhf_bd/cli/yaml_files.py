"""YAML files of options: nested or dotted keys, `extends: other.yaml`, and the line that each value came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from openrlhf_bd.cli.options import Option, all_options, all_sections, nearest
from openrlhf_bd.errors import ConfigError
from openrlhf_bd.paths import nearest_path_hint

EXTENDS = "extends"


@dataclass(frozen=True)
class Given:
    """A value that somebody gave, before its type is checked.

    Attributes:
        value: as YAML or the shell delivered it.
        text: its text as written, where it is a single word or number; None for lists.
        where: `file:line`, or "command line".
    """

    value: Any
    text: str | None
    where: str


def read_config_file(path: str | Path, *, seen: tuple[Path, ...] = ()) -> dict[str, Given]:
    """Options of a YAML file over those of the files that it extends, by dotted name.

    Args:
        path: the file.
        seen: files that led here, to refuse circles.

    Raises:
        ConfigError: the file is missing or no YAML mapping, a key is unknown or given twice, or files extend each other
            in a circle.
    """
    path = Path(path)
    if path.resolve() in seen:
        raise ConfigError(f"{path}: extends itself through {seen[-1]}; take one `{EXTENDS}` out")
    root = parse_yaml(path)
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(
            f"{place_of(path, root)}: found {_show(root)}, expected options such as `train: {{batch_size: 8}}`"
        )
    base: dict[str, Given] = {}
    for name, node in _leaves(path, root, ""):
        if name == EXTENDS:
            for other in _extended_files(path, node):
                base |= read_config_file(other, seen=(*seen, path.resolve()))
    return base | given_options(path, root)


def given_options(path: Path, mapping: yaml.MappingNode) -> dict[str, Given]:
    """The options that a mapping itself gives, by dotted name.

    Raises:
        ConfigError: a key is unknown or given twice.
    """
    given: dict[str, Given] = {}
    for name, node in _leaves(path, mapping, ""):
        if name == EXTENDS:
            continue
        if name in given:
            raise ConfigError(f"{place_of(path, node)}: {name} is given twice, first at {given[name].where}; keep one")
        given[name] = Given(construct(path, node), _text(node), place_of(path, node))
    return given


def given_section(path: Path, mapping: yaml.MappingNode, options: Mapping[str, Option]) -> dict[str, Given]:
    """The options of one section that a mapping gives, by their names in it.

    Raises:
        ConfigError: a key is unknown.
    """
    for key, _ in mapping.value:
        if str(key.value) not in options:
            known = nearest(str(key.value), options)
            hint = f"; did you mean {known}?" if known else f"; expected one of {', '.join(options)}"
            raise ConfigError(f"{place_of(path, key)}: {key.value} is not an option here{hint}")
    return {
        str(key.value): Given(construct(path, node), _text(node), place_of(path, node)) for key, node in mapping.value
    }


def parse_yaml(path: Path, *, asked_by: str = "--config") -> yaml.Node | None:
    """The nodes of a YAML file, with their lines; None: the file is empty.

    Args:
        path: the file.
        asked_by: what named the file, for messages.

    Raises:
        ConfigError: the file is missing or not YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file{nearest_path_hint(path)} ({asked_by})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML text: {error} ({asked_by})") from None
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: is not valid YAML: {error.problem}; correct the line") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not valid YAML: {error}") from None


def _leaves(path: Path, mapping: yaml.MappingNode, prefix: str) -> Iterator[tuple[str, yaml.Node]]:
    """Dotted name and node of every option below a mapping, or of `extends`."""
    for key_node, node in mapping.value:
        name = prefix + str(key_node.value)
        if name in all_options() or name == EXTENDS:
            yield name, node
        elif name in all_sections():
            if isinstance(node, yaml.MappingNode):
                yield from _leaves(path, node, f"{name}.")
            elif _text(node) or not isinstance(node, yaml.ScalarNode):
                keys = ", ".join(all_sections()[name].model_fields)
                raise ConfigError(f"{place_of(path, node)}: {name} is {_show(node)}; expected options below it: {keys}")
        else:
            known = nearest(name, [*all_options(), *all_sections()])
            hint = f"; did you mean {known}?" if known else "; --help lists all options"
            raise ConfigError(f"{place_of(path, key_node)}: {name} is not an option{hint}")


def _extended_files(path: Path, node: yaml.Node) -> list[Path]:
    value = construct(path, node)
    names = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"{place_of(path, node)}: {EXTENDS} is {value!r}; expected a file name or a list of them")
    return [path.parent / name for name in names]


def construct(path: Path, node: yaml.Node) -> Any:
    """The plain value of a node.

    Raises:
        ConfigError: it has none, such as an unknown tag.
    """
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError) as error:
        reason = error.problem if isinstance(error, yaml.MarkedYAMLError) else error
        raise ConfigError(f"{place_of(path, node)}: {reason}; expected a plain value") from None
    finally:
        loader.dispose()


def _text(node: yaml.Node) -> str | None:
    return str(node.value) if isinstance(node, yaml.ScalarNode) else None


def _show(node: yaml.Node) -> str:
    text = _text(node)
    return repr(text) if text is not None else "a list"


def place_of(path: Path, node: yaml.Node) -> str:
    """`file:line` of a node."""
    return f"{path}:{node.start_mark.line + 1}"
