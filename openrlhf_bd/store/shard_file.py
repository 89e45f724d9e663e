"""Sealed shards as they are read: checked when opened, decoded one row group at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from openrlhf_bd.errors import StoreError
from openrlhf_bd.records import Origin, RecordedSets, Rollout
from openrlhf_bd.store.columns import is_shard_name
from openrlhf_bd.store.files import sha256, sha256_parquet_footer
from openrlhf_bd.store.folder import StoreFolder
from openrlhf_bd.store.journal import SealedShard, ShardRows
from openrlhf_bd.store.manifest import REMEDY, ShardEntry
from openrlhf_bd.store.shards import STORE_ID_KEY, fault_of_origin, fault_of_sets, token_hash

# T response tokens of one row, S states with a set, M candidates, R rows of a row group.

# Memory of a decoded row group beside its arrays, and of each of its rows: what counts where shards are small.
_GROUP_BYTES, _ROW_BYTES = 16_384, 256

# Row ids that a message names of a damaged shard.
_SHOWN_IDS = 4

# What Arrow raises for bytes that are no Parquet, wrong checksums included.
_ARROW_ERRORS = (pa.ArrowException, OSError, UnicodeDecodeError)


def unlisted_shards(sizes: Mapping[str, int | None], shards: Iterable[ShardEntry]) -> list[str]:
    """Files of a folder that are named like shards, and that no line of the journal lists."""
    listed = {entry.file for entry in shards}
    return sorted(name for name in sizes if is_shard_name(name) and name not in listed)


def foreign_shard(path: str) -> StoreError:
    """The error for a shard that does not belong to the store in whose folder it lies."""
    return StoreError(
        f"{path}: the store does not list this shard; it was copied here from elsewhere. "
        "Its rows would not be read: move it out of the folder, by hand or by openrlhf-bd inspect PATH --repair, where "
        "PATH is the folder"
    )


def fault_of_size(entry: ShardEntry, size_bytes: int | None) -> str | None:
    """What is wrong with a shard that is missing, or longer or shorter than when it was sealed, in words; else None.

    Args:
        entry: the shard as it was sealed.
        size_bytes: of its file; None where it is missing.
    """
    if size_bytes is None:
        return "missing; the store lists it"
    if size_bytes != entry.size_bytes:
        return f"{size_bytes} bytes, expected {entry.size_bytes}; it was cut, overwritten or copied only in part"
    return None


def damage(folder: StoreFolder, entry: ShardEntry, fault: str, row_ids: Sequence[str] = ()) -> str:
    """A line that names a damaged shard and its rows, for `damaged`.

    Args:
        folder: of the store.
        entry: the shard as it was sealed.
        fault: what is wrong with it, in words.
        row_ids: of its rows, where they are known.
    """
    shown: Sequence[str] = row_ids
    if len(row_ids) > _SHOWN_IDS:
        shown = [*row_ids[: _SHOWN_IDS - 1], "...", row_ids[-1]]
    names = f": {', '.join(shown)}" if row_ids else ""
    return f"{folder}/{entry.file}: {fault} ({entry.num_rows} rows{names})"


def damaged(damages: Sequence[str]) -> StoreError:
    """The error for all damaged shards of a store, from their lines."""
    return StoreError("\n".join(damages) + f"\n{'For each: ' if len(damages) > 1 else ''}{REMEDY}")


def require_sizes(
    folder: StoreFolder, shards: Iterable[ShardEntry], sizes: Mapping[str, int | None], row_ids: Sequence[str] = ()
) -> None:
    """Refuse shards that are missing, or longer or shorter than when they were sealed.

    Args:
        folder: of the store.
        shards: as they were sealed.
        sizes: bytes of each file of the folder.
        row_ids: of all rows in the order of the shards, where they are known.

    Raises:
        StoreError: the message names each of them, and its rows.
    """
    damages, start = [], 0
    for entry in shards:
        end = start + entry.num_rows
        if fault := fault_of_size(entry, sizes.get(entry.file)):
            damages.append(damage(folder, entry, fault, row_ids[start:end]))
        start = end
    if damages:
        raise damaged(damages)


def is_whole(folder: StoreFolder, entry: ShardEntry) -> bool:
    """Whether a shard's bytes are those that were sealed."""
    try:
        with folder.open(entry.file) as file:
            return sha256(file) == entry.sha256
    except FileNotFoundError:
        return False


