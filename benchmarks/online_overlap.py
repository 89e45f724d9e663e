"""An online step in steady state against the slower of its two sides alone: making its rows, and training on them.

online        the whole job: engines make rows while the ranks train, and get new weights after each step
rows alone    the same engines, plan and store, with nobody training and the largest max_staleness of the table
training      offline with --train.row_order recorded over the rows that such an online run left

The ranks, the student's engine, the teacher's engine, and all others have a core of their own, where there are four.

PYTHONPATH=. python3 benchmarks/online_overlap.py
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks._measure import describe_machine
from benchmarks._models import TEACHER_LOGIT_STD
from benchmarks._online_job import (
    ROLES,
    SHAPES,
    STUDENT_LOGIT_STD,
    Job,
    job_flags,
    step_records,
    write_model,
    write_prompts,
)

LAST_STEPS = 4  # that are not timed: rows of later steps are not made beside them
TIMES = {
    "wait": "time_rollout_wait_s",
    "stand": "time_back_pressure_s",
    "seal": "time_seal_s",
    "sync": "sync_s",
    "pause": "sync_pause_s",
    "ranks": "ranks_s",
}


@dataclass
class Case:
    """Seconds of a step for one share of student rows and one bound, a number for each repeat.

    Attributes:
        fraction: share of rows that the student samples.
        max_staleness: bound on how far the sampling student may be behind.
        online, rows, training: seconds of a step.
        parts: where an online step's time went, by the names of TIMES.
        staleness: mean of the student's rows.
    """

    fraction: float
    max_staleness: int
    online: list[float] = field(default_factory=list)
    rows: list[float] = field(default_factory=list)
    training: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=dict)
    staleness: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Median of the repeats' ratios: of what ran side by side in time."""
        both = zip(self.online, self.rows, self.training, strict=True)
        return median(online / max(rows, training) for online, rows, training in both)


