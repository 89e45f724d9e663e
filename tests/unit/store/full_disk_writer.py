"""A writer process whose disk has too little room, at first.

python full_disk_writer.py FOLDER tmpfs|limit SIZE_BYTES...

tmpfs: the disk is a file system of that size, which only this process sees; it needs a mount namespace of its own.
limit: no file that this process writes may be larger than that (RLIMIT_FSIZE).

For each size, in a folder of its own: writes 20 rows in shards of 6 until the disk refuses; prints the error, the rows
that are sealed and the files that lie there as a line of JSON; makes room, writes all rows again, and reads them.
"""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

from rows import assert_same_rollout, teacher_manifest, teacher_rows

from openrlhf_bd.errors import StoreError
from openrlhf_bd.store import StoreReader, StoreWriter, verify_store

ROOM_BYTES = 2**24
ROWS_PER_SHARD = 6


def main(folder: Path, kind: str, size_bytes: int) -> None:
    """One size; see above. An exception where the store is not what it should be."""
    set_size = _mount if kind == "tmpfs" else _limit
    folder.mkdir()
    set_size(folder, size_bytes)
    error = None
    try:
        _write(folder)
    except StoreError as refused:
        error = str(refused)
    files = sorted(path.name for path in folder.iterdir())
    sealed = list(StoreReader(folder, require_complete=False).row_ids) if "manifest.json" in files else []
    print(json.dumps({"size": size_bytes, "error": error, "sealed": sealed, "files": files}))
    whole = [f"shard-{number:05d}.parquet" for number in range(-(-len(sealed) // ROWS_PER_SHARD))]
    before = {name: (folder / name).read_bytes() for name in whole}

    set_size(folder, ROOM_BYTES)
    _write(folder)
    reader = StoreReader(folder)
    verify_store(reader.path)
    for row, expected in zip(reader.rollouts(range(20)), teacher_rows(), strict=True):
        assert_same_rollout(row, expected)
    assert all((folder / name).read_bytes() == before[name] for name in before)
    assert not list(folder.glob("*.tmp"))


def _write(folder: Path) -> None:
    with StoreWriter(folder, teacher_manifest(), rows_per_shard=ROWS_PER_SHARD) as writer:
        writer.keep_job("train: {seed: 1}\n")
        writer.append(teacher_rows())


def _mount(folder: Path, size_bytes: int) -> None:
    options = f"{'remount,' if os.path.ismount(folder) else ''}size={size_bytes}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)


def _limit(folder: Path, size_bytes: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))


if __name__ == "__main__":
    for size in map(int, sys.argv[3:]):
        main(Path(sys.argv[1]) / str(size), sys.argv[2], size)
