"""Rows of an earlier run, compared with what was sealed, where a person waits for it."""

from __future__ import annotations

from openrlhf_bd.driver.progress import console, stage_progress
from openrlhf_bd.paths import format_bytes
from openrlhf_bd.store import verify_store
from openrlhf_bd.store.columns import is_shard_name
from openrlhf_bd.store.folder import StorePath, open_folder

# A smaller store is read within a second or two.
_SAID_FROM_BYTES = 10**9


def verify_rows(path: StorePath) -> None:
    """Compare every byte of a store with what was sealed, and say so where that takes a while.

    Raises:
        StoreError: see `verify_store`.
    """
    sizes = [size or 0 for name, size in open_folder(path).sizes().items() if is_shard_name(name)]
    if sum(sizes) < _SAID_FROM_BYTES:
        verify_store(path)
        return
    console.print(f"reading all {format_bytes(sum(sizes))} of {path} to see that they are whole", highlight=False)
    with stage_progress("check rows", len(sizes), "shards") as progress:
        verify_store(path, on_progress=progress.advance)
