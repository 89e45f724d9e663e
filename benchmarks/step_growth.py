"""How the loss with its output head grows with vocabulary, size of the sets and number of positions.

One of the three is varied at a time, around the shape of Qwen2.5-0.5B; time is of a forward and backward pass, memory
is its peak beyond the weight's gradient. Each point is a fresh process (see loss_head.py, whose cases these are).

PYTHONPATH=. python3 benchmarks/step_growth.py --figure growth.png
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median

import torch

from benchmarks._measure import describe_machine
from benchmarks.loss_head import MIB, run_worker

CASES = ["sets only, shift constant", "paper", "robust, sampled tail", "robust, exact tail"]
BASE = {"vocabulary": 151_936, "mean-set": 8, "states": 2048}
AXES = {
    "vocabulary": [16_384, 32_768, 65_536, 151_936],
    "mean-set": [2, 8, 32, 128],
    "states": [512, 1024, 2048, 4096],
}
NAMES = {"vocabulary": "vocabulary, ids", "mean-set": "mean set, ids", "states": "positions"}
Growth = dict[tuple[str, str], list[tuple[float, float]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2, help="of a CPU")
    parser.add_argument("--repeats", type=int, default=2, help="timed steps of a point")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="of vocabularies and positions; below 1 for a quick look"
    )
    parser.add_argument("--figure", type=Path, help="PNG to draw; needs matplotlib")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(describe_machine(torch.device(args.device)))
    growth = {
        (axis, case): [measure(args, axis, value, case) for value in AXES[axis]] for axis in AXES for case in CASES
    }
    for axis in AXES:
        print_axis(axis, growth, args.scale)
    if args.figure is not None:
        draw(growth, args.figure, args.scale)


def scaled(axis: str, value: int, scale: float) -> int:
    """A value of an axis, smaller for a quick look; sizes of sets stay."""
    return value if axis == "mean-set" else max(16, int(value * scale))


def measure(args: argparse.Namespace, axis: str, value: int, case: str) -> tuple[float, float]:
    """Seconds and MiB of a step at one point."""
    options = ["--device", args.device, "--dtype", args.dtype, "--threads", str(args.threads)]
    options += ["--repeats", str(args.repeats)]
    for name, number in {**BASE, axis: value}.items():
        options += [f"--{name}", str(scaled(name, number, args.scale))]
    found = run_worker(options, "step", case, "sparse")
    return median(found["seconds"]), max(0.0, found["bytes"] / MIB)


def print_axis(axis: str, growth: Growth, scale: float) -> None:
    """Time and memory of every case along an axis."""
    print(f"\n{NAMES[axis]:26s}" + "".join(f"{scaled(axis, value, scale):>18d}" for value in AXES[axis]))
    for case in CASES:
        print(f"{case:26s}" + "".join(f"{s:8.2f} s {mib:4.0f} MiB" for s, mib in growth[axis, case]))


def draw(growth: Growth, path: Path, scale: float) -> None:
    """Time along each axis, both logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axes, axis in zip(figure.subplots(1, len(AXES), sharey=True), AXES, strict=True):
        for case in CASES:
            values = [scaled(axis, value, scale) for value in AXES[axis]]
            axes.loglog(values, [seconds for seconds, _ in growth[axis, case]], "o-", label=case)
        axes.set_xlabel(NAMES[axis])
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("loss with head, forward and backward, s")
    figure.axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
