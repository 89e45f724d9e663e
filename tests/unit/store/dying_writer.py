"""Processes that end without any clean-up between two operations on files, one after another: at each there is.

python dying_writer.py ROOT write|repair|upload

Process k works on ROOT/k and dies right before its k-th operation; where that writes bytes, after half of them. The
last one has no k-th operation and ends by itself. `repair` finds a store with a damaged shard in each folder; `upload`
writes through fsspec, as to an object store, and dies before requests.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fsspec.implementations.dirfs import DirFileSystem
from rows import teacher_manifest, teacher_rows

from openrlhf_bd.store import StoreWriter
from openrlhf_bd.store.repair import take_out_damaged

EXIT_AT_FAULT = 91
OPERATIONS = ("replace", "fsync", "write", "ftruncate", "rename", "unlink")
REQUESTS = ("put_file", "pipe_file", "rm_file")


def upload(folder: Path) -> None:
    """As `write`, to a URL behind which the folder lies."""
    write(f"dir::file://{folder}")


def write(folder: Path | str) -> None:
    """Write 20 rows in shards of 6, and give one row up."""
    with StoreWriter(folder, teacher_manifest(), rows_per_shard=6) as writer:
        writer.quarantine("train:9:1", "it died")
        for row in teacher_rows()[:-1]:
            writer.append([row])


def die_at(fatal: int, owner: Any, names: tuple[str, ...]) -> None:
    """Make the process end at the fatal-th call of the owner's functions, counted from 1."""
    num_operations = 0

    def dying(operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            nonlocal num_operations
            num_operations += 1
            if num_operations == fatal:
                if operation is write_bytes:
                    descriptor, content = arguments
                    write_bytes(descriptor, content[: len(content) // 2])
                os._exit(EXIT_AT_FAULT)
            return operation(*arguments, **options)

        return run

    write_bytes = os.write
    for name in names:
        setattr(owner, name, dying(getattr(owner, name)))


def main(root: Path, action: Callable[[Path], object]) -> None:
    """Fork processes until one ends by itself."""
    fatal, status = 0, EXIT_AT_FAULT
    while status == EXIT_AT_FAULT:
        fatal += 1
        child = os.fork()
        if child == 0:
            if action is upload:
                die_at(fatal, DirFileSystem, REQUESTS)
            else:
                die_at(fatal, os, OPERATIONS)
            action(root / str(fatal))
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0, f"process {fatal} ended with {status}"


if __name__ == "__main__":
    main(Path(sys.argv[1]), {"write": write, "repair": take_out_damaged, "upload": upload}[sys.argv[2]])
