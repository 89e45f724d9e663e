"""Help for messages about files that are not there."""

import difflib
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
