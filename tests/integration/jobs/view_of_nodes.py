"""Asks all nodes what they see. Arguments: a folder that they share, a model folder, seconds to wait."""

from __future__ import annotations

import sys
from pathlib import Path

import ray

from openrlhf_bd.cli.flags import main_guard
from openrlhf_bd.driver.nodes import view_nodes


def main() -> int:
    folder, model, timeout_s = sys.argv[1:]
    ray.init(log_to_driver=False)
    view_nodes({"--folder": Path(folder)}, {"--model": model}, gpus=False, timeout_s=float(timeout_s))
    print(f"{len(ray.nodes())} nodes see the same")
    return 0


if __name__ == "__main__":
    sys.exit(main_guard(main))
