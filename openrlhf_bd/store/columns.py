"""Tables of a store's rows and shards that are appended to and stay small: arrays, not objects.

A million rows take some 50 MB in a writer and 80 in a reader, a hundred thousand shards some 11 MB.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from openrlhf_bd.store.manifest import ShardEntry

# Ids that are found through a dictionary; beyond that many they move to the sorted arrays.
_RECENT_IDS = 65_536

# Five digits or more: 99999 is followed by 100000.
_SHARD_NAME = re.compile(r"shard-([0-9]{5}|[1-9][0-9]{5,})\.parquet")

_SHARD = np.dtype(
    [
        ("number", np.int32),
        ("num_rows", np.int32),
        ("num_prompt_tokens", np.int64),
        ("num_response_tokens", np.int64),
        ("num_states", np.int64),
        ("num_candidates", np.int64),
        ("size_bytes", np.int64),
        ("sha256", "V32"),
        ("footer_sha256", "V32"),
    ]
)


class Column:
    """An array that grows at its end."""

    def __init__(self, dtype: Any) -> None:
        self._content = np.empty(0, dtype)
        self._length = 0

    def __len__(self) -> int:
        return self._length

    @property
    def values(self) -> NDArray[Any]:
        """What it holds now; later additions don't show in it."""
        return self._content[: self._length]

    def extend(self, values: ArrayLike) -> None:
        """Add to the end."""
        added = np.asarray(values, self._content.dtype)
        end = self._length + len(added)
        if end > len(self._content):
            larger = np.empty(max(end, self._length + self._length // 4), self._content.dtype)
            larger[: self._length] = self.values
            self._content = larger
        self._content[self._length : end] = added
        self._length = end

    def reorder(self, order: NDArray[np.int64]) -> None:
        """Put the entries into another order."""
        self._content = self.values[order]


class RowIds(Sequence[str]):
    """Row ids, numbered as they were added: their text end to end, and a way back from an id to its number.

    The way back is built when it is first asked for: 64-bit hashes in ascending order, with the text as the judge.
    """

    def __init__(self, row_ids: Iterable[str] = ()) -> None:
        self._text, self._ends = bytearray(), array("q", [0])
        self._hashes, self._numbers = np.empty(0, np.int64), np.empty(0, np.int32)
        self._recent: dict[str, int] = {}
        self.extend(row_ids)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, number: int) -> str: ...

    @overload
    def __getitem__(self, number: slice) -> Sequence[str]: ...

    def __getitem__(self, number: int | slice) -> str | Sequence[str]:
        if isinstance(number, slice):
            return [self[place] for place in range(*number.indices(len(self)))]
        place = range(len(self))[number]
        return self._text[self._ends[place] : self._ends[place + 1]].decode("utf-8")

    def __iter__(self) -> Iterator[str]:
        return (self[number] for number in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(str.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]

    def __contains__(self, row_id: object) -> bool:
        return isinstance(row_id, str) and self.find([row_id])[0] >= 0

    def extend(self, row_ids: Iterable[str]) -> None:
        """Add ids that are not there yet."""
        for row_id in row_ids:
            self._text += row_id.encode("utf-8")
            self._ends.append(len(self._text))

    def find(self, row_ids: Sequence[str]) -> NDArray[np.int64]:
        """Number of each id; -1 where it is not there."""
        self._make_findable()
        hashes = np.fromiter(map(hash, row_ids), np.int64, len(row_ids))
        places = np.searchsorted(self._hashes, hashes)
        return np.array([self._number(*one) for one in zip(row_ids, hashes, places, strict=True)], np.int64)

    def _number(self, row_id: str, hashed: np.int64, place: int) -> int:
        if row_id in self._recent:
            return self._recent[row_id]
        while place < len(self._hashes) and self._hashes[place] == hashed:
            if self[int(self._numbers[place])] == row_id:
                return int(self._numbers[place])
            place += 1
        return -1

    def _make_findable(self) -> None:
        for number in range(len(self._hashes) + len(self._recent), len(self)):
            self._recent[self[number]] = number
            if len(self._recent) == _RECENT_IDS:
                self._sort_recent()

    def _sort_recent(self) -> None:
        hashes = np.fromiter(map(hash, self._recent), np.int64, len(self._recent))
        numbers = np.fromiter(self._recent.values(), np.int32, len(self._recent))
        order = np.argsort(hashes)
        places = np.searchsorted(self._hashes, hashes[order])
        self._hashes = np.insert(self._hashes, places, hashes[order])
        self._numbers = np.insert(self._numbers, places, numbers[order])
        self._recent.clear()


class ShardTable:
    """The entries of sealed shards.

    Attributes:
        last_number: the largest number in a shard's name; -1 without shards.
    """

    def __init__(self) -> None:
        self._shards = Column(_SHARD)
        self.last_number = -1

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, place: int) -> ShardEntry:
        shard = self._shards.values[place]
        fields = {name: shard[name].item() for name in _SHARD.names or () if name != "number"}
        fields |= {name: shard[name].tobytes().hex() for name in ("sha256", "footer_sha256")}
        return ShardEntry(file=shard_name(int(shard["number"])), **fields)

    def __iter__(self) -> Iterator[ShardEntry]:
        return (self[place] for place in range(len(self)))

    @property
    def size_bytes(self) -> int:
        """Bytes of all shards."""
        return int(self._shards.values["size_bytes"].sum())

    def append(self, entry: ShardEntry) -> None:
        """Add a shard."""
        digests = (bytes.fromhex(entry.sha256), bytes.fromhex(entry.footer_sha256))
        counts = (entry.num_prompt_tokens, entry.num_response_tokens, entry.num_states, entry.num_candidates)
        number = shard_number(entry.file)
        self.last_number = max(number, self.last_number)
        row = (number, entry.num_rows, *counts, entry.size_bytes, *digests)
        self._shards.extend(np.array([row], _SHARD))


def shard_name(number: int) -> str:
    """Name of a shard's file."""
    return f"shard-{number:05d}.parquet"


def is_shard_name(name: str) -> bool:
    """Whether a file is named like a shard."""
    return _SHARD_NAME.fullmatch(name) is not None


def shard_number(name: str) -> int:
    """Number in the name of a shard's file.

    Raises:
        ValueError: it is not named like a shard.
    """
    found = _SHARD_NAME.fullmatch(name)
    if found is None:
        raise ValueError(f"{name!r} is not named like a shard, expected shard-00000.parquet")
    return int(found[1])
