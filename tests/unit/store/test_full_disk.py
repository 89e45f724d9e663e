"""A disk without room: a real process on a real file system that is full, or with a limit on the size of files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.small_disk import NAMESPACE, can_mount

PAGE_BYTES = 4096


def fill_disks(folder: Path, kind: str, sizes: list[int]) -> list[dict[str, Any]]:
    """What the writer found on each disk, in order; it checked itself that with room every row came to be there."""
    script = [sys.executable, str(Path(__file__).with_name("full_disk_writer.py")), str(folder), kind]
    done = subprocess.run(
        [*(NAMESPACE if kind == "tmpfs" else ()), *script, *map(str, sizes)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def require_kept(found: dict[str, Any], folder: Path) -> None:
    """A disk that refused: the error names a file and the remedy, whole shards are kept, and nothing half-written."""
    assert f"{folder / str(found['size'])}/" in found["error"]
    assert "make room (or mend the disk) and run the same command again" in found["error"]
    assert len(found["sealed"]) in (0, 6, 12, 18, 20)
    assert not [name for name in found["files"] if name.endswith(".tmp")]


def test_disk_that_is_full_at_any_moment(tmp_path: Path) -> None:
    """From one page to more than enough: whatever write fails, the rows before it are safe, and the job goes on."""
    if not can_mount():
        pytest.skip("this machine lets nobody mount file systems of his own (unshare --user --mount)")
    *refused, enough = fill_disks(tmp_path, "tmpfs", [pages * PAGE_BYTES for pages in (*range(1, 12), 64)])
    for found in refused:
        require_kept(found, tmp_path)
        assert "No space left on device" in found["error"]
    # Every file of a store was once the one that did not fit.
    for name in ("manifest.json", "job.yaml", "shards.jsonl", "shard-00000.parquet", "shard-00001.parquet"):
        assert any(f"{name}: could not be written" in found["error"] for found in refused)
    assert all(len(less["sealed"]) <= len(more["sealed"]) for less, more in pairwise(refused))
    assert (enough["error"], len(enough["sealed"])) == (None, 20)


def test_limit_on_the_size_of_files(tmp_path: Path) -> None:
    """A limit below the manifest's size, and one below a shard's: as on a full disk."""
    for found in fill_disks(tmp_path, "limit", [500, 3000]):
        require_kept(found, tmp_path)
        assert "File too large" in found["error"]
        assert found["sealed"] == []
