"""Several teachers in one job: a value in each record says which of them answers it."""

from __future__ import annotations

from collections.abc import Collection

from openrlhf_bd.config import Config
from openrlhf_bd.data.fields import text_field
from openrlhf_bd.data.readers import Record
from openrlhf_bd.errors import ConfigError, DataError

# The teacher of --teacher.model_name_or_path, in stores and messages.
DEFAULT_TEACHER = "default"


def is_routed(config: Config) -> bool:
    """Whether records choose their teachers."""
    return config.teacher.routes is not None


def teacher_models(config: Config) -> dict[str, str]:
    """Model of each teacher, by name: the values of `teacher.routes`, then `default`, the one for all other records.

    Raises:
        ConfigError: an entry is not value=model, a value is there twice, or one of routes and route_key is missing.
    """
    models = _parse_routes(config)
    if config.teacher.model_name_or_path is not None:
        models[DEFAULT_TEACHER] = config.teacher.model_name_or_path
    return models


def teacher_option(name: str) -> str:
    """The option that named a teacher's model, for messages."""
    return "--teacher.model_name_or_path" if name == DEFAULT_TEACHER else f"--teacher.routes {name}"


def _parse_routes(config: Config) -> dict[str, str]:
    routes, key = config.teacher.routes, config.teacher.route_key
    if (routes is None) != (key is None):
        given, missing = ("routes", "route_key") if key is None else ("route_key", "routes")
        raise ConfigError(
            f"--teacher.{given} is given without --teacher.{missing}; routes are value=model entries, and the key says "
            "where a record has its value"
        )
    found: dict[str, str] = {}
    for entry in routes.split(",") if routes is not None else ():
        name, _, model = (part.strip() for part in entry.partition("="))
        if not name or not model:
            raise ConfigError(f"--teacher.routes is {routes!r}; expected value=model entries separated by commas")
        if name == DEFAULT_TEACHER:
            raise ConfigError(
                f"--teacher.routes names {name!r}, which stands for --teacher.model_name_or_path: the teacher of the "
                "records that no route names; give its model there"
            )
        if name in found:
            raise ConfigError(f"--teacher.routes names {name!r} twice; a value has one teacher, keep one of them")
        found[name] = model
    return found


def route_of(record: Record, key: str, names: Collection[str]) -> str:
    """Name of the teacher that answers a record.

    Args:
        record: the record.
        key: `teacher.route_key`.
        names: of the teachers; `default` among them answers what no other does.

    Raises:
        DataError: the record lacks the key, or no teacher is there for its value; the message names the record.
    """
    value = text_field(record, key, option="--teacher.route_key", allow_empty=True)
    if value in names:
        return value
    if DEFAULT_TEACHER in names:
        return DEFAULT_TEACHER
    raise DataError(
        f'{record.where}: "{key}" is {value!r}, for which there is no teacher; expected one of {", ".join(names)}. Add '
        "it to --teacher.routes, or give --teacher.model_name_or_path for all other values"
    )
