"""Writers that die everywhere, and what they leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def die_everywhere(root: Path, action: str) -> list[Path]:
    """Run processes that end at each of their operations on files. Returns the folders that they worked on."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("dying_writer.py")), str(root), action],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return sorted(root.iterdir(), key=lambda folder: int(folder.name))


def whole_lines(folder: Path) -> list[dict[str, Any]]:
    """What the journal lists, read without the store's own code."""
    path = folder / "shards.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]
