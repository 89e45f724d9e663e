"""Sealed shards as they are read: checked when opened, decoded one row group at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from openrlhf_bd.errors import StoreError
from openrlhf_bd.records import RecordedSets, Rollout
from openrlhf_bd.store.files import sha256_parquet_footer
from openrlhf_bd.store.manifest import ShardEntry, StoreState
from openrlhf_bd.store.shards import REMEDY, STORE_ID_KEY, fault_of_sets, token_hash

# T response tokens of one row, S states with a set, M candidates, R rows of a row group.

SHARD_GLOB = "shard-*.parquet"
# What Arrow raises for bytes that are no Parquet, wrong checksums included.
_ARROW_ERRORS = (pa.ArrowException, OSError, UnicodeDecodeError)


def next_shard_name(state: StoreState) -> str:
    """Name of the next shard: numbers go on from the last, even where a repair took one out."""
    number = 1 + max((int(entry.file.removeprefix("shard-").split(".")[0]) for entry in state.shards), default=-1)
    return f"shard-{number:05d}.parquet"


def unlisted_shards(folder: Path, state: StoreState) -> list[Path]:
    """Files named like shards that the manifest does not list."""
    listed = {entry.file for entry in state.shards}
    return sorted(path for path in folder.glob(SHARD_GLOB) if path.name not in listed)


def foreign_shard(path: Path) -> StoreError:
    """The error for a shard that does not belong to the store in whose folder it lies."""
    return StoreError(
        f"{path}: the store's manifest does not list this shard; it was copied here from elsewhere. "
        "Move it out of the folder: its rows would not be read"
    )


def check_size(folder: Path, entry: ShardEntry) -> None:
    """Refuse a shard that is missing, or longer or shorter than when it was sealed.

    Raises:
        StoreError: the message names the file.
    """
    path = folder / entry.file
    if not path.is_file():
        raise StoreError(f"{path}: missing; the manifest lists it with {entry.num_rows} rows; {REMEDY}")
    size_bytes = path.stat().st_size
    if size_bytes != entry.size_bytes:
        raise StoreError(
            f"{path}: {size_bytes} bytes, expected {entry.size_bytes} ({entry.num_rows} rows); "
            f"it was cut, overwritten or copied only in part; {REMEDY}"
        )


def shard_store_id(path: Path) -> str | None:
    """The store that a Parquet file says it belongs to, or None if it says none or is no Parquet file."""
    try:
        metadata = pq.read_schema(path).metadata or {}
    except _ARROW_ERRORS:
        return None
    store_id = metadata.get(STORE_ID_KEY)
    return None if store_id is None else store_id.decode(errors="replace")


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """What is known of a shard's rows without reading their tokens. One entry a row, in the shard's order."""

    row_ids: list[str]
    prompt_lengths: NDArray[np.int32]
    response_lengths: NDArray[np.int32]
    num_states: NDArray[np.int32]
    group_sizes: NDArray[np.int64]


class ShardFile:
    """An open shard."""

    def __init__(self, folder: Path, entry: ShardEntry, store_id: str) -> None:
        """Open a sealed shard and check that it is what the manifest lists.

        Raises:
            StoreError: it is missing, damaged, or a shard of another store.
        """
        check_size(folder, entry)
        self.path, self.entry = folder / entry.file, entry
        found = shard_store_id(self.path)
        if found not in (store_id, None):
            raise StoreError(
                f"{self.path}: a shard of store {found!r}, expected one of store {store_id!r}; "
                "put the store's own file back, or generate the data again at another path"
            )
        if sha256_parquet_footer(self.path) != entry.footer_sha256:
            raise self._damaged("all rows", "its footer is not what was sealed")
        self._file = pq.ParquetFile(self.path, page_checksum_verification=True)

    def index(self) -> ShardIndex:
        """Row ids and lengths.

        Raises:
            StoreError: these columns are damaged.
        """
        names = ["row_id", "prompt_length", "response_length", "num_states"]
        try:
            table = self._file.read(columns=names, use_threads=False)
            row_ids = table.column("row_id").to_pylist()
        except _ARROW_ERRORS as error:
            raise self._damaged("all rows", error) from None
        metadata = self._file.metadata
        group_sizes = np.array(
            [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)], np.int64
        )
        if len(row_ids) != self.entry.num_rows or group_sizes.sum() != self.entry.num_rows:
            raise self._damaged("all rows", f"{len(row_ids)} rows, expected {self.entry.num_rows}")
        return ShardIndex(
            row_ids=row_ids,
            prompt_lengths=table.column("prompt_length").to_numpy(),
            response_lengths=table.column("response_length").to_numpy(),
            num_states=table.column("num_states").to_numpy(),
            group_sizes=group_sizes,
        )

    def read_group(self, group: int) -> RowGroup:
        """Decode one row group.

        Raises:
            StoreError: it is damaged; the message names its rows.
        """
        try:
            return RowGroup(self._file.read_row_group(group, use_threads=False), self.path)
        except _ARROW_ERRORS as error:
            sizes = [self._file.metadata.row_group(before).num_rows for before in range(group + 1)]
            raise self._damaged(f"rows {sum(sizes[:-1])} to {sum(sizes) - 1}", error) from None

    def _damaged(self, rows: str, finding: object) -> StoreError:
        return StoreError(f"{self.path}: damaged ({rows} of this file): {finding}; {REMEDY}")


class RowGroup:
    """Decoded rows: flat columns, from which rollouts are cut.

    Attributes:
        num_rows: R.
        size_bytes: memory that it takes.
    """

    def __init__(self, table: pa.Table, path: Path) -> None:
        self._path = path
        self.num_rows: int = table.num_rows
        self.size_bytes: int = table.nbytes
        self._row_ids: list[str] = table.column("row_id").to_pylist()
        self._finish_reasons: list[Any] = table.column("finish_reason").to_pylist()
        self._token_hashes: NDArray[np.uint64] = table.column("token_hash").to_numpy()
        self._teacher_hashes = _optional_column(table, "teacher_prompt_hash")
        self._teachers = _optional_column(table, "teacher")
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
        )

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
