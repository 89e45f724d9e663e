"""From a command line to a configuration: defaults < preset < YAML files < flags, and errors without tracebacks.

The flags are read off the option tree of `openrlhf_bd.config`, so an option is declared once. Nothing here imports
torch: `--help` and a wrong flag answer at once.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import yaml
from pydantic import ValidationError

from openrlhf_bd.cli.options import SECRETS, Option, all_options, all_sections, describe_type, nearest, section_options
from openrlhf_bd.cli.yaml_files import Given, read_config_file
from openrlhf_bd.config import Config, Section
from openrlhf_bd.errors import BDError, ConfigError, StoreError

COMMAND_LINE = "command line"
INTERRUPTED = 75
# A file where a folder must be, or the other way round, or no rights.
_WRONG_PLACE = (FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
# What a write to a full disk gives, over a quota, or beyond the size that this process may give a file.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MEASURED_ROWS = 32

SectionType = TypeVar("SectionType", bound=Section)


@dataclass(frozen=True)
class ParsedOptions:
    """What a command line says besides the configuration.

    Attributes:
        dry_run: print the configuration and the plan, and stop.
        measure: rows to generate for the plan; None: it is made without.
        config_files: the YAML files, in the order in which they were given.
        origins: where each given option came from, `file:line` or "command line"; all others have defaults.
    """

    dry_run: bool
    measure: int | None
    config_files: tuple[str, ...]
    origins: dict[str, str]


def parse_config(argv: Sequence[str], *, prog: str, description: str) -> tuple[Config, ParsedOptions]:
    """The configuration that a command line asks for. `--help` prints and raises SystemExit(0).

    Args:
        argv: arguments, without the program's name.
        prog: the program's name, for help.
        description: one or two sentences about it, for help.

    Raises:
        ConfigError: an option or key is unknown, a value has the wrong type, or a YAML file cannot be read.
    """
    arguments = parse_arguments(_parser(prog, description), argv)
    config_files = tuple(arguments.pop("config"))
    dry_run = arguments.pop("dry_run")
    measure = _measured_rows(arguments.pop("measure"), dry_run=dry_run)
    given: dict[str, Given] = {}
    for path in config_files:
        given |= read_config_file(path)
    given |= given_flags(arguments)
    return build_config(given), ParsedOptions(
        dry_run, measure, config_files, {name: given[name].where for name in given}
    )


def _measured_rows(text: str | None, *, dry_run: bool) -> int | None:
    if text is None:
        return None
    if not dry_run:
        raise ConfigError(
            f"{COMMAND_LINE}: --measure belongs to a plan; give it to openrlhf-bd plan, or with --dry_run"
        )
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{COMMAND_LINE}: --measure is {text!r}; expected a number of rows to generate")
    return int(text)


def build_config(given: dict[str, Given]) -> Config:
    """Check every given value by itself, so that an error names its origin, then all of them together.

    Raises:
        ConfigError: a value has the wrong type, or options contradict each other.
    """
    tree: dict[str, Any] = {}
    for name, item in given.items():
        *sections, key = name.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[key] = _checked(all_options()[name], item)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"--{name}: {first['msg']}; --help describes the options") from None


def _checked(option: Option, given: Given) -> Any:
    value = given.value
    if option.optional and (given.text or "").lower() == "none":
        return None
    if str in option.types and given.text is not None and value is not None:
        value = given.text  # a number or a date, to YAML
    try:
        return option.check(value)
    except ValueError as error:
        raise ConfigError(_wrong_type(option, given, str(error))) from None


def section_from_flags(section: type[SectionType], arguments: Mapping[str, str | list[str]]) -> SectionType:
    """A section of options from the flags that `add_flag` made of them.

    Args:
        section: its type.
        arguments: what was given, by name.

    Raises:
        ConfigError: a value has the wrong type, or options contradict each other.
    """
    options = section_options(section)
    return section_from_given(
        section, {name: _from_command_line(options[name], text) for name, text in arguments.items()}
    )


def section_from_given(section: type[SectionType], given: Mapping[str, Given]) -> SectionType:
    """A section of options from values with their origins, by the options' names in it.

    Raises:
        ConfigError: a value has the wrong type, or options contradict each other.
    """
    options = section_options(section)
    values = {name: _checked(options[name], item) for name, item in given.items()}
    try:
        return section.model_validate(values)
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
        named = [f"{name}: {item.where}" for name, item in given.items() if name in message.split()]
        raise ConfigError(f"{message} ({', '.join(named)})") from None


def _wrong_type(option: Option, given: Given, expected: str) -> str:
    found = "of the wrong type" if option.name in SECRETS else repr(given.value)
    name = f"--{option.name}" if given.where == COMMAND_LINE else option.name
    guess = nearest(str(given.value), option.choices) if option.choices else None
    hint = f"; did you mean {guess}?" if guess else ""
    return (
        f"{given.where}: {name} is {found}; expected {expected}{hint} "
        f"({option.field.description}; default {show_value(option.default)})"
    )


def resolved_yaml(config: Config) -> str:
    """The whole configuration as YAML that `--config` reads back. Secrets are left out, and a comment says which."""
    values = _plain(config.model_dump())
    hidden = []
    for name in sorted(SECRETS):
        *sections, key = name.split(".")
        node = values
        for section in sections:
            node = node[section]
        if node[key] is not None:
            node[key] = None
            hidden.append(name)
    note = f"# not shown, give it again: {', '.join(hidden)}\n" if hidden else ""
    return note + yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=1000)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def show_value(value: Any) -> str:
    """A value as a person would write it on the command line."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return " ".join(show_value(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value) or "empty"


