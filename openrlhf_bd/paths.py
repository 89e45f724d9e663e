"""Paths that may not exist yet: help for messages, room on their disk, and sizes in words."""

import difflib
import shutil
from pathlib import Path


def looks_like_path(name: str) -> bool:
    """Whether a name can only be a path, not one on a hub: `/x`, `./x`, `~/x`, `a/b/c`."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1


def nearest_path_hint(path: str | Path) -> str:
    """Where the path stops existing and what is there instead: "; the folder has "train.jsonl"", or "".

    Args:
        path: a path that does not exist.
    """
    missing = Path(path)
    while missing.parent != missing and not missing.parent.exists():
        missing = missing.parent
    if not missing.parent.is_dir():
        return ""
    names = sorted(entry.name for entry in missing.parent.iterdir() if not entry.name.startswith("."))
    matches = difflib.get_close_matches(missing.name, names, n=1, cutoff=0.7)
    if matches:
        return f'; did you mean "{missing.parent / matches[0]}"?'
    if missing != Path(path):
        return f'; the folder "{missing}" does not exist'
    listed = ", ".join(f'"{name}"' for name in names[:5]) + (", ..." if len(names) > 5 else "")
    return f"; its folder has {listed}" if names else ""


def existing_parent(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    path = path.expanduser().absolute()
    while not path.exists():
        path = path.parent
    return path


def free_bytes(path: Path) -> int:
    """Free disk space where the path is or would be."""
    return shutil.disk_usage(existing_parent(path)).free


def format_bytes(count: float) -> str:
    """Bytes in the largest decimal unit that leaves at least 1: "12 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.1f} {unit}" if count < 9.95 and unit != "B" else f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
