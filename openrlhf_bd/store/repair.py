"""Take damaged shards out of a store, so that exactly their rows are made again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from openrlhf_bd.errors import StoreError
from openrlhf_bd.store.files import FolderLock, sha256_file
from openrlhf_bd.store.manifest import ShardEntry, StoreState
from openrlhf_bd.store.shard_file import unlisted_shards

DAMAGED_FOLDER = "damaged"


@dataclass(frozen=True, slots=True)
class Repair:
    """What was taken out of a store.

    Attributes:
        damaged: shards whose bytes are not those that were sealed, or that are missing.
        unlisted: files named like shards that the manifest does not list.
    """

    damaged: tuple[ShardEntry, ...]
    unlisted: tuple[str, ...]

    @property
    def num_rows(self) -> int:
        """Rows that must be made again."""
        return sum(entry.num_rows for entry in self.damaged)


def take_out_damaged(folder: Path) -> Repair:
    """Compare every shard with what was sealed (SHA-256), and take out those that differ.

    Their files, and files that the manifest does not list, go to `damaged/`; the manifest no longer lists them, and the
    store is unfinished where rows are missing. Whole shards stay as they are, byte for byte. The command that made the
    store then makes the missing rows.

    Args:
        folder: of the store.

    Raises:
        StoreError: no store is there, its manifest is damaged, or the folder cannot be written.
        RunFolderError: another process is writing to the store.
    """
    state = StoreState.load(folder)
    lock = FolderLock(folder)
    try:
        damaged = tuple(entry for entry in state.shards if not _is_whole(folder / entry.file, entry))
        unlisted = tuple(path.name for path in unlisted_shards(folder, state))
        if damaged:
            kept = tuple(entry for entry in state.shards if entry not in damaged)
            # First the manifest: a crash in between leaves unlisted files, which the next repair takes out.
            state.model_copy(update={"shards": kept, "complete": False}).save(folder)
        for name in (*(entry.file for entry in damaged), *unlisted):
            _move(folder, name)
    except OSError as error:
        raise StoreError(f"{folder}: could not be repaired: {error}; what was whole is as it was") from error
    finally:
        lock.release()
    return Repair(damaged, unlisted)


def _is_whole(path: Path, entry: ShardEntry) -> bool:
    try:
        return sha256_file(path) == entry.sha256
    except FileNotFoundError:
        return False


def _move(folder: Path, name: str) -> None:
    """Move a file to `damaged/`, under a name that is free there."""
    source = folder / name
    if not source.exists():
        return
    target = folder / DAMAGED_FOLDER
    target.mkdir(exist_ok=True)
    number = 0
    while (target / f"{name}.{number}").exists():
        number += 1
    source.rename(target / f"{name}.{number}")
