"""A whole training step, tokens a second: ours against the authors' way and against TRL's GKDTrainer.

All sides train a student of the same shape with AdamW on the same rows, whose lengths are those of Dolly; tokens are
prompt and response tokens, padding is not counted. Weights are random, which changes no time.

ours            packed rows, stored candidate sets, no teacher in the step; presets robust (with the exact and with the
                sampled tail) and paper
authors' way    teacher in the step, rows padded to 512, the top-p mask and the loss dense over [rows, 512, vocabulary]
TRL GKDTrainer  teacher in the step, rows padded to the longest, the divergence dense (lmbda 0, beta 0)

Each side runs in a process of its own, in turn, over and over; the figures are medians over all timed steps. The
alternatives run with several sizes of their micro-batches, and the best of each counts.

PYTHONPATH=. python3 benchmarks/train_step.py --trl-python .venv-trl/bin/python
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks._measure import describe_machine
from benchmarks._models import SHAPES, new_model, num_parameters, peak_flops
from benchmarks._step_setting import Report, Setting

ROOT = Path(__file__).resolve().parent.parent
EPOCHS = 3  # of the paper; over which the making of the sets is spread
OURS = {"robust": "ours, robust", "robust-sampled": "ours, robust, sampled tail", "paper": "ours, paper"}


@dataclass(frozen=True)
class Side:
    """One line of the table.

    Attributes:
        name: of the line.
        family: what is compared: ours, dense or trl.
        python: interpreter.
        module: what it runs.
        setting: its setting.
    """

    name: str
    family: str
    python: str
    module: str
    setting: Setting


@dataclass(frozen=True)
class Line:
    """Figures of one side; see the head of the table for their units."""

    name: str
    family: str
    tokens_per_s: float
    tokens_per_cpu_s: float
    step_s: float
    peak_bytes: int
    weights_bytes: int
    used_share: float
    flops_share: float
    parts: dict[str, float]


def sides_of(options: argparse.Namespace, setting: Setting) -> list[Side]:
    """Every line of the table, in the order in which they run."""
    sides = [
        Side(name, "ours", sys.executable, "benchmarks._step_ours", replace(setting, variant=variant))
        for variant, name in OURS.items()
    ]
    alternatives = [("dense", "authors' way", sys.executable, "benchmarks._step_dense")]
    if options.trl_python:
        alternatives.append(("trl", "TRL GKDTrainer", options.trl_python, "benchmarks._step_trl"))
    for family, name, python, module in alternatives:
        for rows in options.micro_rows:
            sides.append(Side(f"{name}, {rows} x", family, python, module, replace(setting, micro_rows=rows)))
    return sides


def run_side(side: Side) -> Report | None:
    """Run one side in its own process; None, with a line that says so, where the device's memory is too small for it.

    Raises:
        SystemExit: it failed otherwise; its output says why.
    """
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    environment.setdefault("CUDA_VISIBLE_DEVICES", "0")  # TRL's trainer would spread over all
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        command = [side.python, "-m", side.module, json.dumps(asdict(side.setting)), str(path)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode and "OutOfMemoryError" in done.stderr:
            print(f"{side.name}: out of memory")
            return None
        if done.returncode:
            raise SystemExit(f"{side.name} failed (exit status {done.returncode}):\n{done.stdout}{done.stderr}")
        return Report(**json.loads(path.read_text(encoding="utf-8")))


def line_of(side: Side, reports: list[Report], peak: float) -> Line:
    """Medians over the timed steps of all repeats."""

    def figures(name: str) -> NDArray[np.float64]:
        return np.concatenate([getattr(report, name) for report in reports])

    seconds, tokens, names = figures("seconds"), figures("tokens"), reports[0].parts
    return Line(
        name=side.name,
        family=side.family,
        tokens_per_s=float(np.median(tokens / seconds)),
        tokens_per_cpu_s=float(np.median(tokens / figures("cpu_seconds"))),
        step_s=float(np.median(seconds)),
        peak_bytes=max(report.peak_bytes for report in reports),
        weights_bytes=max(report.weights_bytes for report in reports),
        used_share=float(tokens.sum() / figures("positions").sum()),
        flops_share=float(np.median(figures("flops") / seconds)) / peak,
        parts={name: median(value for report in reports for value in report.parts[name]) for name in names},
    )


def best(lines: list[Line], family: str, speed: str) -> Line | None:
    """The fastest line of a family by one of Line's speeds, or None where it did not run."""
    return max((line for line in lines if line.family == family), key=lambda line: getattr(line, speed), default=None)


