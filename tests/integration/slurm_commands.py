"""Stands for a Slurm cluster's `srun` and `scontrol` on one machine: each node is a loopback address with own ports.

Only the cluster's commands are replaced; what they start is real. `write_commands` makes the two, which run this file.
"""

from __future__ import annotations

import os
import sys
from itertools import takewhile
from pathlib import Path

from ray_cluster import own_ports

# A node that is listed and never answers, as one whose step hangs.
SILENT_NODE = "silent"


def write_commands(folder: Path) -> None:
    """`srun` and `scontrol` in a folder that is to come first in PATH."""
    for name in ("srun", "scontrol"):
        path = folder / name
        path.write_text(
            f'#!/bin/sh\nPYTHONPATH="{Path(__file__).parent}" exec "{sys.executable}" "{__file__}" {name} "$@"\n'
        )
        path.chmod(0o755)


def scontrol(arguments: list[str]) -> None:
    """`scontrol show hostnames a,b`: one name a line."""
    assert arguments[:2] == ["show", "hostnames"], arguments
    print("\n".join(arguments[2].split(",")))


def srun(arguments: list[str]) -> None:
    """`srun OPTIONS COMMAND`: the command, on the node that --nodelist names."""
    options = [*takewhile(lambda argument: argument.startswith("--"), arguments)]
    command = arguments[len(options) :]
    (node,) = [option.partition("=")[2] for option in options if option.startswith("--nodelist=")]
    if node == SILENT_NODE:
        os.execvp("sleep", ["sleep", "600"])
    if "worker" in command:
        # 127.0.0.2 is left out: Linux distributions give that address to the machine's own name.
        command += ["--node-ip-address", f"127.0.0.{3 + int(node[-1])}"]
    os.execvp(command[0], [*command, *own_ports(command)])


if __name__ == "__main__":
    {"srun": srun, "scontrol": scontrol}[sys.argv[1]](sys.argv[2:])
