"""Digests of the local files and folders that stages read, each file read once as long as it does not change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from openrlhf_bd.store.files import sha256_file, write_text
from openrlhf_bd.store.fingerprints import fingerprint_json

CACHE_FILE = "inputs.json"
# What a model computes: configuration, weights, tokenizer. A run folder holds more than that.
_MODEL_FILES = (
    *("config.json", "generation_config.json", "adapter_config.json"),
    *("*.safetensors", "*.bin", "*token*.json", "vocab.*", "merges.txt", "*.model", "*.jinja"),
)


class InputDigests:
    """Digests by content. A file counts as unchanged while path, size and time of change are."""

    def __init__(self, cache: Path | None = None) -> None:
        """Read what an earlier process found.

        Args:
            cache: file that keeps digests for later processes; None: none does.
        """
        self._cache = cache
        self._known: dict[str, list[Any]] = {}
        if cache is not None and cache.exists():
            self._known = json.loads(cache.read_text(encoding="utf-8"))

    def model(self, name: str) -> str:
        """Digest of a model folder, or the name of a model on a hub."""
        folder = Path(name).expanduser()
        if not folder.is_dir():
            return name
        files = sorted({file for pattern in _MODEL_FILES for file in folder.glob(pattern) if file.is_file()})
        return "model:" + fingerprint_json({file.name: self._file(file) for file in files})

    def data(self, entry: str) -> str:
        """Digest of a data file or folder, or the name of a data set on a hub; of `name@folder` likewise."""
        name, at, inside = entry.strip().partition("@")
        path = Path(name).expanduser()
        if path.is_file():
            return f"data:{path.suffix}:{self._file(path)}{at}{inside}"
        if not path.is_dir():
            return entry
        files = sorted(file for file in path.rglob("*") if file.is_file() and not _hidden(file.relative_to(path)))
        found = {str(file.relative_to(path)): self._file(file) for file in files}
        return f"data:{fingerprint_json(found)}{at}{inside}"

    def save(self) -> None:
        """Keep what was found for later processes."""
        if self._cache is not None:
            write_text(self._cache, json.dumps(self._known, indent=1, sort_keys=True))

    def _file(self, path: Path) -> str:
        path = path.absolute()
        status = path.stat()
        stamp = [status.st_size, status.st_mtime_ns]
        known = self._known.get(str(path))
        if known is None or known[:2] != stamp:
            known = self._known[str(path)] = [*stamp, sha256_file(path)]
        digest: str = known[2]
        return digest


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
