"""Take damaged shards out of a store, so that exactly their rows are made again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from openrlhf_bd.errors import StoreError
from openrlhf_bd.store.folder import StoreFolder, StorePath, open_folder
from openrlhf_bd.store.journal import Journal, SealedShard
from openrlhf_bd.store.listing import list_again
from openrlhf_bd.store.manifest import ShardEntry, StoreState
from openrlhf_bd.store.shard_file import ShardFile, is_whole, unlisted_shards

DAMAGED_FOLDER = "damaged"


@dataclass(frozen=True, slots=True)
class Repair:
    """What was taken out of a store.

    Attributes:
        damaged: shards whose bytes are not those that were sealed, or that are missing.
        unlisted: files named like shards that the store does not list.
    """

    damaged: tuple[ShardEntry, ...]
    unlisted: tuple[str, ...]

    @property
    def num_rows(self) -> int:
        """Rows that must be made again."""
        return sum(entry.num_rows for entry in self.damaged)


def take_out_damaged(path: StorePath) -> Repair:
    """Compare every shard with what was sealed (SHA-256), and take out those that differ.

    Their files, and files that the store does not list, go to `damaged/`; the journal no longer lists them, and the
    store is unfinished where rows are missing. A line of the journal that is damaged counts as not there. Whole shards
    stay as they are, byte for byte. The command that made the store then makes the missing rows.

    Args:
        path: of the store: a folder or a URL.

    Raises:
        StoreError: no store is there, its manifest is damaged, or the folder cannot be written.
        RunFolderError: another process is writing to the store.
    """
    folder = open_folder(path)
    state = StoreState.load(folder)
    lock = folder.lock()
    try:
        listed, lists_are_whole = _listed(folder, state)
        damaged = [entry for entry in listed if not is_whole(folder, entry)]
        unlisted = unlisted_shards(folder.sizes(), listed)
        # First the lists: a crash in between leaves unlisted files, which the next repair takes out.
        if damaged or not lists_are_whole:
            taken = {entry.file for entry in damaged}
            kept = [entry for entry in listed if entry.file not in taken]
            list_again(folder, state, _sealed(folder, state, kept), complete=False)
        for name in (*(entry.file for entry in damaged), *unlisted):
            _move(folder, name)
    except OSError as error:
        raise StoreError(f"{folder}: could not be repaired: {error}; what was whole is as it was") from error
    finally:
        lock.release()
    return Repair(tuple(damaged), tuple(unlisted))


def _listed(folder: StoreFolder, state: StoreState) -> tuple[list[ShardEntry], bool]:
    """The shards of whole lines, and whether these are all that the store had."""
    if state.listed is not None:
        return list(state.listed), True
    journal = Journal(folder)
    listed = [sealed.shard for sealed in journal.read(skip_damaged=True)]
    return listed, len(listed) == journal.num_lines and journal.fault(state) is None


def _sealed(folder: StoreFolder, state: StoreState, kept: Sequence[ShardEntry]) -> Iterator[SealedShard]:
    if state.listed is not None:
        yield from (ShardFile(folder, entry, state.store_id).sealed() for entry in kept)
        return
    names = {entry.file for entry in kept}
    yield from (sealed for sealed in Journal(folder).read(skip_damaged=True) if sealed.shard.file in names)


def _move(folder: StoreFolder, name: str) -> None:
    """Move a file to `damaged/`, under a name that is free there."""
    if folder.size_bytes(name) is None:
        return
    number = 0
    while folder.size_bytes(f"{DAMAGED_FOLDER}/{name}.{number}") is not None:
        number += 1
    folder.move(name, f"{DAMAGED_FOLDER}/{name}.{number}")