def print_table(lines: list[Line]) -> None:
    """Figures of every side, and how many times as fast as each alternative at its best it is."""
    print(f"{'':28} ms/step  peak GB  at start  used  arith.  tokens/s  /authors'   /TRL    /CPU s  /authors'   /TRL")
    for line in lines:
        figures = f"{line.step_s * 1e3:7.0f} {line.peak_bytes / 1e9:8.2f} {line.weights_bytes / 1e9:9.2f}"
        shares = f"{line.used_share:5.0%} {line.flops_share:7.1%}"
        speeds = []
        for speed in ("tokens_per_s", "tokens_per_cpu_s"):
            mine, others = getattr(line, speed), [best(lines, family, speed) for family in ("dense", "trl")]
            ratios = [f"{mine / getattr(other, speed):.2f}" if other else "-" for other in others]
            speeds.append(f"{mine:9.0f} {ratios[0]:>10} {ratios[1]:>6}")
        print(f"{line.name:28} {figures} {shares} {speeds[0]} {speeds[1]}")
    print("used: tokens / positions computed; arith.: arithmetic that the step needs / (time * peak)")
    print("/CPU s: tokens a second of processor time, all threads: the steadier figure on a busy machine without a GPU")
    for line in lines:
        if line.parts:
            parts = ", ".join(f"{name} {seconds * 1e3:.0f} ms" for name, seconds in line.parts.items())
            print(f"  {line.name}: {parts}")


def print_sets(lines: list[Line], sets: Report, device: str) -> None:
    """What making the candidate sets costs, once, and when it has paid for itself; in processor time on a CPU."""
    speed, seconds, unit = "tokens_per_s", sets.seconds, "ms"
    if device == "cpu":
        speed, seconds, unit = "tokens_per_cpu_s", sets.cpu_seconds, "ms of processor time"
    per_token = sum(seconds) / sum(sets.tokens)
    sizes = ", ".join(f"{name} {value:.1f}" for name, value in sets.notes.items())
    print(
        f"Making the sets is not in the table: it happens once, before training, and takes {per_token * 1e3:.3f} "
        f"{unit} a token here, in a teacher pass of its own ({1 / per_token:.0f} tokens/s). {sizes}."
    )
    for line in (line for line in lines if line.family == "ours"):
        ours_s = 1 / getattr(line, speed)
        paid = []
        for other in [best(lines, family, speed) for family in ("dense", "trl")]:
            if other is not None:
                saved = 1 / getattr(other, speed) - ours_s
                after = f"{per_token / saved:.2f} epochs" if saved > 0 else "never"
                paid.append(f"{after} against {other.name}")
        with_sets = 1 / (ours_s + per_token / EPOCHS)
        print(
            f"  {line.name}: {with_sets:.0f} tokens/s with it, over {EPOCHS} epochs; paid back after {', '.join(paid)}"
        )


