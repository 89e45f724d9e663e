"""Records of a data set: files, folders and hub data sets as OpenRLHF accepts them, with the origin of each record.

A specification is a comma-separated list. Each entry is a JSONL, JSON, CSV, Parquet or Arrow file, a folder of
such files, a folder written by `datasets.save_to_disk`, or the name of a hub data set; `name@folder` picks a folder
inside. Records are read one after another, so memory does not grow with the data set. Scripts are never run.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from openrlhf_bd.data.readers import READERS, Record, TableReader
from openrlhf_bd.errors import ConfigError, DataError
from openrlhf_bd.paths import looks_like_path, nearest_path_hint

BLEND_SEED = 42

# Words in the name of a file or of its folder that say which split it belongs to; other files are "train".
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


class Source(Protocol):
    """One data set, or one file of it: a number of records that can be read again and again."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Record]: ...
    def fingerprint(self) -> str: ...


@dataclass(frozen=True)
class Joined:
    """The first records of several sources, one source after the other."""

    sources: Sequence[Source]
    limit: int

    def __len__(self) -> int:
        return min(self.limit, sum(len(source) for source in self.sources))

    def __iter__(self) -> Iterator[Record]:
        left = self.limit
        for source in self.sources:
            for record in source:
                if left == 0:
                    return
                left -= 1
                yield record

    def fingerprint(self) -> str:
        parts = [*(source.fingerprint() for source in self.sources), str(self.limit)]
        return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Blended:
    """Sources drawn from with probabilities until each was seen whole; the shorter ones start over.

    The order is that of `datasets.interleave_datasets(..., stopping_strategy="all_exhausted", seed=42)`.
    """

    sources: Sequence[Source]
    probabilities: Sequence[float]

    def __len__(self) -> int:
        return len(self._turns())

    def __iter__(self) -> Iterator[Record]:
        readers = [iter(source) for source in self.sources]
        for turn in self._turns():
            record = next(readers[turn], None)
            if record is None:
                readers[turn] = iter(self.sources[turn])
                record = next(readers[turn])
            yield record

    def _turns(self) -> list[int]:
        """Which source each record comes from. The last turn is the one in which the last source is seen whole."""
        generator = np.random.default_rng(BLEND_SEED)
        missing = [len(source) for source in self.sources]
        num_unseen = len(missing)
        turns: list[int] = []
        while True:
            for turn in generator.choice(len(missing), size=1000, p=self.probabilities).tolist():
                turns.append(turn)
                missing[turn] -= 1
                num_unseen -= missing[turn] == 0
                if num_unseen == 0:
                    return turns

    def fingerprint(self) -> str:
        parts = [f"{p!r} {source.fingerprint()}" for p, source in zip(self.probabilities, self.sources, strict=True)]
        return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()


def load_records(spec: str, *, split: str, max_samples: int, probs: str | None, option: str) -> Source:
    """The records that a specification names. Opens every source; parses records only as they are asked for.

    Args:
        spec: comma-separated data sets.
        split: split of hub data sets, and of folders that have several; a single file has one split, and is it.
        max_samples: at most so many records of each data set.
        probs: comma-separated sampling probabilities, one a data set; None joins them one after the other.
        option: flag that gave the specification, for messages.

    Raises:
        DataError: a data set is missing, empty, a script, or has no such split.
        ConfigError: the probabilities are not one positive number a data set with sum 1.
    """
    names = [name.strip() for name in spec.split(",")]
    if not all(names):
        raise ConfigError(f"{option} is {spec!r}; expected data sets separated by single commas")
    sources = [_open_data_set(name, split, max_samples, option) for name in names]
    if probs is None:
        return sources[0] if len(sources) == 1 else Joined(sources, sum(len(source) for source in sources))
    return Blended(sources, _parse_probabilities(probs, len(sources)))


def _parse_probabilities(probs: str, num_sources: int) -> list[float]:
    expected = f"expected {num_sources} positive numbers with sum 1, separated by commas, one for each data set"
    try:
        values = [float(part) for part in probs.split(",")]
    except ValueError:
        raise ConfigError(f"--data.prompt_probs is {probs!r}; {expected}") from None
    if len(values) != num_sources or not all(value > 0 for value in values) or abs(sum(values) - 1) > 1e-6:
        raise ConfigError(
            f"--data.prompt_probs is {probs!r}: {len(values)} numbers with sum {sum(values):g}; {expected}"
        )
    return [value / sum(values) for value in values]


def _open_data_set(name: str, split: str, max_samples: int, option: str) -> Source:
    path, folder = Path(name).expanduser(), None
    if not path.exists() and "@" in name:
        name, _, folder = (part.strip() for part in name.partition("@"))
        path = Path(name).expanduser()
    if path.suffix == ".py" or (path / f"{path.name}.py").is_file():
        raise DataError(
            f"{name}: is a Python script, which is never run; expected a data file or a folder of data files. "
            f"Save its records as JSONL first ({option})"
        )
    if path.is_file():
        source = _open_file(path, option)
    elif path.is_dir():
        source = _open_folder(path / folder if folder else path, split, option)
    elif looks_like_path(name) or path.suffix.lower() in READERS:
        raise DataError(f"{name}: there is no such file or folder{nearest_path_hint(path)} ({option})")
    else:
        source = _open_hub(name, folder, split, option)
    if len(source) == 0:
        raise DataError(f"{name}: has no record; expected at least one ({option})")
    return source if len(source) <= max_samples else Joined([source], max_samples)


def _open_file(path: Path, option: str) -> Source:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        known = ", ".join(READERS)
        raise DataError(f"{path}: files of type {path.suffix!r} are not known; expected one of {known} ({option})")
    return reader(path)


def _open_folder(folder: Path, split: str, option: str) -> Source:
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return _open_saved(folder, split, option)
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in READERS and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not files:
        raise DataError(f"{folder}: the folder has no data file; expected {', '.join(READERS)} ({option})")
    by_split: dict[str, list[Path]] = {}
    for path in files:
        by_split.setdefault(_split_of(path.relative_to(folder)), []).append(path)
    chosen = by_split.get(split) or (files if set(by_split) == {"train"} else None)
    if chosen is None:
        raise DataError(f"{folder}: has no split {split!r}; its files make up {_listed(by_split)} ({option})")
    sources = [_open_file(path, option) for path in chosen]
    return Joined(sources, sum(len(source) for source in sources))


def _split_of(path: Path) -> str:
    words = re.split(r"[^a-z]+", str(path.with_suffix("")).lower())
    return next((split for split, names in _SPLIT_WORDS.items() if any(name in words for name in names)), "train")


def _open_saved(folder: Path, split: str, option: str) -> Source:
    from datasets import load_from_disk

    try:
        data = load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder}: cannot be read as a saved data set: {error} ({option})") from error
    return TableReader(_pick_split(data, split, str(folder), option), str(folder))


def _open_hub(name: str, folder: str | None, split: str, option: str) -> Source:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        data = load_dataset(name, data_dir=folder)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{name}: is no file or folder here{nearest_path_hint(name)}, and could not be loaded as a hub data set: "
            f"{first_line} ({option})"
        ) from error
    return TableReader(_pick_split(data, split, name, option), name)


def _pick_split(data: Any, split: str, name: str, option: str) -> Any:
    if not isinstance(data, Mapping):
        return data
    if split not in data:
        raise DataError(f"{name}: has no split {split!r}; it has {_listed(data)} ({option}; see also its split option)")
    return data[split]


def _listed(names: Mapping[str, Any]) -> str:
    return ", ".join(f'"{name}"' for name in names)
