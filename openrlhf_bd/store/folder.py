"""Where a store's files lie: a local folder, with every guarantee, or any place that fsspec reaches (`remote`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Protocol

import pyarrow as pa

from openrlhf_bd.errors import RunFolderError
from openrlhf_bd.store.files import FolderLock, lock_holder, sync, write_bytes, writing

# A local folder, or a URL of fsspec such as s3://bucket/folder.
StorePath = Path | str

_LOCAL_PROTOCOLS = ("file://", "local://")


class Lock(Protocol):
    """The right to write to a folder."""

    def release(self) -> None:
        """Let the next writer in. Harmless when repeated."""


class StoreFolder(Protocol):
    """The files of one store, by name; all methods raise OSError where the place fails.

    After a method that writes has returned, what it wrote survives a crash of this machine (local folders: a power cut
    too). A file under its own name is whole.
    """

    @property
    def url(self) -> StorePath:
        """Where it is: a path, or a URL."""

    def __str__(self) -> str: ...

    def sizes(self) -> dict[str, int | None]:
        """Bytes of each file; None for folders. Empty where nothing is there.

        Raises:
            RunFolderError: a file is there in the place of the folder.
        """

    def size_bytes(self, name: str) -> int | None:
        """Bytes of a file; None where it is missing."""

    def read(self, name: str) -> bytes:
        """A whole file."""

    def open(self, name: str) -> IO[bytes] | pa.NativeFile:
        """A file for random access."""

    def lines(self, name: str, start: int) -> Iterator[bytes]:
        """Lines of a file from a position on, each with its line break but perhaps the last; none if it is missing."""

    def append(self, name: str, content: bytes, *, position: int) -> None:
        """Add to the end of a file, which begins with this if it is missing. What lies beyond `position` is dropped.

        Args:
            name: of the file.
            content: what to add.
            position: where the file's whole lines end: beyond it is what a crash left.
        """

    def fold(self, name: str) -> None:
        """Bring a file that was appended to into its best form for readers."""

    def replace(self, name: str, content: bytes) -> None:
        """Write a small file in one step: a reader sees the old content or the new."""

    def writing(self, name: str) -> AbstractContextManager[Path]:
        """A local path to write a file to; it takes its name when the block ends without an exception."""

    def remove(self, name: str) -> None:
        """Delete a file."""

    def move(self, name: str, target: str) -> None:
        """Move a file to a subfolder: `target` is "<folder>/<name>" and free."""

    def make(self) -> None:
        """Make the folder if it is missing."""

    def lock(self) -> Lock:
        """Become the one writer.

        Raises:
            RunFolderError: another one is writing; the message names it.
        """

    def lock_holder(self) -> str | None:
        """The process that is writing to the folder; None: no process is. Changes nothing."""


class LocalFolder:
    """A folder of this machine's file system."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    @property
    def url(self) -> Path:
        return self._path

    def sizes(self) -> dict[str, int | None]:
        if not self._path.exists():
            return {}
        if not self._path.is_dir():
            raise RunFolderError(f"{self._path}: found a file, expected a folder; name another path")
        with os.scandir(self._path) as entries:
            return {entry.name: None if entry.is_dir() else entry.stat().st_size for entry in entries}

    def size_bytes(self, name: str) -> int | None:
        path = self._path / name
        return path.stat().st_size if path.is_file() else None

    def read(self, name: str) -> bytes:
        return (self._path / name).read_bytes()

    def open(self, name: str) -> pa.NativeFile:
        return pa.OSFile(str(self._path / name))

    def lines(self, name: str, start: int) -> Iterator[bytes]:
        try:
            file = (self._path / name).open("rb")
        except FileNotFoundError:
            return
        with file:
            file.seek(start)
            yield from file

    def append(self, name: str, content: bytes, *, position: int) -> None:
        path = self._path / name
        is_new = not path.exists()
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            size_bytes = os.fstat(descriptor).st_size
            if size_bytes < position:
                raise OSError(f"{path}: {size_bytes} bytes, expected at least {position}; something else changed it")
            if size_bytes > position:
                os.ftruncate(descriptor, position)
            os.lseek(descriptor, position, os.SEEK_SET)
            while content:
                content = content[os.write(descriptor, content) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if is_new:
            sync(self._path)

    def fold(self, name: str) -> None:
        """One file is its best form."""

    def replace(self, name: str, content: bytes) -> None:
        write_bytes(self._path / name, content)

    def writing(self, name: str) -> AbstractContextManager[Path]:
        return writing(self._path / name)

    def remove(self, name: str) -> None:
        (self._path / name).unlink()

    def move(self, name: str, target: str) -> None:
        path = self._path / target
        path.parent.mkdir(exist_ok=True)
        (self._path / name).rename(path)

    def make(self) -> None:
        self._path.mkdir(parents=True, exist_ok=True)

    def lock(self) -> Lock:
        return FolderLock(self._path)

    def lock_holder(self) -> str | None:
        return lock_holder(self._path)


def open_folder(path: StorePath) -> StoreFolder:
    """The folder at a path or a URL. Nothing is read or made yet.

    Args:
        path: local path, or a URL of fsspec such as s3://bucket/folder.

    Raises:
        StoreError: no package for this protocol is installed, or the URL is malformed.
    """
    text = str(path)
    for protocol in _LOCAL_PROTOCOLS:
        text = text.removeprefix(protocol)
    if isinstance(path, Path) or not is_url(text):
        return LocalFolder(Path(text))
    # Imported where it is used: most stores are local.
    from openrlhf_bd.store.remote import RemoteFolder

    return RemoteFolder(text)


def is_url(path: str) -> bool:
    """Whether a store's path names a place that is reached through fsspec."""
    return "://" in path and not path.startswith(_LOCAL_PROTOCOLS)