def shard_store_id(folder: StoreFolder, name: str) -> str | None:
    """The store that a Parquet file says it belongs to, or None if it says none or is no Parquet file."""
    try:
        with folder.open(name) as file:
            return _store_id(pq.read_schema(file))
    except _ARROW_ERRORS:
        return None


def _store_id(schema: pa.Schema) -> str | None:
    store_id = (schema.metadata or {}).get(STORE_ID_KEY)
    return None if store_id is None else store_id.decode(errors="replace")


class ShardFile:
    """An open shard."""

    def __init__(self, folder: StoreFolder, entry: ShardEntry, store_id: str) -> None:
        """Open a sealed shard and check that it is what the store lists.

        Raises:
            StoreError: it is missing, damaged, or a shard of another store.
        """
        require_sizes(folder, [entry], {entry.file: folder.size_bytes(entry.file)})
        self.path, self.entry = f"{folder}/{entry.file}", entry
        self._source = folder.open(entry.file)
        try:
            is_whole = sha256_parquet_footer(self._source) == entry.footer_sha256
            self._source.seek(0)
            self._file = pq.ParquetFile(self._source, page_checksum_verification=True)
            found = _store_id(self._file.schema_arrow)
        except _ARROW_ERRORS as error:
            raise self._damaged("all rows", error) from None
        if found not in (store_id, None):
            raise StoreError(
                f"{self.path}: a shard of store {found!r}, expected one of store {store_id!r} ({entry.num_rows} rows); "
                f"{REMEDY}"
            )
        if not is_whole:
            raise self._damaged("all rows", "its footer is not what was sealed")
        metadata = self._file.metadata
        self._group_sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._group_ends = np.cumsum(self._group_sizes)

    @property
    def num_groups(self) -> int:
        """Row groups."""
        return len(self._group_sizes)

    def group_of(self, row: int) -> tuple[int, int]:
        """The row group of a row of this file, and the row's place in it."""
        group = int(np.searchsorted(self._group_ends, row, side="right"))
        return group, row - int(self._group_ends[group] - self._group_sizes[group])

    def sealed(self) -> SealedShard:
        """The shard with the index of its rows, read from the file: what a journal would say.

        Raises:
            StoreError: these columns are damaged.
        """
        names = ["row_id", "prompt_length", "response_length", "num_states"]
        try:
            table = self._file.read(columns=names, use_threads=False)
            row_ids, *lengths = (table.column(name).to_pylist() for name in names)
        except _ARROW_ERRORS as error:
            raise self._damaged("all rows", error) from None
        if {len(row_ids), sum(self._group_sizes)} != {self.entry.num_rows}:
            raise self._damaged("all rows", f"{len(row_ids)} rows, expected {self.entry.num_rows}")
        rows = ShardRows(
            row_ids=row_ids,
            prompt_lengths=lengths[0],
            response_lengths=lengths[1],
            num_states=lengths[2],
        )
        return SealedShard(shard=self.entry, rows=rows)

    def read_group(self, group: int) -> RowGroup:
        """Decode one row group.

        Raises:
            StoreError: it is damaged; the message names its rows.
        """
        try:
            return RowGroup(self._file.read_row_group(group, use_threads=False), self.path)
        except _ARROW_ERRORS as error:
            end = int(self._group_ends[group])
            raise self._damaged(f"rows {end - self._group_sizes[group]} to {end - 1}", error) from None

    def close(self) -> None:
        """Close the file."""
        self._source.close()

    def _damaged(self, rows: str, finding: object) -> StoreError:
        return StoreError(f"{self.path}: damaged ({rows} of this file): {finding}; {REMEDY}")


