"""What one machine sees of a run: folders, models, GPUs. It runs on every node, so it imports next to nothing."""

from __future__ import annotations

import hashlib
import secrets
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_NVIDIA_SMI_TIMEOUT_S = 30.0
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class FolderView:
    """A folder that all nodes share, as one of them sees it.

    Attributes:
        exists: whether there is such a folder.
        token: what the driver's file in it says; None: there is no such file.
        writable: whether files can be made there.
    """

    exists: bool
    token: str | None
    writable: bool


@dataclass(frozen=True, slots=True)
class NodeView:
    """What one node sees.

    Attributes:
        folders: by the driver's file in each.
        models: a stamp of each model folder, None where there is none.
        gpus: name, total and used bytes of each GPU; none where nvidia-smi cannot tell.
    """

    folders: Mapping[str, FolderView]
    models: Mapping[str, str | None]
    gpus: Sequence[tuple[str, int, int]]


def look(files: Sequence[str], models: Sequence[str], *, gpus: bool) -> NodeView:
    """What this machine sees.

    Args:
        files: that the driver wrote, one in each shared folder.
        models: folders.
        gpus: whether to ask for the memory of GPUs.
    """
    return NodeView(
        {file: _folder_view(Path(file)) for file in files},
        {model: model_stamp(Path(model)) for model in models},
        _gpus() if gpus else (),
    )


def _folder_view(file: Path) -> FolderView:
    try:
        token = file.read_text(encoding="utf-8")
    except OSError:
        token = None
    mine = file.with_name(f"{file.name}-{secrets.token_hex(4)}")
    try:
        mine.touch(exist_ok=False)
        mine.unlink()
    except OSError:
        return FolderView(file.parent.is_dir(), token, writable=False)
    return FolderView(True, token, writable=True)


def model_stamp(folder: Path) -> str | None:
    """A digest of a model folder's configuration, and of the names and sizes of its files; None without a folder."""
    if not (folder / "config.json").is_file():
        return None
    files = sorted((path.name, path.stat().st_size) for path in folder.iterdir() if path.is_file())
    return hashlib.sha256((folder / "config.json").read_bytes() + repr(files).encode()).hexdigest()


def _gpus() -> tuple[tuple[str, int, int], ...]:
    """From nvidia-smi: no CUDA context, and it also sees the GPUs that this process has not been given."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,memory.used", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=_NVIDIA_SMI_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return parse_nvidia_smi(found.stdout)


def parse_nvidia_smi(text: str) -> tuple[tuple[str, int, int], ...]:
    """Name, total and used bytes of each GPU; GPUs that do not tell their memory ("[N/A]") are left out."""
    rows = [[cell.strip() for cell in line.rsplit(",", 2)] for line in text.splitlines() if line.strip()]
    return tuple(
        (name, int(total) * _MIB, int(used) * _MIB) for name, total, used in rows if total.isdigit() and used.isdigit()
    )