def main_guard(function: Callable[[], int]) -> int:
    """Run a command; turn the errors that we raise on purpose into one line and an exit status.

    Returns:
        The function's own status; an error's `exit_status`; 2 where a place to write to is none; 74 on a full disk; 75
        after Ctrl-C.
    """
    logging.getLogger("DeepSpeed").addFilter(_is_news)
    try:
        return function()
    except BDError as error:
        print(f"error: {_original(error)}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("interrupted; the same command continues where it stopped", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output, such as `head`, has gone. Python would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if isinstance(error, _WRONG_PLACE) and error.filename is not None:
            place = error.filename2 or error.filename
            print(
                f"error: {place}: {(error.strerror or '').lower()}; name another place, or change that one",
                file=sys.stderr,
            )
            return ConfigError.exit_status
        if error.errno not in _NO_ROOM:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror}; make room and run the same command again to continue", file=sys.stderr)
        return StoreError.exit_status


def _is_news(record: logging.LogRecord) -> bool:
    """Keeps DeepSpeed from warning, at every start on a machine without GPUs, that it has none."""
    return "Setting accelerator to CPU" not in record.getMessage()


def _original(error: BDError) -> BaseException:
    """The error itself where Ray wrapped it: its wrapper's text is a traceback of the other process."""
    if "ray" in sys.modules:
        from ray.exceptions import RayTaskError

        if isinstance(error, RayTaskError):
            return error.cause
    return error


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{COMMAND_LINE}: {message}; --help describes the options")


def command_parser(prog: str, *, description: str, usage: str, epilog: str) -> argparse.ArgumentParser:
    """A parser whose errors are ours, and which leaves out of its result what was not given."""
    return _Parser(
        prog=prog,
        description=description,
        usage=usage,
        epilog=epilog,
        allow_abbrev=False,
        exit_on_error=False,
        argument_default=argparse.SUPPRESS,
    )


def _parser(prog: str, description: str) -> argparse.ArgumentParser:
    parser = command_parser(
        prog,
        description=description,
        usage=f"{prog} [--config FILE ...] [--dry_run [--measure [ROWS]]] [--OPTION VALUE ...]",
        epilog="Values: defaults < preset < YAML files, in order < flags. Lists take several values; "
        "switches also take true or false; none unsets an option that may be unset.",
    )
    parser.add_argument(
        "--config", action="append", default=[], metavar="FILE", help="YAML file of options; repeatable"
    )
    parser.add_argument(
        "--dry_run", action="store_true", default=False, help="print the resolved configuration and the plan, and stop"
    )
    parser.add_argument(
        "--measure",
        nargs="?",
        const=str(MEASURED_ROWS),
        default=None,
        metavar="ROWS",
        help="with --dry_run: start one teacher engine, generate so many rows, and say what disk space, memory and "
        f"time the job will take (without a number: {MEASURED_ROWS})",
    )
    add_options(parser)
    return parser


