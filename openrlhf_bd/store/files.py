"""Files that are whole or absent after a crash, and one writer to a folder at a time."""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import pyarrow as pa

from openrlhf_bd.errors import RunFolderError

LOCK_FILE = ".lock"
TEMPORARY_SUFFIX = ".tmp"
CHUNK_BYTES = 2**20


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
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace a small text file in one step: a reader sees the old content or the new.

    Raises:
        OSError: as `seal`; the message names the file.
    """
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """As `write_text`, of bytes."""
    with writing(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A path to write a file to; when the block ends it is sealed as `path`.

    Raises:
        OSError: as `seal`; the message names the file.
    """
    temporary = temporary_name(path)
    try:
        yield temporary
        seal(path)
    except OSError as error:
        # On a full disk what was written of it only takes room.
        with suppress(OSError):
            temporary.unlink()
        if error.filename is not None or error.errno is None:
            raise
        # Of a write that fails the system names no file.
        raise OSError(error.errno, error.strerror, str(path)) from error


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal.

    Raises:
        OSError: the file is missing or can't be read.
    """
    with path.open("rb") as file:
        return sha256(file)


def sha256(file: IO[bytes] | pa.NativeFile) -> str:
    """SHA-256 of what an open file holds from here on, hexadecimal."""
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def sha256_parquet_footer(file: IO[bytes] | pa.NativeFile) -> str:
    """SHA-256 of a Parquet file's footer: the length in its last 8 bytes, and so many bytes before them."""
    file.seek(0, os.SEEK_END)
    size_bytes = file.tell()
    file.seek(max(size_bytes - 8, 0))
    # A damaged length gives other bytes, and so another hash.
    footer_bytes = int.from_bytes(file.read(4), "little") + 8
    file.seek(max(size_bytes - footer_bytes, 0))
    return sha256(file)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def second_writer(folder: object, holder: str) -> RunFolderError:
    """The error of a process that would write to a store while another one does."""
    return RunFolderError(
        f"{folder}: process {holder} is writing to this store, and a store has one writer at a time; "
        "wait for it to end, or name another path"
    )


def lock_holder(folder: Path) -> str | None:
    """The process that is writing to a folder, as its lock names it; None: no process is. Changes nothing."""
    try:
        file = (folder / LOCK_FILE).open(encoding="utf-8")
    except FileNotFoundError:
        return None
    with file:
        try:
            # Shared: two processes that only look do not see each other.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read().strip() or "unknown"
    return None


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
            raise second_writer(folder, holder) from None
        self._file.seek(0)
        self._file.truncate()
        self._file.write(f"{os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def release(self) -> None:
        """Let the next writer in. Harmless when repeated."""
        self._file.close()
