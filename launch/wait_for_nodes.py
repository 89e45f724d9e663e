"""Waits until a Ray cluster has all the nodes that were started, by their names (`ray start --node-name`).

Usage: wait_for_nodes.py --timeout_s 300 --logs FOLDER NAME=PID ...

PID is the local process that keeps the node; FOLDER has NAME.log of each. The job server is that of RAY_ADDRESS. Ends
with 75 where a node ended or did not come in time, and says which.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from ray.util.state import list_nodes
from ray.util.state.exception import RayStateApiException

POLL_S = 1.0
LOG_LINES = 15
NOT_READY = 75


def alive_nodes() -> tuple[set[str], str]:
    """Names of the nodes that are alive, and why there are none while the server does not answer."""
    try:
        nodes = list_nodes(address=os.environ["RAY_ADDRESS"], timeout=10, limit=10_000)
    except (RayStateApiException, OSError, RuntimeError) as error:
        return set(), str(error).strip().partition("\n")[0]
    return {node.node_name for node in nodes if node.state == "ALIVE"}, ""


def has_ended(pid: int) -> bool:
    """Whether a process is gone; one that ended and that nobody has waited for is gone, too."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state == "Z"


def tail(path: Path) -> str:
    """The end of a log, indented."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ["(no log)"]
    return "\n".join(f"    {line}" for line in lines[-LOG_LINES:])


def problem(wanted: dict[str, int], alive: set[str], *, waited_s: float, timeout_s: float) -> tuple[str, list[str]]:
    """What keeps the cluster from being whole, and the nodes that it concerns; ("", []) to wait on."""
    missing = [name for name in wanted if name not in alive]
    ended = [name for name in missing if has_ended(wanted[name])]
    if ended:
        return f"Ray ended on {', '.join(ended)} before it was ready", ended
    if missing and waited_s > timeout_s:
        found = f"{len(wanted) - len(missing)} of {len(wanted)} nodes are there after {timeout_s:.0f} s"
        return f"{found}; missing: {', '.join(missing)} (WAIT_S; firewalls and ports: docs/clusters.md)", missing
    return "", []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timeout_s", type=float, required=True)
    parser.add_argument("--logs", type=Path, required=True)
    parser.add_argument("nodes", nargs="+", metavar="NAME=PID")
    options = parser.parse_args()
    wanted = {name: int(pid) for name, _, pid in (node.rpartition("=") for node in options.nodes)}
    started = time.monotonic()
    while True:
        alive, refusal = alive_nodes()
        if wanted.keys() <= alive:
            return 0
        waited_s = time.monotonic() - started
        message, nodes = problem(wanted, alive, waited_s=waited_s, timeout_s=options.timeout_s)
        if message:
            print(
                f"wait_for_nodes: {message}",
                *([f"  the job server: {refusal}"] if refusal else []),
                sep="\n",
                file=sys.stderr,
            )
            for name in nodes:
                path = options.logs / f"{name}.log"
                print(f"  the end of {path}:\n{tail(path)}", file=sys.stderr)
            return NOT_READY
        time.sleep(POLL_S)


if __name__ == "__main__":
    sys.exit(main())
