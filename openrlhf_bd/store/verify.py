"""Compare a store with what was sealed, byte by byte, and change nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from openrlhf_bd.store.folder import StoreFolder, StorePath, open_folder
from openrlhf_bd.store.journal import Journal
from openrlhf_bd.store.manifest import ShardEntry, StoreState
from openrlhf_bd.store.shard_file import damage, damaged, fault_of_size, is_whole


def verify_store(path: StorePath, *, on_progress: Callable[[], None] | None = None) -> None:
    """Compare every shard of a store with what was sealed (SHA-256).

    Args:
        path: of the store: a folder or a URL.
        on_progress: called for each shard that was compared.

    Raises:
        StoreError: no store is there, its lists are damaged, or shards are missing, cut or changed: the message names
            each of them, and its rows.
    """
    folder = open_folder(path)
    state, damages = StoreState.load(folder), []
    for entry, row_ids in _listed(folder, state):
        fault = fault_of_size(entry, folder.size_bytes(entry.file))
        if fault is None and not is_whole(folder, entry):
            fault = "its content is not what was sealed"
        if fault is not None:
            damages.append(damage(folder, entry, fault, row_ids))
        if on_progress is not None:
            on_progress()
    if damages:
        raise damaged(damages)


def _listed(folder: StoreFolder, state: StoreState) -> Iterator[tuple[ShardEntry, Sequence[str]]]:
    """Every shard that counts, with the ids of its rows where a list has them."""
    if state.listed is not None:
        yield from ((entry, ()) for entry in state.listed)
        return
    journal = Journal(folder)
    yield from ((sealed.shard, sealed.rows.row_ids) for sealed in journal.read())
    journal.require_lines_of(state)
