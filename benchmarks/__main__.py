"""`make bench`: every benchmark of this folder, one after another, each in a process of its own, at quick sizes.

python3 -m benchmarks [--full] [NAME ...]        --full: each at its own defaults; NAME: only these, loss_head for one
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
# Arguments that bring a script down to a minute or so; one that is not here has such defaults of its own.
QUICK = {
    "engine_scaling": ["--rows", "256", "--rounds", "1"],
    "evaluation": ["--quick"],
    "loss_head": ["--states", "512", "--vocabulary", "50257", "--rounds", "1", "--repeats", "1"],
    "online_memory": ["--steps", "60", "--every", "20", "--settled", "20"],
    "online_overlap": ["--quick"],
    "online_step": ["--quick"],
    "recording": ["--layers", "2", "--rows", "16", "--tokens", "4", "--repeats", "2"],
    "step_growth": ["--scale", "0.1", "--repeats", "1"],
    "store_growth": ["--rows", "10000"],
    "store_throughput": ["--rows", "2048"],
    "train_step": ["--quick"],
}


def main() -> None:
    """Run the scripts; exit status 1 where one failed, after all have run."""
    names = sorted(path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("_"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(names)}; none: all")
    parser.add_argument("--full", action="store_true", help="the sizes of docs/benchmarks.md, which can take an hour")
    options = parser.parse_args()
    unknown = sorted(set(options.names) - set(names))
    if unknown:
        parser.error(f"no such benchmark: {', '.join(unknown)}; there are {', '.join(names)}")
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parent)}
    failed = []
    for name in options.names or names:
        quick = [] if options.full else QUICK.get(name, [])
        print(f"== {' '.join([name, *quick])}", flush=True)
        command = [sys.executable, str(FOLDER / f"{name}.py"), *quick]
        if subprocess.run(command, env=environment, check=False).returncode:
            failed.append(name)
    raise SystemExit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