class RowGroup:
    """Decoded rows: flat columns, from which rollouts are cut.

    Attributes:
        num_rows: R.
        size_bytes: memory that it takes.
    """

    def __init__(self, table: pa.Table, path: str | Path) -> None:
        self._path = path
        self.num_rows: int = table.num_rows
        self.size_bytes: int = table.nbytes + _GROUP_BYTES + _ROW_BYTES * self.num_rows
        self._row_ids: list[str] = table.column("row_id").to_pylist()
        self._finish_reasons: list[Any] = table.column("finish_reason").to_pylist()
        self._token_hashes: NDArray[np.uint64] = table.column("token_hash").to_numpy()
        self._teacher_hashes = _optional_column(table, "teacher_prompt_hash")
        self._teachers = _optional_column(table, "teacher")
        self._steps, self._sources = _optional_column(table, "step"), _optional_column(table, "source")
        self._versions = _optional_column(table, "policy_version")
        self._num_states: NDArray[np.int32] = table.column("num_states").to_numpy()
        self._lists = {
            field.name: _FlatLists(table.column(field.name)) for field in table.schema if pa.types.is_list(field.type)
        }

    def rollout(self, row: int) -> Rollout:
        """One row, its arrays its own: it does not keep the group in memory.

        Raises:
            StoreError: its ids do not give its hash, or its columns do not fit together.
        """
        row_id = self._row_ids[row]
        prompt_ids, response_ids = self._lists["prompt_ids"].row(row), self._lists["response_ids"].row(row)
        if token_hash(prompt_ids, response_ids) != self._token_hashes[row]:
            raise StoreError(f"{self._path}: row {row_id!r}: its token ids do not give its hash; {REMEDY}")
        reason = self._finish_reasons[row]
        if reason not in ("stop", "length"):
            raise StoreError(
                f"{self._path}: row {row_id!r}: finish reason {reason!r}, expected stop or length; {REMEDY}"
            )
        return Rollout(
            row_id=row_id,
            prompt_ids=prompt_ids,
            response_ids=response_ids,
            finish_reason=reason,
            logprobs_T=self._optional("response_logprobs", row),
            sets=self._sets(row, num_tokens=len(response_ids)) if self._num_states[row] else None,
            teacher_prompt_hash=None if self._teacher_hashes is None else self._teacher_hashes[row],
            teacher=None if self._teachers is None else self._teachers[row],
            origin=self._origin(row, num_tokens=len(response_ids)),
        )

    def _origin(self, row: int, *, num_tokens: int) -> Origin | None:
        if self._steps is None or self._sources is None or self._versions is None:
            return None
        origin = Origin(
            step=self._steps[row],
            source=self._sources[row],
            policy_version=self._versions[row],
            behaviour_logprobs_T=self._optional("behaviour_logprobs", row),
        )
        if fault := fault_of_origin(origin, num_tokens):
            raise StoreError(f"{self._path}: row {self._row_ids[row]!r}: found {fault}; {REMEDY}")
        return origin

    def _optional(self, name: str, row: int) -> NDArray[Any] | None:
        lists = self._lists.get(name)
        return None if lists is None or lists.is_null(row) else lists.row(row)

    def _sets(self, row: int, *, num_tokens: int) -> RecordedSets:
        # Stores of p = 1 have states and no ids: each set is the whole vocabulary.
        has_ids = "set_ids" in self._lists
        sets = self._listed_sets(row) if has_ids else RecordedSets.whole(int(self._num_states[row]))
        fault = fault_of_sets(sets, num_tokens, has_logprobs=sets.logprobs_M is not None)
        if fault:
            raise StoreError(f"{self._path}: row {self._row_ids[row]!r}: found {fault}; {REMEDY}")
        return sets

    def _listed_sets(self, row: int) -> RecordedSets:
        sizes_S, logprobs_M = self._lists["set_sizes"].row(row), self._optional("set_logprobs", row)
        return RecordedSets(
            ids_M=self._lists["set_ids"].row(row),
            offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes_S, dtype=np.int64)]),
            neg_log_mass_S=self._lists["neg_log_mass"].row(row).astype(np.float32),
            logprobs_M=None if logprobs_M is None else logprobs_M.astype(np.float32),
        )


def _optional_column(table: pa.Table, name: str) -> list[Any] | None:
    return table.column(name).to_pylist() if name in table.column_names else None


class _FlatLists:
    """A list column as one flat array and the rows' positions in it."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        lists = column.combine_chunks()
        self._offsets: NDArray[np.int32] = lists.offsets.to_numpy()
        self._values: NDArray[Any] = lists.values.to_numpy(zero_copy_only=False)
        self._is_null: NDArray[np.bool_] | None = (
            lists.is_null().to_numpy(zero_copy_only=False) if lists.null_count else None
        )

    def is_null(self, row: int) -> bool:
        return self._is_null is not None and bool(self._is_null[row])

    def row(self, row: int) -> NDArray[Any]:
        """A copy of the row's entries; none where the row is null."""
        return self._values[self._offsets[row] : self._offsets[row + 1]].copy()
