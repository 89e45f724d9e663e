"""Names of algorithms: built-in, registered by a decorator, offered by an installed package, or a dotted path.

A name is resolved anew in each process: Ray workers start with an empty registry.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from openrlhf_bd.algorithms.base import Algorithm
from openrlhf_bd.errors import ConfigError

ENTRY_POINT_GROUP = "openrlhf.algorithms"
BUILT_IN = {
    "bd": "openrlhf_bd.algorithms.bd:BellmanDistill",
    "gkd": "openrlhf_bd.algorithms.gkd:GeneralisedDistill",
    "kd": "openrlhf_bd.algorithms.kd:WordDistill",
    "minillm": "openrlhf_bd.algorithms.minillm:MiniLLM",
    "rkl": "openrlhf_bd.algorithms.rkl:ReverseDistill",
    "sft": "openrlhf_bd.algorithms.sft:SupervisedFineTuning",
    "seqkd": "openrlhf_bd.algorithms.seqkd:SequenceDistill",
}

AlgorithmT = TypeVar("AlgorithmT", bound=type[Algorithm])
_registered: dict[str, type[Algorithm]] = {}


def register_algorithm(name: str) -> Callable[[AlgorithmT], AlgorithmT]:
    """Class decorator that gives an Algorithm a name in this process.

    Other processes find it only if they import its module too: offer it in the entry-point group
    "openrlhf.algorithms", or give users its dotted path.

    Raises:
        ConfigError: the name belongs to another class.
    """

    def register(algorithm: AlgorithmT) -> AlgorithmT:
        path = _path(algorithm)
        owner = BUILT_IN.get(name) or (_path(_registered[name]) if name in _registered else path)
        if owner != path:
            raise ConfigError(f'{path}: the algorithm name "{name}" belongs to {owner}; choose another name')
        _registered[name] = algorithm
        return algorithm

    return register


def resolve_algorithm(name: str) -> type[Algorithm]:
    """The class of an algorithm.

    Args:
        name: a built-in or registered name, a name of the entry-point group "openrlhf.algorithms", or
            "package.module:Class". Names of this process come before those of installed packages.

    Raises:
        ConfigError: nothing has that name (the message gives the nearest), two packages claim it, or what it names
            cannot be imported or is no Algorithm.
    """
    if ":" in name:
        return _load(name, f'--algo.distill.name "{name}"')
    if name in BUILT_IN:
        return _load(BUILT_IN[name], f'algorithm "{name}"')
    if name in _registered:
        return _registered[name]
    points = {point.value: point for point in entry_points(group=ENTRY_POINT_GROUP, name=name)}
    if len(points) > 1:
        raise ConfigError(
            f'--algo.distill.name "{name}": {len(points)} installed packages offer it ({", ".join(sorted(points))}); '
            "name the one you mean as package.module:Class"
        )
    if not points:
        raise ConfigError(_unknown(name))
    (point,) = points.values()
    return _load(point.value, f'algorithm "{name}" of {_distribution(point)}')


def available_algorithms() -> list[tuple[str, str, str]]:
    """(name, summary, origin) of every algorithm that has a name here, by name.

    The summary is the first line of the class's docstring, or why an installed package's class cannot be used.
    """
    rows = {name: (_summary(_load(path, name)), "built-in") for name, path in BUILT_IN.items()}
    for name, algorithm in _registered.items():
        rows.setdefault(name, (_summary(algorithm), f"registered by {algorithm.__module__}"))
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.name not in rows:
            try:
                summary = _summary(_load(point.value, point.name))
            except ConfigError as error:
                summary = f"unusable: {error}"
            rows[point.name] = (summary, f"package {_distribution(point)}")
    return [(name, *rows[name]) for name in sorted(rows)]


def _load(path: str, where: str) -> type[Algorithm]:
    module_name, _, class_name = path.partition(":")
    if not module_name or not class_name:
        raise ConfigError(f"{where}: a dotted path has the form package.module:Class")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"{where}: cannot import {module_name} ({error}); is it installed and on the path?"
        ) from error
    found = vars(module).get(class_name)
    if found is None:
        raise ConfigError(f"{where}: module {module_name} has no {class_name}{_nearest(class_name, vars(module))}")
    if not (inspect.isclass(found) and issubclass(found, Algorithm)):
        raise ConfigError(f"{where}: {path} is not a subclass of openrlhf_bd.algorithms.Algorithm")
    return found


def _unknown(name: str) -> str:
    known = {*BUILT_IN, *_registered, *entry_points(group=ENTRY_POINT_GROUP).names}
    return (
        f'--algo.distill.name "{name}" is unknown{_nearest(name, known)}; known: {", ".join(sorted(known))}, or '
        "package.module:Class"
    )


def _nearest(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f'; did you mean "{matches[0]}"?' if matches else ""


def _path(algorithm: type[Algorithm]) -> str:
    return f"{algorithm.__module__}:{algorithm.__qualname__}"


def _summary(algorithm: type[Algorithm]) -> str:
    return (inspect.getdoc(algorithm) or "").partition("\n")[0]


def _distribution(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value
