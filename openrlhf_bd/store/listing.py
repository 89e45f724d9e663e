"""Which shards a store has, wherever its format version lists them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from openrlhf_bd.store.folder import StoreFolder
from openrlhf_bd.store.journal import JOURNAL_FILE, Journal, SealedShard
from openrlhf_bd.store.manifest import FORMAT_VERSION, StoreState
from openrlhf_bd.store.shard_file import ShardFile, require_sizes


def sealed_shards(folder: StoreFolder, state: StoreState, journal: Journal) -> Iterator[SealedShard]:
    """All shards of a store, in the order in which they were sealed.

    Args:
        folder: of the store.
        state: its manifest.
        journal: of the store, not read yet.

    Raises:
        StoreError: the lists are damaged; in stores of format version 1, which have no journal, also a shard.
    """
    if state.listed is not None:
        require_sizes(folder, state.listed, folder.sizes())
        for entry in state.listed:
            yield ShardFile(folder, entry, state.store_id).sealed()
        return
    yield from journal.read()
    journal.require_lines_of(state)


def list_again(folder: StoreFolder, state: StoreState, shards: Iterable[SealedShard], *, complete: bool) -> StoreState:
    """Write the lists of a store anew, in the format version of today.

    Args:
        folder: of the store, locked.
        state: its manifest.
        shards: those that count from now on.
        complete: whether they are all that there will be.

    Returns:
        The new manifest.

    Raises:
        OSError: the disk is full or failing. If the journal was replaced and the manifest was not, a repair mends it.
    """
    lines = [sealed.line() for sealed in shards]
    changes = {"format_version": FORMAT_VERSION, "listed": None, "rewritten": state.rewritten + 1}
    state = state.model_copy(update=changes | {"sealed_shards": len(lines), "complete": complete})
    folder.replace(JOURNAL_FILE, b"".join(lines))
    state.save(folder)
    return state