def add_options(parser: argparse.ArgumentParser, *, described: bool = True) -> None:
    """Give a parser the dotted flag of every option.

    Args:
        parser: to be changed.
        described: whether its help lists them.
    """
    if not described:
        for option in all_options().values():
            add_flag(parser, option, described=False)
        return
    groups = {
        name: parser.add_argument_group(f"--{name}.*" if name else "other", _first_line(section))
        for name, section in all_sections().items()
        if any(option.section is section for option in all_options().values())
    }
    for option in all_options().values():
        add_flag(groups[option.name.rpartition(".")[0]], option)


def _first_line(section: type) -> str | None:
    return (section.__doc__ or "").strip().partition("\n")[0].partition("`: ")[2] or None


def add_flag(group: argparse._ActionsContainer, option: Option, *, described: bool = True) -> None:
    """Add an option's flag, named and described as the option is; values come as text (see `section_from_flags`)."""
    takes: dict[str, Any] = {}
    if option.is_flag:
        takes = {"nargs": "?", "const": "true"}
    elif option.is_list:
        takes = {"nargs": "+"}
    metavar = "{" + ",".join(option.choices) + "}" if option.choices else option.metavar
    text = f"{option.field.description} (default: {show_value(option.default)})".replace("%", "%%")
    text = text if described else argparse.SUPPRESS
    group.add_argument(f"--{option.name}", dest=option.name, metavar=metavar, help=text, **takes)


def parse_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> dict[str, Any]:
    """What was given, by the arguments' names: of a dotted flag the text, or a list of texts.

    Raises:
        ConfigError: a flag is unknown, or has no value.
    """
    try:
        namespace, left_over = parser.parse_known_args(_join_negative_numbers(argv))
    except argparse.ArgumentError as error:
        raise ConfigError(_bad_argument(error)) from None
    if left_over:
        flags = [action.dest for action in parser._actions if action.option_strings]
        raise ConfigError(_unknown_argument(left_over[0], flags))
    return vars(namespace)


def given_flags(arguments: Mapping[str, Any], options: Mapping[str, Option] | None = None) -> dict[str, Given]:
    """The dotted flags among parsed arguments, by the option's name.

    Args:
        arguments: of `parse_arguments`.
        options: by the name of the flag; None: all of the configuration.
    """
    options = all_options() if options is None else options
    return {name: _from_command_line(options[name], value) for name, value in arguments.items() if name in options}


def _bad_argument(error: argparse.ArgumentError) -> str:
    name = (error.argument_name or "").removeprefix("--")
    option = all_options().get(name)
    if option is None:
        return f"{COMMAND_LINE}: --{name}: {error.message}"
    return f"{COMMAND_LINE}: --{name} has no value; expected {describe_type(option)} ({option.field.description})"


def _unknown_argument(text: str, flags: Iterable[str]) -> str:
    if not text.startswith("-"):
        return f"{COMMAND_LINE}: {text!r} belongs to no option; quote values that contain spaces"
    flag = text.partition("=")[0]
    known = nearest(flag.lstrip("-"), flags)
    hint = f"did you mean --{known}?" if known else "--help lists all options"
    return f"{COMMAND_LINE}: {flag} is not an option; {hint}"


def _join_negative_numbers(argv: Iterable[str]) -> list[str]:
    """`--x -1e3` as `--x=-1e3`: argparse takes only plain negative numbers for values."""
    joined: list[str] = []
    for token in argv:
        if joined and token.startswith("-") and joined[-1].startswith("--") and _is_number(token):
            joined[-1] += f"={token}"
        else:
            joined.append(token)
    return joined


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _from_command_line(option: Option, value: str | list[str]) -> Given:
    if isinstance(value, list):
        text = value[0] if len(value) == 1 else None
        return Given(text if text == option.default else value, text, COMMAND_LINE)
    return Given(value, value, COMMAND_LINE)
