"""Checkers: functions of the user that say whether a response is exactly right (`--eval.checker`)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from openrlhf_bd.errors import ConfigError

Checker = Callable[[Mapping[str, Any], str], bool]

_EXPECTED = "expected package.module:function, a function(record, response) -> bool"


def load_checker(name: str) -> Checker:
    """Import a checker by its dotted name.

    Args:
        name: "package.module:function".

    Returns:
        The function; it takes the data set's record and the student's text.

    Raises:
        ConfigError: the name has another form, or names nothing that can be called.
    """
    module_name, separator, function_name = name.partition(":")
    if not separator or not module_name or not function_name:
        raise ConfigError(f"--eval.checker: found {name!r}, {_EXPECTED}")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"--eval.checker {name}: module {module_name!r} cannot be imported ({error}); {_EXPECTED}. "
            "Install the package, or put its folder on PYTHONPATH"
        ) from error
    try:
        function = vars(module)[function_name]
    except KeyError:
        raise ConfigError(
            f"--eval.checker {name}: module {module_name!r} has no {function_name!r}; {_EXPECTED}"
        ) from None
    if not callable(function):
        raise ConfigError(f"--eval.checker {name}: found a {type(function).__name__}, {_EXPECTED}")
    checker: Checker = function
    return checker
