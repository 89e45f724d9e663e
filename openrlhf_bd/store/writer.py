"""Append rollouts to a store so that a crash at any moment loses at most the rows that were not sealed yet."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from openrlhf_bd.errors import RunFolderError, StoreError
from openrlhf_bd.records import Rollout
from openrlhf_bd.store.columns import RowIds, ShardTable, shard_name
from openrlhf_bd.store.files import LOCK_FILE, TEMPORARY_SUFFIX, sha256_file, sha256_parquet_footer
from openrlhf_bd.store.folder import StoreFolder, StorePath, open_folder
from openrlhf_bd.store.journal import JOURNAL_FILE, Journal, SealedShard, ShardRows
from openrlhf_bd.store.listing import list_again, sealed_shards
from openrlhf_bd.store.manifest import JOB_FILE, MANIFEST_FILE, QuarantinedRow, ShardEntry, StoreManifest, StoreState
from openrlhf_bd.store.order import natural_key
from openrlhf_bd.store.shard_file import foreign_shard, require_sizes, shard_store_id, unlisted_shards
from openrlhf_bd.store.shards import arrow_schema, check_rollout, write_shard

logger = logging.getLogger(__name__)


class StoreWriter:
    """The one writer of a store.

    Rows are buffered; each full buffer is sealed as a shard: temporary file, fsync, rename, fsync of the folder, then a
    line of the journal, and its fsync. Opening an unfinished store with an equal manifest continues it; appending a
    row that is there already does nothing, so a producer may repeat itself after a crash.

    As a context manager it marks the store complete at the end of the block. If an exception leaves the block, the
    rows so far are sealed and the store stays unfinished.
    """

    def __init__(self, path: StorePath, manifest: StoreManifest, rows_per_shard: int = 2048) -> None:
        """Open a new store, or continue an unfinished one.

        Args:
            path: folder of the store, or its URL; made if it is missing.
            manifest: what the rows will be.
            rows_per_shard: rows of one shard, and most rows that a crash can lose.

        Raises:
            RunFolderError: the folder holds another store (each differing key is listed) or other files, or another
                process is writing to it. Nothing was changed.
            StoreError: a sealed shard is missing or cut, the lists are damaged, or the folder can't be written.
        """
        if rows_per_shard < 1:
            raise ValueError(f"rows_per_shard is {rows_per_shard}, expected at least 1")
        self._folder = open_folder(path)
        self.path = self._folder.url
        self._rows_per_shard = rows_per_shard
        self._buffer: dict[str, Rollout] = {}
        self._journal, self._shards, self._sealed_ids = Journal(self._folder), ShardTable(), RowIds()
        try:
            _refuse_other_files(self._folder)
            self._folder.make()
            self._lock = self._folder.lock()
        except RunFolderError:
            raise
        except OSError as error:
            raise StoreError(f"{self.path}: can't be written: {error}; name another path") from error
        try:
            self._state = self._continue_or_create(manifest)
        except BaseException:
            self._lock.release()
            raise
        self._is_open = True
        self._quarantined = {row.row_id for row in self._state.quarantined}
        self._schema = arrow_schema(self._state.manifest, self._state.store_id)

    @property
    def manifest(self) -> StoreManifest:
        """What the rows are."""
        return self._state.manifest

    @property
    def complete(self) -> bool:
        """The store is finished; nothing more can be added."""
        return self._state.complete

    def completed_row_ids(self) -> frozenset[str]:
        """Ids of the sealed rows: those that need not be made again. Buffered rows are not among them.

        A set of a million ids takes 100 MB; `settled_rows` takes none.
        """
        return frozenset(self._sealed_ids)

    def settled_rows(self) -> Container[str]:
        """Ids of the rows that are sealed or were given up, also of those to come: they need not be made again."""
        return _Settled(self._sealed_ids, self._quarantined)

    def keep_job(self, options: str) -> None:
        """Keep the options of the job that began the store: what a repair repeats. Later ones change nothing.

        Raises:
            StoreError: the disk is full or failing.
        """
        self._require_open()
        try:
            if self._folder.size_bytes(JOB_FILE) is None:
                self._folder.replace(JOB_FILE, options.encode())
        except OSError as error:
            raise self._write_failed(JOB_FILE, error) from error

    def quarantined_row_ids(self) -> frozenset[str]:
        """Ids of the rows that were given up; the store is complete without them."""
        return frozenset(self._quarantined)

    def quarantine(self, row_id: str, reason: str) -> None:
        """Give a row up: the store is complete without it, and names it.

        Raises:
            ValueError: the row is there.
            StoreError: the disk is full or failing.
        """
        self._require_open()
        if row_id in self._sealed_ids or row_id in self._buffer:
            raise ValueError(f"{self.path}: row {row_id!r} is there, it cannot be quarantined")
        if row_id not in self._quarantined:
            row = QuarantinedRow(row_id=row_id, reason=reason)
            self._save(quarantined=(*self._state.quarantined, row))
            self._quarantined.add(row_id)

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
                    f"with {len(self._sealed_ids)} rows; write to another path"
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
                self._save(complete=True)
            self._fold_journal()
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
            if len(self._shards) != self._state.sealed_shards:
                self._save()
            self._fold_journal()
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
        sizes = self._folder.sizes()
        if MANIFEST_FILE not in sizes:
            self._remove_temporaries(sizes)
            state = StoreState(store_id=uuid.uuid4().hex, manifest=manifest)
            self._write_state(state)
            return state
        state = StoreState.load(self._folder)
        state.manifest.require_equal(manifest, self._folder)
        if state.manifest.versions != manifest.versions:
            logger.warning("%s: begun with versions %s, now %s", self.path, state.manifest.versions, manifest.versions)
        if state.listed is not None:
            state = self._with_journal(state)
        self._remove_temporaries(sizes)
        self._read_shards(state, sizes)
        self._remove_unlisted_shards(state, sizes)
        return state

    def _with_journal(self, state: StoreState) -> StoreState:
        shards = sealed_shards(self._folder, state, self._journal)
        try:
            return list_again(self._folder, state, shards, complete=state.complete)
        except OSError as error:
            raise self._write_failed(JOURNAL_FILE, error) from error

    def _read_shards(self, state: StoreState, sizes: Mapping[str, int | None]) -> None:
        for sealed in sealed_shards(self._folder, state, self._journal):
            self._shards.append(sealed.shard)
            self._sealed_ids.extend(sealed.rows.row_ids)
        require_sizes(self._folder, self._shards, sizes, self._sealed_ids)

    def _remove_temporaries(self, sizes: Mapping[str, int | None]) -> None:
        for name in sizes:
            if name.endswith(TEMPORARY_SUFFIX):
                self._folder.remove(name)

    def _remove_unlisted_shards(self, state: StoreState, sizes: Mapping[str, int | None]) -> None:
        # A crash between a shard's rename and the journal's line leaves a shard whose rows do not count yet.
        for name in unlisted_shards(sizes, self._shards):
            if shard_store_id(self._folder, name) != state.store_id:
                raise foreign_shard(f"{self._folder}/{name}")
            self._folder.remove(name)

    def _seal(self, rollouts: list[Rollout]) -> None:
        name = shard_name(self._shards.last_number + 1)
        rollouts = sorted(rollouts, key=lambda rollout: natural_key(rollout.row_id))
        try:
            with self._folder.writing(name) as path:
                write_shard(path, rollouts, self._schema)
                entry = _shard_entry(path, name, rollouts)
        except OSError as error:
            raise self._write_failed(name, error) from error
        rows = _shard_rows(rollouts, online=self._state.manifest.online)
        try:
            self._journal.append(SealedShard(shard=entry, rows=rows))
        except OSError as error:
            raise self._write_failed(JOURNAL_FILE, error) from error
        self._shards.append(entry)
        self._sealed_ids.extend(rows.row_ids)
        for row_id in rows.row_ids:
            del self._buffer[row_id]

    def _save(self, **changes: object) -> None:
        state = self._state.model_copy(update={"sealed_shards": len(self._shards), **changes})
        self._write_state(state)
        self._state = state

    def _write_state(self, state: StoreState) -> None:
        try:
            state.save(self._folder)
        except OSError as error:
            raise self._write_failed(MANIFEST_FILE, error) from error

    def _fold_journal(self) -> None:
        try:
            self._folder.fold(JOURNAL_FILE)
        except OSError as error:
            raise self._write_failed(JOURNAL_FILE, error) from error

    def _write_failed(self, name: str, error: OSError) -> StoreError:
        return StoreError(
            f"{self._folder}/{name}: could not be written: {error}. Rows sealed before are safe; "
            "make room (or mend the disk) and run the same command again to continue"
        )

    def _require_all_rows(self) -> None:
        expected = self._state.manifest.num_rows - len(self._state.quarantined)
        if (found := len(self._sealed_ids)) != expected:
            raise StoreError(
                f"{self.path}: {found} rows, expected {expected} ({self._state.manifest.num_rows_in_words}), "
                f"{len(self._state.quarantined)} quarantined; the store stays unfinished: "
                "run the same command again to make the missing rows"
            )

    def _require_open(self) -> None:
        if not self._is_open:
            raise ValueError(f"{self.path}: this writer is closed; open another one")

    def _release(self) -> None:
        self._is_open = False
        self._buffer.clear()
        self._lock.release()


@dataclass(frozen=True, slots=True)
class _Settled(Container[str]):
    sealed: RowIds
    quarantined: set[str]

    def __contains__(self, row_id: object) -> bool:
        return row_id in self.quarantined or row_id in self.sealed


def _refuse_other_files(folder: StoreFolder) -> None:
    names = folder.sizes().keys()
    if MANIFEST_FILE in names:
        return
    others = sorted(names - {LOCK_FILE, MANIFEST_FILE + TEMPORARY_SUFFIX})
    if others:
        raise RunFolderError(
            f"{folder}: the folder holds files that are no store ({', '.join(others[:5])}); expected a new or empty "
            "folder, or an unfinished store. Name another path; nothing was changed"
        )


def _shard_entry(written: Path, name: str, rollouts: Sequence[Rollout]) -> ShardEntry:
    sets = [rollout.sets for rollout in rollouts if rollout.sets is not None]
    with written.open("rb") as file:
        footer_sha256 = sha256_parquet_footer(file)
    return ShardEntry(
        file=name,
        num_rows=len(rollouts),
        num_prompt_tokens=sum(len(rollout.prompt_ids) for rollout in rollouts),
        num_response_tokens=sum(len(rollout.response_ids) for rollout in rollouts),
        num_states=sum(row.num_states for row in sets),
        num_candidates=int(np.sum([len(row.ids_M) for row in sets], dtype=np.int64)),
        size_bytes=written.stat().st_size,
        sha256=sha256_file(written),
        footer_sha256=footer_sha256,
    )


def _shard_rows(rollouts: Sequence[Rollout], *, online: bool) -> ShardRows:
    return ShardRows(
        row_ids=[rollout.row_id for rollout in rollouts],
        prompt_lengths=[len(rollout.prompt_ids) for rollout in rollouts],
        response_lengths=[len(rollout.response_ids) for rollout in rollouts],
        num_states=[rollout.sets.num_states if rollout.sets else 0 for rollout in rollouts],
        steps=[rollout.origin.step for rollout in rollouts if rollout.origin] if online else None,
    )
