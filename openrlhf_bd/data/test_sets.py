"""Test sets of the final evaluation: their names and keys, and what their records must be to give a score."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from openrlhf_bd.config import Config
from openrlhf_bd.data.fields import reference_fields
from openrlhf_bd.data.readers import Record
from openrlhf_bd.errors import ConfigError, DataError

# Options of `data.*` that a test set may have of its own.
SET_KEYS = ("input_key", "context_key", "label_key")

_OPTION = "--eval.test_datasets"
_KEY = re.compile(r":(?P<key>\w+)=(?P<value>[^:]*)")


@dataclass(frozen=True, slots=True)
class TestSet:
    """An entry of `--eval.test_datasets`.

    Attributes:
        path: data set, see `openrlhf_bd.data.sources`.
        keys: keys of its records where they are not those of `--data.*`, by the option's name; None: there is none.
    """

    __test__ = False  # no class of tests, whatever pytest makes of its name

    path: str
    keys: dict[str, str | None] = field(default_factory=dict)

    def configured(self, config: Config) -> Config:
        """The configuration with this set's own keys."""
        return config.model_copy(update={"data": config.data.model_copy(update=self.keys)})


def parse_test_datasets(spec: str) -> dict[str, TestSet]:
    """Test sets by name; an entry without a name takes its file's.

    An entry is `name=path`, and may go on with keys of its own: `name=path:input_key=question:context_key=none`.

    Raises:
        ConfigError: an entry is empty, two have the same name, or a key is none of SET_KEYS.
    """
    found: dict[str, TestSet] = {}
    for entry in spec.split(","):
        given = list(_KEY.finditer(entry))
        place = entry[: given[0].start()] if given else entry
        name, equals, path = (part.strip() for part in place.partition("="))
        if not equals:
            name, path = Path(name).stem, name
        if not name or not path:
            raise ConfigError(f"{_OPTION} is {spec!r}; expected name=path entries separated by commas")
        if name in found:
            raise ConfigError(f"{_OPTION} names {name!r} twice; give each data set a name of its own, name=path")
        found[name] = TestSet(path, dict(_key_of(match, entry.strip()) for match in given))
    return found


def _key_of(match: re.Match[str], entry: str) -> tuple[str, str | None]:
    key, value = match["key"], match["value"].strip()
    if key not in SET_KEYS or not value:
        raise ConfigError(
            f"{_OPTION}: {entry!r} has {match[0]!r}; expected name=path, and behind it any of "
            f"{', '.join(f':{known}=KEY' for known in SET_KEYS)}"
        )
    return key, None if value == "none" else value


class RecordChecks:
    """What the records of an evaluation must have, and what is counted of those that do not.

    Args:
        label_key: key of the references; None: only a checker scores.
        allow_missing: records without a reference are counted; False: they are errors.
    """

    def __init__(self, label_key: str | None, *, allow_missing: bool) -> None:
        self._label_key, self._allow_missing = label_key, allow_missing
        self._seen: dict[bytes, str] = {}
        self.num_without_reference = 0
        self.repeats: list[str] = []

    def see(self, records: Sequence[Record], encoded: Sequence[NDArray[np.int32]]) -> None:
        """Look at records in their order.

        Args:
            records: of the data set.
            encoded: tokens of each one's prompt.

        Raises:
            DataError: a record has no reference though it must, or one that is no text.
        """
        for record, ids in zip(records, encoded, strict=True):
            references: list[str] = []
            if self._label_key is not None:
                references = reference_fields(record, self._label_key, allow_missing=self._allow_missing)
                self.num_without_reference += not references
            content = hashlib.blake2b(ids.tobytes() + repr(references).encode(), digest_size=16).digest()
            first = self._seen.setdefault(content, record.where)
            if first != record.where:
                self.repeats.append(f"{record.where} repeats {first}")

    def require_scores(self, spec: str, *, num_records: int, has_checker: bool) -> None:
        """Refuse a set of which nothing could be scored.

        Raises:
            DataError: no record has a reference, and there is no checker.
        """
        if self._label_key is not None and self.num_without_reference == num_records and not has_checker:
            raise DataError(
                f"{spec}: none of its {num_records} records has a reference in {self._label_key!r}, so none could be "
                "scored; name the key of the references by --data.label_key, or of this test set alone by "
                f"{_OPTION} name={spec}:label_key=KEY"
            )
