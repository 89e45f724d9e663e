"""Files that are whole or absent after a crash, and one writer to a folder at a time."""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
from pathlib import Path

from openrlhf_bd.errors import RunFolderError

LOCK_FILE = ".lock"
TEMPORARY_SUFFIX = ".tmp"


def temporary_name(path: Path) -> Path:
    """Where a file is written before it takes its name: the same folder, since a rename can't leave a file system."""
    return path.with_name(path.name + TEMPORARY_SUFFIX)


def seal(path: Path) -> None:
    """Give the finished temporary file of `path` its own name; after return it survives a power cut.

    The order matters: content first (fsync), then the name (replace), then the folder that holds the name (fsync).

    Raises:
        OSError: the disk is full or failing; `path` is as it was before.
    """
    temporary = temporary_name(path)
    _fsync(temporary)
    os.replace(temporary, path)
    _fsync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace a small text file in one step: a reader sees the old content or the new.

    Raises:
        OSError: as `seal`.
    """
    temporary_name(path).write_text(text, encoding="utf-8")
    seal(path)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal.

    Raises:
        OSError: the file is missing or can't be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_parquet_footer(path: Path) -> str:
    """SHA-256 of a Parquet file's footer: the length in its last 8 bytes, and so many bytes before them.

    Raises:
        OSError: the file is missing or can't be read.
    """
    with path.open("rb") as file:
        size_bytes = file.seek(0, os.SEEK_END)
        file.seek(max(size_bytes - 8, 0))
        # A damaged length gives other bytes, and so another hash.
        footer_bytes = int.from_bytes(file.read(4), "little") + 8
        file.seek(max(size_bytes - footer_bytes, 0))
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class FolderLock:
    """The right to write to a folder, held until `release` or the end of the process, however that comes."""

    def __init__(self, folder: Path) -> None:
        """Take the lock.

        Raises:
            RunFolderError: another process (or another writer of this one) holds it; the message names it.
        """
        # The file stays when the lock is released: removing it could take it from under the next holder.
        self._file = (folder / LOCK_FILE).open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            self._file.close()
            raise RunFolderError(
                f"{folder}: process {holder} is writing to this store, and a store has one writer at a time; "
                "wait for it to end, or name another path"
            ) from None
        self._file.seek(0)
        self._file.truncate()
        self._file.write(f"{os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def release(self) -> None:
        """Let the next writer in. Harmless when repeated."""
        self._file.close()
