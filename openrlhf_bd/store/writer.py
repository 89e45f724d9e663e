"""Append rollouts to a store so that a crash at any moment loses at most the rows that were not sealed yet."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from openrlhf_bd.errors import RunFolderError, StoreError
from openrlhf_bd.records import Rollout
from openrlhf_bd.store.files import (
    LOCK_FILE,
    TEMPORARY_SUFFIX,
    FolderLock,
    seal,
    sha256_file,
    sha256_parquet_footer,
    temporary_name,
)
from openrlhf_bd.store.manifest import MANIFEST_FILE, QuarantinedRow, ShardEntry, StoreManifest, StoreState
from openrlhf_bd.store.order import natural_key
from openrlhf_bd.store.shard_file import (
    SHARD_GLOB,
    ShardFile,
    foreign_shard,
    next_shard_name,
    shard_store_id,
    unlisted_shards,
)
from openrlhf_bd.store.shards import arrow_schema, check_rollout, write_shard

logger = logging.getLogger(__name__)


class StoreWriter:
    """The one writer of a store.

    Rows are buffered; each full buffer is sealed as a shard: temporary file, fsync, rename, fsync of the folder, then
    the manifest in the same way. Opening an unfinished store with an equal manifest continues it; appending a row that
    is there already does nothing, so a producer may repeat itself after a crash.

    As a context manager it marks the store complete at the end of the block. If an exception leaves the block, the
    rows so far are sealed and the store stays unfinished.
    """

    def __init__(self, path: str | Path, manifest: StoreManifest, rows_per_shard: int = 2048) -> None:
        """Open a new store, or continue an unfinished one.

        Args:
            path: folder of the store; made if it is missing.
            manifest: what the rows will be.
            rows_per_shard: rows of one shard, and most rows that a crash can lose.

        Raises:
            RunFolderError: the folder holds another store (each differing key is listed) or other files, or another
                process is writing to it. Nothing was changed.
            StoreError: a sealed shard or the manifest is damaged, or the folder can't be written.
        """
        if rows_per_shard < 1:
            raise ValueError(f"rows_per_shard is {rows_per_shard}, expected at least 1")
        self.path = Path(path)
        self._rows_per_shard = rows_per_shard
        self._buffer: dict[str, Rollout] = {}
        _refuse_other_files(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(self.path)
        except RunFolderError:
            raise
        except OSError as error:
            raise StoreError(f"{self.path}: can't be written: {error}; name another path") from error
        try:
            self._state = self._continue_or_create(manifest)
            self._sealed_ids = self._read_sealed_ids()
        except BaseException:
            self._lock.release()
            raise
        self._is_open = True
        self._schema = arrow_schema(self._state.manifest, self._state.store_id)

    @property
    def complete(self) -> bool:
        """The store is finished; nothing more can be added."""
        return self._state.complete

    def completed_row_ids(self) -> frozenset[str]:
        """Ids of the sealed rows: those that need not be made again. Buffered rows are not among them."""
        return frozenset(self._sealed_ids)

    def quarantined_row_ids(self) -> frozenset[str]:
        """Ids of the rows that were given up; the store is complete without them."""
        return frozenset(row.row_id for row in self._state.quarantined)

    def quarantine(self, row_id: str, reason: str) -> None:
        """Give a row up: the store is complete without it, and names it.

        Raises:
            ValueError: the row is there.
            StoreError: the disk is full or failing.
        """
        self._require_open()
        if row_id in self._sealed_ids or row_id in self._buffer:
            raise ValueError(f"{self.path}: row {row_id!r} is there, it cannot be quarantined")
        if row_id not in self.quarantined_row_ids():
            row = QuarantinedRow(row_id=row_id, reason=reason)
            self._save(self._state.model_copy(update={"quarantined": (*self._state.quarantined, row)}))

    def append(self, rollouts: Sequence[Rollout]) -> int:
        """Add rows; those whose row_id is in the store already are dropped. Seals each full shard.

        The arrays are kept until they are sealed: don't change them afterwards.

        Returns:
            The number of rows that were new.

        Raises:
            ValueError: a row is malformed or not what the manifest promises; none of the rows was added.
            StoreError: a new row for a complete store, or the disk is full or failing.
        """
        self._require_open()
        for rollout in rollouts:
            check_rollout(rollout, self._state.manifest)
        num_new = 0
        for rollout in rollouts:
            if rollout.row_id in self._sealed_ids or rollout.row_id in self._buffer:
                continue
            if self.complete:
                raise StoreError(
                    f"{self.path}: row {rollout.row_id!r} is new, but the store is complete "
                    f"with {self._state.num_rows} rows; write to another path"
                )
            self._buffer[rollout.row_id] = rollout
            num_new += 1
        while len(self._buffer) >= self._rows_per_shard:
            self._seal(list(self._buffer.values())[: self._rows_per_shard])
        return num_new

    def flush(self) -> None:
        """Seal the buffered rows, as a smaller shard if need be.

        Raises:
            StoreError: the disk is full or failing.
        """
        self._require_open()
        if self._buffer:
            self._seal(list(self._buffer.values()))

    def close(self) -> None:
        """Seal the remainder, mark the store complete and let the next writer in. Harmless when repeated.

        Raises:
            StoreError: the store does not have the number of rows that its manifest promises (it stays unfinished,
                with all rows sealed), or the disk is full or failing.
        """
        if not self._is_open:
            return
        try:
            self.flush()
            if not self.complete:
                self._require_all_rows()
                self._save(self._state.model_copy(update={"complete": True}))
        finally:
            self._release()

    def suspend(self) -> None:
        """Seal the remainder and let the next writer in, without marking the store complete.

        Raises:
            StoreError: the disk is full or failing.
        """
        if not self._is_open:
            return
        try:
            self.flush()
        finally:
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        elif isinstance(error, StoreError):
            # The disk refused already: what it would say a second time must not hide the first error.
            self._release()
        else:
            self.suspend()

    def _continue_or_create(self, manifest: StoreManifest) -> StoreState:
        if not (self.path / MANIFEST_FILE).exists():
            self._remove_temporaries()
            self._save(StoreState(store_id=uuid.uuid4().hex, manifest=manifest))
            return self._state
        state = StoreState.load(self.path)
        state.manifest.require_equal(manifest, self.path)
        if state.manifest.versions != manifest.versions:
            logger.warning("%s: begun with versions %s, now %s", self.path, state.manifest.versions, manifest.versions)
        self._remove_temporaries()
        self._remove_unlisted_shards(state)
        return state

    def _remove_temporaries(self) -> None:
        for name in (SHARD_GLOB, MANIFEST_FILE):
            for leftover in self.path.glob(name + TEMPORARY_SUFFIX):
                leftover.unlink()

    def _remove_unlisted_shards(self, state: StoreState) -> None:
        # A crash between a shard's rename and the manifest's leaves a shard whose rows do not count yet.
        for path in unlisted_shards(self.path, state):
            if shard_store_id(path) != state.store_id:
                raise foreign_shard(path)
            path.unlink()

    def _read_sealed_ids(self) -> set[str]:
        return {
            row_id
            for entry in self._state.shards
            for row_id in ShardFile(self.path, entry, self._state.store_id).index().row_ids
        }

    def _seal(self, rollouts: list[Rollout]) -> None:
        path = self.path / next_shard_name(self._state)
        rollouts = sorted(rollouts, key=lambda rollout: natural_key(rollout.row_id))
        try:
            write_shard(temporary_name(path), rollouts, self._schema)
            entry = _shard_entry(temporary_name(path), path.name, rollouts)
            seal(path)
        except OSError as error:
            raise self._write_failed(path, error) from error
        self._save(self._state.model_copy(update={"shards": (*self._state.shards, entry)}))
        for rollout in rollouts:
            del self._buffer[rollout.row_id]
            self._sealed_ids.add(rollout.row_id)

    def _save(self, state: StoreState) -> None:
        try:
            state.save(self.path)
        except OSError as error:
            raise self._write_failed(self.path / MANIFEST_FILE, error) from error
        self._state = state

    def _write_failed(self, path: Path, error: OSError) -> StoreError:
        return StoreError(
            f"{path}: could not be written: {error}. Rows sealed before are safe; "
            "make room (or mend the disk) and run the same command again to continue"
        )

    def _require_all_rows(self) -> None:
        expected = self._state.manifest.num_rows - len(self._state.quarantined)
        if (found := self._state.num_rows) != expected:
            raise StoreError(
                f"{self.path}: {found} rows, expected {expected} ({self._state.manifest.num_prompts} prompts with "
                f"{self._state.manifest.n_samples_per_prompt} responses each), {len(self._state.quarantined)} "
                "quarantined; the store stays unfinished: "
                "run the same command again to make the missing rows"
            )

    def _require_open(self) -> None:
        if not self._is_open:
            raise ValueError(f"{self.path}: this writer is closed; open another one")

    def _release(self) -> None:
        self._is_open = False
        self._buffer.clear()
        self._lock.release()


def _refuse_other_files(folder: Path) -> None:
    if not folder.exists() or (folder / MANIFEST_FILE).exists():
        return
    if not folder.is_dir():
        raise RunFolderError(f"{folder}: found a file, expected a folder; name another path")
    ours = {LOCK_FILE, MANIFEST_FILE + TEMPORARY_SUFFIX}
    others = sorted(entry.name for entry in folder.iterdir() if entry.name not in ours)
    if others:
        raise RunFolderError(
            f"{folder}: the folder holds files that are no store ({', '.join(others[:5])}); expected a new or empty "
            "folder, or an unfinished store. Name another path; nothing was changed"
        )


def _shard_entry(written: Path, name: str, rollouts: Sequence[Rollout]) -> ShardEntry:
    sets = [rollout.sets for rollout in rollouts if rollout.sets is not None]
    return ShardEntry(
        file=name,
        num_rows=len(rollouts),
        num_prompt_tokens=sum(len(rollout.prompt_ids) for rollout in rollouts),
        num_response_tokens=sum(len(rollout.response_ids) for rollout in rollouts),
        num_states=sum(row.num_states for row in sets),
        num_candidates=int(np.sum([len(row.ids_M) for row in sets], dtype=np.int64)),
        size_bytes=written.stat().st_size,
        sha256=sha256_file(written),
        footer_sha256=sha256_parquet_footer(written),
    )
