"""`make bench`: every benchmark of this folder, one after another, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPTS = sorted(path for path in Path(__file__).parent.glob("*.py") if not path.name.startswith("_"))

if __name__ == "__main__":
    failed = []
    for script in SCRIPTS:
        print(f"== {script.name}", flush=True)
        if subprocess.run([sys.executable, str(script), *sys.argv[1:]], check=False).returncode:
            failed.append(script.name)
    raise SystemExit(f"failed: {', '.join(failed)}" if failed else 0)