def arguments() -> argparse.Namespace:
    """The command line, with defaults that depend on the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small models, one repeat: does it run, and roughly how")
    parser.add_argument("--trl-python", help="interpreter of TRL's environment, see benchmarks/trl_environment.sh")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=SHAPES, help="student")
    parser.add_argument("--teacher-shape", choices=SHAPES, help="teacher")
    parser.add_argument("--rows", type=int, help="rows of an optimizer step")
    parser.add_argument("--steps", type=int, help="timed steps of each repeat")
    parser.add_argument("--repeats", type=int, help="how often each side runs")
    parser.add_argument("--warm-up-steps", type=int, help="steps of each repeat before those that are timed")
    parser.add_argument("--micro-tokens", type=int, help="positions of our micro-batches")
    parser.add_argument(
        "--micro-rows", type=int, nargs="+", help="rows of the alternatives' micro-batches; all are tried"
    )
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument(
        "--liger", action="store_true", help="Liger's kernels on all sides; liger-kernel in both environments"
    )
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    for name, value in _defaults(options).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    vocabularies = [SHAPES[shape].vocab_size for shape in (options.shape, options.teacher_shape)]
    if len(set(vocabularies)) > 1:
        parser.error(f"student and teacher have vocabularies of {vocabularies}; choose shapes of one family")
    if any(options.rows % rows for rows in options.micro_rows):
        parser.error(f"--rows {options.rows} is not a multiple of each of --micro-rows {options.micro_rows}")
    if options.trl_python and shutil.which(options.trl_python) is None:
        parser.error(f"--trl-python {options.trl_python}: no such program; benchmarks/trl_environment.sh makes it")
    return options


def _defaults(options: argparse.Namespace) -> dict[str, Any]:
    if options.device == "cuda":
        sizes = {"rows": 32, "repeats": 1, "micro_rows": [4]} if options.quick else {"micro_rows": [4, 16]}
        shapes = {"shape": "qwen2.5-0.5b", "teacher_shape": "qwen2.5-3b", "micro_tokens": 16_384}
        return {"rows": 128, "steps": 4, "repeats": 3, "warm_up_steps": 2} | shapes | sizes
    shapes = {"shape": "gpt2-half", "teacher_shape": "gpt2-xl-half", "micro_tokens": 2048, "micro_rows": [1, 4]}
    quick = {"shape": "gpt2-quarter", "teacher_shape": "gpt2-xl-quarter", "rows": 4, "repeats": 1, "micro_rows": [1]}
    return {"rows": 16, "steps": 1, "repeats": 3, "warm_up_steps": 1} | shapes | (quick if options.quick else {})


def setting_of(options: argparse.Namespace, sets_folder: str) -> Setting:
    """What all sides have in common."""
    return Setting(
        student=options.shape,
        teacher=options.teacher_shape,
        device=options.device,
        rows=options.rows,
        steps=options.steps,
        warm_up_steps=options.warm_up_steps,
        micro_tokens=options.micro_tokens,
        micro_rows=1,
        variant="sets",
        sets_folder=sets_folder,
        threads=options.threads,
        liger=options.liger,
    )


def print_setting(setting: Setting, peak: float) -> None:
    """Machine, models and rows."""
    print(describe_machine(torch.device(setting.device)))
    for role, shape in (("student", setting.student), ("teacher", setting.teacher)):
        millions = num_parameters(new_model(shape, seed=1, device=torch.device("meta"))) / 1e6
        print(f"{role} {shape}: {millions:.0f} million parameters, vocabulary {SHAPES[shape].vocab_size}")
    print(f"{setting.rows} rows a step; peak {peak / 1e12:.2f} TFLOP/s", flush=True)


def run_in_turn(sides: list[Side], repeats: int) -> list[tuple[Side, list[Report]]]:
    """Run every side once, then every side again, and so on; a side that runs out of memory is left out."""
    reports: dict[str, list[Report]] = {side.name: [] for side in sides}
    for _ in range(repeats):
        for side in [side for side in sides if side.name in reports]:
            report = run_side(side)
            if report is None:
                del reports[side.name]
                continue
            reports[side.name].append(report)
            print(f"  {side.name}: {median(report.seconds):.2f} s a step", file=sys.stderr, flush=True)
    return [(side, reports[side.name]) for side in sides if side.name in reports]


def main() -> None:
    """Make the sets, run all sides in turn, print the table."""
    options = arguments()
    with tempfile.TemporaryDirectory() as folder:
        setting = setting_of(options, folder)
        peak = peak_flops(setting.torch_device())
        print_setting(setting, peak)
        if not options.trl_python:
            print("TRL is left out: make its environment with benchmarks/trl_environment.sh, then add --trl-python")
        sets = run_side(Side("sets", "ours", sys.executable, "benchmarks._step_ours", setting))
        if sets is None:
            raise SystemExit("the teacher that makes the candidate sets needs more memory; choose a smaller one")
        reports = run_in_turn(sides_of(options, setting), options.repeats)
    lines = [line_of(side, side_reports, peak) for side, side_reports in reports]
    print_table(lines)
    print_sets(lines, sets, options.device)
    if options.json:
        figures = {"lines": [asdict(line) for line in lines], "sets": asdict(sets), "setting": asdict(setting)}
        options.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