class Runs:
    """The three ways to run, over the same models and prompts."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._options, self._folder = options, folder
        cores = sorted(os.sched_getaffinity(0))
        self._cores = {role: [cores[place % len(cores)]] for place, role in enumerate([*ROLES.values(), "others"])}

    def measure(self, cases: Sequence[Case]) -> None:
        """One repeat of the cases of one share of student rows, which have the sides alone in common."""
        for case in cases:
            self._online(case)
        rows_s, training_s = self._rows(cases[-1]), self._training(cases[-1])
        for case in cases:
            case.rows.append(rows_s)
            case.training.append(training_s)

    def _online(self, case: Case) -> None:
        output = self._new("online")
        self._job(self._flags(output, case))
        records = step_records(output)
        timed = self._timed(records)
        case.online.append(self._step_s([record["time_s"] for record in records]))
        for name, key in TIMES.items():
            case.parts.setdefault(name, []).append(sum(_value(record, key) for record in timed) / len(timed))
        case.staleness.append(sum(record.get("staleness", 0.0) for record in timed) / len(timed))

    def _rows(self, case: Case) -> float:
        report = self._folder / "rows.json"
        self._job([str(report), *self._flags(self._new("rows"), case)], module="benchmarks._online_rows")
        return self._step_s(json.loads(report.read_text(encoding="utf-8")))

    def _training(self, case: Case) -> float:
        output = self._new("training")
        offline = {"teacher__store_path": self._folder / "online" / "rollouts", "train__row_order": "recorded"}
        self._job(self._flags(output, case, algo__distill__mode="offline", **offline))
        return self._step_s([record["time_s"] for record in step_records(output)])

    def _flags(self, output: Path, case: Case, **changes: Any) -> list[str]:
        options = self._options
        flags = {
            "algo__distill__mode": "online",
            "algo__distill__name": options.algorithm,
            "algo__distill__rollout": "mixed",
            "algo__distill__student_fraction": case.fraction,
            "algo__distill__max_staleness": case.max_staleness,
            "algo__distill__in_flight": options.in_flight,
            "rollout__max_new_tokens": options.response_tokens,
            "data__max_len": options.prompt_tokens + options.response_tokens,
            "train__batch_size": options.rows,
            "train__max_tokens_per_gpu": options.micro_tokens,
            "train__max_epochs": 1000,
            "train__max_steps": options.warm_up_steps + options.steps + LAST_STEPS,
        }
        return job_flags(self._folder, output, **(flags | changes))

    def _job(self, arguments: Sequence[str], **more: str) -> None:
        Job(arguments, log=self._folder / "job.log", cores=self._cores, **more).run()

    def _new(self, name: str) -> Path:
        shutil.rmtree(self._folder / name, ignore_errors=True)
        return self._folder / name

    def _timed(self, steps: list[Any]) -> list[Any]:
        first = self._options.warm_up_steps
        return steps[first : first + self._options.steps]

    def _step_s(self, ends: list[float]) -> float:
        before, timed = ends[self._options.warm_up_steps - 1], self._timed(ends)
        return (timed[-1] - before) / len(timed)


def _value(record: Mapping[str, float], key: str) -> float:
    if key == "ranks_s":
        return record["time_data_s"] + record["time_forward_backward_s"] + record["time_optimizer_s"]
    return record.get(key, 0.0)


def print_table(cases: Sequence[Case]) -> None:
    """Milliseconds of a step, and what an online step has over the slower side."""
    print(
        "student rows  max_staleness  online, ms  rows alone  training alone   ratio  staleness  of the online step, ms"
    )
    for case in cases:
        sides = [f"{median(values) * 1e3:.0f}" for values in (case.online, case.rows, case.training)]
        parts = ", ".join(f"{name} {median(values) * 1e3:.0f}" for name, values in case.parts.items())
        print(
            f"{case.fraction:12.2f} {case.max_staleness:14d} {sides[0]:>11} {sides[1]:>11} {sides[2]:>15} "
            f"{case.ratio:7.2f} {median(case.staleness):10.2f}  {parts}"
        )
    print("ratio: online / the slower of the two alone. wait: ranks wait for rows; stand: all engines held back by a")
    print("bound; sync: weights to the engines, of it pause: until responses in flight have ended; ranks: their work")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one case, few steps: does it run, and roughly how")
    parser.add_argument("--algorithm", default="bd", help="the loss")
    parser.add_argument("--fractions", type=float, nargs="+", help="shares of student rows")
    parser.add_argument("--staleness", type=int, nargs="+", help="values of max_staleness")
    parser.add_argument("--in-flight", default="wait", choices=["wait", "keep", "abort"], help="as of algo.distill")
    parser.add_argument("--shape", choices=SHAPES, help="student")
    parser.add_argument("--teacher-shape", choices=SHAPES, help="teacher")
    parser.add_argument("--vocabulary", type=int, help="ids")
    parser.add_argument("--rows", type=int, help="of an optimizer step")
    parser.add_argument("--prompt-tokens", type=int, help="of each row")
    parser.add_argument("--response-tokens", type=int, help="of each row")
    parser.add_argument("--micro-tokens", type=int, help="positions of a micro-batch")
    parser.add_argument("--warm-up-steps", type=int, help="of each run, before those that are timed")
    parser.add_argument("--steps", type=int, help="timed steps of each run")
    parser.add_argument("--repeats", type=int, help="how often each case runs")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    defaults: dict[str, Any] = {
        "fractions": [0.0, 0.5, 1.0],
        "staleness": [1, 2],
        "shape": "small",
        "teacher_shape": "small-twice",
        "vocabulary": 16_384,
        "rows": 16,
        "prompt_tokens": 32,
        "response_tokens": 64,
        "micro_tokens": 2048,
        "warm_up_steps": 4,
        "steps": 16,
        "repeats": 2,
    }
    quick = {"fractions": [1.0], "staleness": [1], "rows": 8, "response_tokens": 32, "steps": 6, "repeats": 1}
    for name, value in (defaults | (quick if options.quick else {})).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def main() -> None:
    """Write models and prompts, run all cases in turn, print the table."""
    options = arguments()
    print(describe_machine(torch.device("cpu")))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for role, shape, std in (
            ("student", options.shape, STUDENT_LOGIT_STD),
            ("teacher", options.teacher_shape, TEACHER_LOGIT_STD),
        ):
            size = write_model(folder / role, shape, vocab_size=options.vocabulary, logit_std=std, seed=len(role))
            print(f"{role}: {SHAPES[shape]}, vocabulary {options.vocabulary}: {size / 1e6:.0f} million parameters")
        write_prompts(folder / "prompts.jsonl", 512, num_tokens=options.prompt_tokens, seed=1)
        print(f"{options.rows} rows a step, {options.prompt_tokens} + {options.response_tokens} tokens", flush=True)
        cases = [Case(fraction, bound) for fraction in options.fractions for bound in options.staleness]
        runs = Runs(options, folder)
        for _ in range(options.repeats):
            for fraction in options.fractions:
                measured = [case for case in cases if case.fraction == fraction]
                runs.measure(measured)
                for case in measured:
                    print(f"  {fraction}, {case.max_staleness}: {case.ratio:.2f}", file=sys.stderr, flush=True)
    print_table(cases)
    if options.json:
        options.json.write_text(json.dumps([asdict(case) for case in cases], indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
