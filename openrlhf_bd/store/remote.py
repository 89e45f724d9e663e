"""A store at any place that fsspec reaches: s3://, gs://, abfs://, hdfs://, memory://, and others.

Object stores make a file whole or not at all when it is uploaded, but they neither append nor lock. So a shard is
written on this machine and uploaded under its own name; each addition to the journal is a file of its own until the
writer closes; and the lock is a file that names its writer.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import fsspec
import pyarrow as pa
from fsspec.spec import AbstractFileSystem

from openrlhf_bd.errors import RunFolderError, StoreError
from openrlhf_bd.store.files import LOCK_FILE

# Files up to this size are read in one request; of larger ones this much is read ahead.
_READ_BYTES = 2**20
_BATCH = 256


class RemoteFolder:
    """A folder behind a URL.

    A file F that is appended to is F itself and then the files F.<position>, each named by the bytes before it.
    """

    def __init__(self, url: str) -> None:
        """Find the file system of a URL.

        Raises:
            StoreError: its package is not installed, or the URL is malformed.
        """
        self._url = url.rstrip("/")
        try:
            self._files, root = fsspec.core.url_to_fs(self._url)
        except (ImportError, ValueError) as error:
            raise StoreError(
                f"{url}: cannot be reached: {error}. Install the package of fsspec for this protocol, or name a folder"
            ) from error
        self._root = root.rstrip("/")

    def __str__(self) -> str:
        return self._url

    @property
    def url(self) -> str:
        return self._url

    def sizes(self) -> dict[str, int | None]:
        self._files.invalidate_cache()
        try:
            entries = self._files.ls(self._root, detail=True)
        except FileNotFoundError:
            return {}
        if [entry["name"] for entry in entries if entry["type"] == "file"] == [self._root]:
            raise RunFolderError(f"{self}: found a file, expected a folder; name another path")
        return {
            entry["name"].rstrip("/").rsplit("/", 1)[-1]: None if entry["type"] == "directory" else entry["size"]
            for entry in entries
        }

    def size_bytes(self, name: str) -> int | None:
        self._files.invalidate_cache()
        try:
            size: int = self._files.info(self._path(name))["size"]
        except FileNotFoundError:
            return None
        return size

    def read(self, name: str) -> bytes:
        content: bytes = self._files.cat_file(self._path(name))
        return content

    def open(self, name: str) -> IO[bytes] | pa.NativeFile:
        if (self.size_bytes(name) or 0) <= _READ_BYTES:
            return pa.BufferReader(self.read(name))
        file: IO[bytes] = self._files.open(self._path(name), "rb", block_size=_READ_BYTES)
        return file

    def lines(self, name: str, start: int) -> Iterator[bytes]:
        for content in self._parts(name, start):
            yield from content.splitlines(keepends=True)

    def append(self, name: str, content: bytes, *, position: int) -> None:
        self._files.pipe_file(self._path(_part(name, position)), content)

    def fold(self, name: str) -> None:
        """Make one file of a file and its additions. A reader that comes in between sees the same lines."""
        if parts := self._part_names(name):
            self._files.pipe_file(self._path(name), b"".join(self._parts(name, 0)))
            for part in parts:
                self.remove(part)

    def replace(self, name: str, content: bytes) -> None:
        # Additions left beside a shorter file could be taken for its own.
        self.fold(name)
        self._files.pipe_file(self._path(name), content)

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="openrlhf_bd_store_") as folder:
            path = Path(folder) / name
            yield path
            self._files.put_file(str(path), self._path(name))

    def remove(self, name: str) -> None:
        self._files.rm_file(self._path(name))

    def move(self, name: str, target: str) -> None:
        self._files.makedirs(self._path(target).rsplit("/", 1)[0], exist_ok=True)
        self._files.mv(self._path(name), self._path(target))

    def make(self) -> None:
        self._files.makedirs(self._root, exist_ok=True)

    def lock(self) -> RemoteLock:
        return RemoteLock(self, self._files, self._path(LOCK_FILE))

    def lock_holder(self) -> str | None:
        holder = _holder_of(self._files, self._path(LOCK_FILE))
        return None if holder is None or _is_dead(holder) else _name(holder)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _part_names(self, name: str) -> list[str]:
        return sorted(found for found in self.sizes() if found.startswith(f"{name}."))

    def _parts(self, name: str, start: int) -> Iterator[bytes]:
        """The content of a file and its additions from a position on."""
        # Who reads from the start reads much: then many requests at a time are worth a listing.
        ahead = self._read_all(self._part_names(name)) if start == 0 else {}
        position = start
        while True:
            if (self.size_bytes(name) or 0) > position:
                content = self.read(name)[position:]
            else:
                part = _part(name, position)
                try:
                    content = ahead.pop(part) if part in ahead else self.read(part)
                except FileNotFoundError:
                    return
            yield content
            position += len(content)

    def _read_all(self, names: list[str]) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        for start in range(0, len(names), _BATCH):
            paths = {self._path(name): name for name in names[start : start + _BATCH]}
            contents = self._files.cat(list(paths), on_error="omit")
            found |= {path.rsplit("/", 1)[-1]: content for path, content in contents.items()}
        return found


def _part(name: str, position: int) -> str:
    return f"{name}.{position:016d}"


class RemoteLock:
    """The right to write to a folder, as a file there that names the writer.

    It outlives a writer that is killed. The next one of the same machine sees that the process is dead, and takes over;
    on another machine somebody has to remove it.
    """

    def __init__(self, folder: RemoteFolder, files: AbstractFileSystem, path: str) -> None:
        """Take the lock.

        Raises:
            RunFolderError: another process holds it, or may hold it; the message names it.
        """
        self._files, self._path = files, path
        self._holder = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "node": uuid.getnode(),
            "id": uuid.uuid4().hex,
        }
        holder = _holder_of(files, path)
        if holder is not None and _is_dead(holder):
            files.rm_file(path)
        # Not every protocol creates a file only where none is, so who wrote last is asked once more.
        with suppress(FileExistsError):
            files.pipe_file(path, json.dumps(self._holder).encode(), mode="create")
        holder = _holder_of(files, path)
        if holder != self._holder:
            raise RunFolderError(
                f"{folder}: process {_name(holder or {})} is writing to this store, and a store has one writer at a "
                f"time; wait for it to end, or name another path. If it is dead, remove {folder}/{LOCK_FILE}"
            )

    def release(self) -> None:
        """Let the next writer in. Harmless when repeated."""
        if _holder_of(self._files, self._path) == self._holder:
            self._files.rm_file(self._path)


def _holder_of(files: AbstractFileSystem, path: str) -> dict[str, object] | None:
    files.invalidate_cache()
    try:
        holder = json.loads(files.cat_file(path))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _name(holder: dict[str, object]) -> str:
    return f"{holder.get('pid', 'unknown')} on {holder.get('host', 'unknown')}"


def _is_dead(holder: dict[str, object]) -> bool:
    """Whether a process of this machine is named that no longer lives."""
    pid = holder.get("pid")
    if (holder.get("host"), holder.get("node")) != (socket.gethostname(), uuid.getnode()) or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
