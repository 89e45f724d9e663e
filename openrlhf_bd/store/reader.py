"""Random access to the rows of a store, with bounded memory, and checks of what is read."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from openrlhf_bd.errors import StoreError
from openrlhf_bd.records import Rollout
from openrlhf_bd.store.files import sha256_file
from openrlhf_bd.store.manifest import QuarantinedRow, StoreManifest, StoreState
from openrlhf_bd.store.order import natural_key
from openrlhf_bd.store.shard_file import RowGroup, ShardFile, ShardIndex, check_size, foreign_shard, unlisted_shards
from openrlhf_bd.store.shards import REMEDY

# N rows of the store.

_MAX_OPEN_SHARDS = 8


class StoreReader:
    """The rows of a store, numbered 0 to N - 1 in the natural order of their ids (see `order.natural_key`).

    The numbering depends on the set of rows alone, not on the order in which they were made, on shards or on
    interruptions. Only row ids and lengths are held; decoded row groups are cached up to `cache_bytes`.
    A reader belongs to one process: open another one in each.

    Attributes:
        path: folder of the store.
        manifest: what the rows are.
        complete: all rows are there.
        row_ids: of each row.
        prompt_lengths: prompt tokens of each row, int32 [N].
        response_lengths: response tokens of each row, int32 [N].
        num_states: states with a candidate set of each row, int32 [N]; 0 in stores without sets.
    """

    def __init__(self, path: str | Path, *, require_complete: bool = True, cache_bytes: int = 256 * 2**20) -> None:
        """Open a store: check its manifest, each shard's size and owner, and read ids and lengths.

        Args:
            path: folder of the store.
            require_complete: refuse an unfinished store. Otherwise the rows sealed by now are read.
            cache_bytes: memory for decoded row groups; the last one used is always kept.

        Raises:
            StoreError: no store is there, it is unfinished, or a file is missing, damaged or foreign.
        """
        self.path = Path(path)
        self._state = StoreState.load(self.path)
        if require_complete and not self.complete:
            raise StoreError(
                f"{self.path}: the store is unfinished: {self._state.num_rows} of {self.manifest.num_rows} rows; "
                "run the command that makes it again, it goes on where it stopped"
            )
        for entry in self._state.shards:
            check_size(self.path, entry)
        # Beside an unfinished store such a file may be a shard that is being sealed right now.
        if self.complete and (foreign := unlisted_shards(self.path, self._state)):
            raise foreign_shard(foreign[0])
        self._open_shards: OrderedDict[int, ShardFile] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], RowGroup] = OrderedDict()
        self._cache_bytes = cache_bytes
        self._build_index()

    @property
    def manifest(self) -> StoreManifest:
        return self._state.manifest

    @property
    def complete(self) -> bool:
        return self._state.complete

    @property
    def quarantined(self) -> tuple[QuarantinedRow, ...]:
        """Rows that were given up: they are not among the N."""
        return self._state.quarantined

    @property
    def size_bytes(self) -> int:
        """Bytes of all shards on disk."""
        return sum(entry.size_bytes for entry in self._state.shards)

    @property
    def cached_bytes(self) -> int:
        """Memory that decoded row groups take now; at most cache_bytes, or one row group."""
        return sum(group.size_bytes for group in self._groups.values())

    def __len__(self) -> int:
        return len(self.row_ids)

    def rollouts(self, indices: Sequence[int] | NDArray[np.integer]) -> list[Rollout]:
        """The rows with these numbers, in the order asked for. Each row group is decoded at most once.

        Log-probabilities of candidates and masses come back as float32, with float16's precision.

        Raises:
            IndexError: a number is outside [0, N).
            StoreError: a row is damaged; the message names the file and the rows.
        """
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(
                f"{self.path}: rows {wanted.min()} to {wanted.max()} asked for, expected 0 to {len(self) - 1}"
            )
        found: dict[int, Rollout] = {}
        for place in np.lexsort((self._group_N[wanted], self._shard_N[wanted])):
            row = wanted[place]
            group = self._group(int(self._shard_N[row]), int(self._group_N[row]))
            found[int(place)] = group.rollout(int(self._slot_N[row]))
        return [found[place] for place in range(len(wanted))]

    def scan(self) -> Iterator[list[Rollout]]:
        """Every row once, one row group at a time, in the order of the files: fast, but not an order to train in.

        Raises:
            StoreError: as `rollouts`.
        """
        for shard, entry in enumerate(self._state.shards):
            file = ShardFile(self.path, entry, self._state.store_id)
            for group in range(len(self._group_sizes[shard])):
                rows = file.read_group(group)
                yield [rows.rollout(row) for row in range(rows.num_rows)]

    def verify(self) -> None:
        """Compare every byte of every shard with what was sealed (SHA-256).

        Raises:
            StoreError: the message names each file that differs, and its rows.
        """
        damaged = [
            f"{self.path / entry.file}: its content is not what was sealed ({entry.num_rows} rows)"
            for entry in self._state.shards
            if _sha256_or_missing(self.path / entry.file) != entry.sha256
        ]
        if damaged:
            raise StoreError("\n".join(damaged) + f"\nFor each: {REMEDY}")

    def _build_index(self) -> None:
        indexes = [self._shard(shard).index() for shard in range(len(self._state.shards))]
        row_ids = [row_id for index in indexes for row_id in index.row_ids]
        order = np.array(sorted(range(len(row_ids)), key=lambda row: natural_key(row_ids[row])), dtype=np.int64)
        self.row_ids = [row_ids[row] for row in order]
        self._require_unique()
        self.prompt_lengths = _column([index.prompt_lengths for index in indexes])[order]
        self.response_lengths = _column([index.response_lengths for index in indexes])[order]
        self.num_states = _column([index.num_states for index in indexes])[order]
        self._group_sizes = [index.group_sizes for index in indexes]
        self._shard_N = _column([np.full(len(index.row_ids), shard) for shard, index in enumerate(indexes)])[order]
        self._group_N = _column([_group_of_rows(index) for index in indexes])[order]
        self._slot_N = _column([_slot_of_rows(index) for index in indexes])[order]

    def _require_unique(self) -> None:
        # Equal ids are neighbours in any order of the ids.
        for row_id, following in zip(self.row_ids, self.row_ids[1:], strict=False):
            if row_id == following:
                raise StoreError(f"{self.path}: row {row_id!r} is there twice, expected once; {REMEDY}")

    def _shard(self, shard: int) -> ShardFile:
        if shard not in self._open_shards:
            self._open_shards[shard] = ShardFile(self.path, self._state.shards[shard], self._state.store_id)
            if len(self._open_shards) > _MAX_OPEN_SHARDS:
                self._open_shards.popitem(last=False)
        self._open_shards.move_to_end(shard)
        return self._open_shards[shard]

    def _group(self, shard: int, group: int) -> RowGroup:
        key = (shard, group)
        if key not in self._groups:
            rows = self._shard(shard).read_group(group)
            while self._groups and self.cached_bytes + rows.size_bytes > self._cache_bytes:
                self._groups.popitem(last=False)
            self._groups[key] = rows
        self._groups.move_to_end(key)
        return self._groups[key]


def _column(parts: Sequence[NDArray[np.integer]]) -> NDArray[np.int32]:
    return np.concatenate([np.empty(0, np.int32), *parts]).astype(np.int32)


def _group_of_rows(index: ShardIndex) -> NDArray[np.int64]:
    return np.repeat(np.arange(len(index.group_sizes)), index.group_sizes)


def _slot_of_rows(index: ShardIndex) -> NDArray[np.int64]:
    starts = np.cumsum(index.group_sizes) - index.group_sizes
    return np.arange(index.group_sizes.sum()) - np.repeat(starts, index.group_sizes)


def _sha256_or_missing(path: Path) -> str | None:
    try:
        return sha256_file(path)
    except FileNotFoundError:
        return None
