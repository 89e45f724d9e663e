"""Random access to the rows of a store, with bounded memory, and checks of what is read."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from openrlhf_bd.errors import StoreError
from openrlhf_bd.records import Rollout
from openrlhf_bd.store.columns import Column, RowIds, ShardTable
from openrlhf_bd.store.folder import StorePath, open_folder
from openrlhf_bd.store.journal import Journal, SealedShard
from openrlhf_bd.store.listing import sealed_shards
from openrlhf_bd.store.manifest import REMEDY, QuarantinedRow, StoreManifest, StoreState
from openrlhf_bd.store.order import natural_order
from openrlhf_bd.store.shard_file import RowGroup, ShardFile, foreign_shard, require_sizes, unlisted_shards

# N rows of the store.

_MAX_OPEN_SHARDS = 64


class StoreReader:
    """The rows of a store, numbered 0 to N - 1 in the natural order of their ids (see `order.natural_key`).

    The numbering depends on the set of rows alone, not on the order in which they were made, on shards or on
    interruptions. Rows that `refresh` finds are numbered after these, as they were sealed. Only row ids and lengths
    are held; decoded row groups are cached up to `cache_bytes`. A reader belongs to one process: open another one in
    each.

    Attributes:
        path: of the store: a folder or a URL.
        manifest: what the rows are.
        complete: all rows are there.
        row_ids: of each row.
        prompt_lengths: prompt tokens of each row, int32 [N].
        response_lengths: response tokens of each row, int32 [N].
        num_states: states with a candidate set of each row, int32 [N]; 0 in stores without sets.
        steps: optimizer step whose batch each row belongs to, int32 [N]; 0 in stores that no online run made.
    """

    def __init__(self, path: StorePath, *, require_complete: bool = True, cache_bytes: int = 256 * 2**20) -> None:
        """Open a store: check its lists and each shard's size, and read ids and lengths.

        Args:
            path: folder of the store, or its URL.
            require_complete: refuse an unfinished store. Otherwise the rows sealed by now are read.
            cache_bytes: memory for decoded row groups; the last one used is always kept.

        Raises:
            StoreError: no store is there, it is unfinished, or a file is missing, cut or foreign.
        """
        self._folder = open_folder(path)
        self.path = self._folder.url
        self._cache = _Cache(cache_bytes)
        self._open_shards: OrderedDict[int, ShardFile] = OrderedDict()
        self._journal, self._shards, self.row_ids = Journal(self._folder), ShardTable(), RowIds()
        self._columns = {name: Column(np.int32) for name in ("prompt", "response", "states", "step", "shard", "place")}
        self._state = StoreState.load(self._folder)
        for sealed in sealed_shards(self._folder, self._state, self._journal):
            self._add(sealed)
        if require_complete and not self.complete:
            raise StoreError(
                f"{self.path}: the store is unfinished: {len(self)} of {self.manifest.num_rows} rows; "
                "run the command that makes it again, it goes on where it stopped"
            )
        self._check_files()
        self._sort_rows()

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
        return self._shards.size_bytes

    @property
    def cached_bytes(self) -> int:
        """Memory that decoded row groups take now; at most cache_bytes, or one row group."""
        return self._cache.size_bytes

    @property
    def prompt_lengths(self) -> NDArray[np.int32]:
        return self._columns["prompt"].values

    @property
    def response_lengths(self) -> NDArray[np.int32]:
        return self._columns["response"].values

    @property
    def num_states(self) -> NDArray[np.int32]:
        return self._columns["states"].values

    @property
    def steps(self) -> NDArray[np.int32]:
        return self._columns["step"].values

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
        shards, places = self._columns["shard"].values[wanted], self._columns["place"].values[wanted]
        for number in np.lexsort((places, shards)):
            rollout = self._rollout(int(shards[number]), int(places[number]))
            if rollout.row_id != self.row_ids[int(wanted[number])]:
                raise StoreError(
                    f"{self.path}/{self._shards[int(shards[number])].file}: row {rollout.row_id!r} in the place of "
                    f"{self.row_ids[int(wanted[number])]!r}; {REMEDY}"
                )
            found[int(number)] = rollout
        return [found[place] for place in range(len(wanted))]

    def index_of(self, row_ids: Iterable[str]) -> NDArray[np.int64]:
        """Numbers of the rows with these ids, in the order asked for.

        Raises:
            StoreError: a row is not there.
        """
        wanted = list(row_ids)
        found = self.row_ids.find(wanted)
        if (found < 0).any():
            raise StoreError(
                f"{self.path}: row {wanted[int(np.argmin(found))]!r} is not among the {len(self)} rows read; "
                "it was not sealed, or after the last refresh"
            )
        return found

    def refresh(self) -> int:
        """Pick up the shards sealed since the store was opened. Rows that were there keep their numbers.

        Returns:
            The number of new rows.

        Raises:
            StoreError: the store was repaired or replaced since (open it anew), or a new shard is damaged.
        """
        state, num_rows = StoreState.load(self._folder), len(self)
        if (state.store_id, state.rewritten) != (self._state.store_id, self._state.rewritten):
            raise self._changed()
        for sealed in self._journal.read():
            if (self.row_ids.find(sealed.rows.row_ids) >= 0).any():
                raise self._changed()
            self._add(sealed)
        # The manifest was read before the journal, which may have grown since.
        if self._journal.num_lines < state.sealed_shards:
            raise self._changed()
        self._state = state
        return len(self) - num_rows

    def scan(self) -> Iterator[list[Rollout]]:
        """Every row once, one row group at a time, in the order of the files: fast, but not an order to train in.

        Raises:
            StoreError: as `rollouts`.
        """
        for entry in self._shards:
            file = ShardFile(self._folder, entry, self._state.store_id)
            try:
                for group in range(file.num_groups):
                    rows = file.read_group(group)
                    yield [rows.rollout(row) for row in range(rows.num_rows)]
            finally:
                file.close()

    def _add(self, sealed: SealedShard) -> None:
        rows, num_rows = sealed.rows, sealed.shard.num_rows
        columns = {
            "prompt": rows.prompt_lengths,
            "response": rows.response_lengths,
            "states": rows.num_states,
            "step": [0] * num_rows if rows.steps is None else rows.steps,
            "shard": [len(self._shards)] * num_rows,
            "place": range(num_rows),
        }
        for name, values in columns.items():
            self._columns[name].extend(values)
        self.row_ids.extend(rows.row_ids)
        self._shards.append(sealed.shard)

    def _check_files(self) -> None:
        sizes = self._folder.sizes()
        require_sizes(self._folder, self._shards, sizes, self.row_ids)
        # Beside an unfinished store such a file may be a shard that is being sealed right now.
        if self.complete and (foreign := unlisted_shards(sizes, self._shards)):
            raise foreign_shard(f"{self.path}/{foreign[0]}")

    def _sort_rows(self) -> None:
        order = natural_order(self.row_ids)
        for column in self._columns.values():
            column.reorder(order)
        self.row_ids = RowIds(self.row_ids[number] for number in order.tolist())
        # Equal ids are neighbours in any order of the ids.
        for row_id, following in pairwise(self.row_ids):
            if row_id == following:
                raise StoreError(f"{self.path}: row {row_id!r} is there twice, expected once; {REMEDY}")

    def _changed(self) -> StoreError:
        return StoreError(f"{self.path}: the store was repaired or replaced since it was opened; open it anew")

    def _rollout(self, shard: int, place: int) -> Rollout:
        first = self._cache.get((shard, 0))
        if first is not None and place < first.num_rows:
            # A small shard has one group: what is decoded needs no open file.
            return first.rollout(place)
        file = self._shard(shard)
        group, row = file.group_of(place)
        rows = self._cache.get((shard, group)) or self._cache.put((shard, group), file.read_group(group))
        return rows.rollout(row)

    def _shard(self, shard: int) -> ShardFile:
        if shard not in self._open_shards:
            self._open_shards[shard] = ShardFile(self._folder, self._shards[shard], self._state.store_id)
            if len(self._open_shards) > _MAX_OPEN_SHARDS:
                self._open_shards.popitem(last=False)[1].close()
        self._open_shards.move_to_end(shard)
        return self._open_shards[shard]


class _Cache:
    """Decoded row groups, the ones last used, in bounded memory."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self.size_bytes = max_bytes, 0
        self._groups: OrderedDict[tuple[int, int], RowGroup] = OrderedDict()

    def get(self, key: tuple[int, int]) -> RowGroup | None:
        if key in self._groups:
            self._groups.move_to_end(key)
        return self._groups.get(key)

    def put(self, key: tuple[int, int], rows: RowGroup) -> RowGroup:
        while self._groups and self.size_bytes + rows.size_bytes > self._max_bytes:
            self.size_bytes -= self._groups.popitem(last=False)[1].size_bytes
        self._groups[key] = rows
        self.size_bytes += rows.size_bytes
        return rows
