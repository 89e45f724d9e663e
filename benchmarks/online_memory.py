"""Memory of every process of an online run, step after step: flat, or not.

The smallest models, so that a thousand steps take minutes; half of the rows from the student. Resident memory of the
driver, the ranks and the engines every so many steps, and what it grew by since a step at which all had warmed up.

PYTHONPATH=. python3 benchmarks/online_memory.py
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import psutil
import torch

from benchmarks._measure import describe_machine
from benchmarks._models import TEACHER_LOGIT_STD
from benchmarks._online_job import STUDENT_LOGIT_STD, Job, job_flags, step_records, write_model, write_prompts

MIB = 2**20


class MemoryLog:
    """Memory of a job's processes by role, each time it is looked at; the driver is the process that started first."""

    def __init__(self, output: Path) -> None:
        self._metrics = output / "metrics.jsonl"
        self.looks: list[tuple[int, dict[str, float]]] = []

    def look(self, found: Mapping[str, Sequence[psutil.Process]]) -> None:
        """Read memory, and the number of the last step."""
        if not found["ranks"] or not self._metrics.exists():
            return
        roles = {role: list(members) for role, members in found.items() if members}
        others = sorted(roles.pop("others"), key=lambda process: process.create_time())
        memory = {role: _memory_bytes(members) for role, members in roles.items()}
        memory |= {"driver": _memory_bytes(others[:1]), "Ray": _memory_bytes(others[1:])}
        self.looks.append((_last_step(self._metrics), memory))

    def at(self, step: int) -> dict[str, float]:
        """Bytes by role, at the first look at or after a step."""
        return next((memory for seen, memory in self.looks if seen >= step), self.looks[-1][1])


def _memory_bytes(processes: Sequence[psutil.Process]) -> float:
    """Resident memory that is the processes' own: shared memory is Ray's object store, which has a limit of its own."""
    total = 0
    for process in processes:
        try:
            memory = process.memory_info()
        except psutil.Error:
            continue
        total += memory.rss - memory.shared
    return float(total)


def _last_step(metrics: Path) -> int:
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - 8192))
        lines = [line for line in file.read().split(b"\n") if line.endswith(b"}") and line.startswith(b"{")]
    return int(json.loads(lines[-1])["step"]) if lines else 0


def print_table(log: MemoryLog, options: argparse.Namespace) -> None:
    """Memory every so many steps, and its growth."""
    roles = list(log.looks[-1][1])
    print("step      " + "".join(f"{role:>18}" for role in roles) + "   MiB, shared memory left out")
    for step in range(options.every, options.steps + 1, options.every):
        memory = log.at(step)
        print(f"{step:8d}  " + "".join(f"{memory.get(role, 0.0) / MIB:18.1f}" for role in roles))
    first, last = log.at(options.settled), log.at(options.steps)
    growth = {role: (last.get(role, 0.0) - first.get(role, 0.0)) / MIB for role in roles}
    print(f"{'growth':10}" + "".join(f"{growth[role]:18.1f}" for role in roles))
    print(f"growth from step {options.settled} on: {sum(growth.values()):.1f} MiB in all")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="of the run")
    parser.add_argument("--every", type=int, default=50, help="steps between two lines of the table")
    parser.add_argument("--settled", type=int, default=200, help="step from which on growth counts")
    parser.add_argument("--rows", type=int, default=4, help="of an optimizer step")
    parser.add_argument("--response-tokens", type=int, default=8, help="of each row")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    return parser.parse_args()


def main() -> None:
    """Run the job and watch it."""
    options = arguments()
    print(describe_machine(torch.device("cpu")))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "student", "tiny", vocab_size=1024, logit_std=STUDENT_LOGIT_STD, seed=1)
        write_model(folder / "teacher", "tiny", vocab_size=1024, logit_std=TEACHER_LOGIT_STD, seed=2)
        write_prompts(folder / "prompts.jsonl", 64, num_tokens=8, seed=1)
        output = folder / "run"
        log = MemoryLog(output)
        flags = job_flags(
            folder,
            output,
            algo__distill__mode="online",
            rollout__max_new_tokens=options.response_tokens,
            data__max_len=8 + options.response_tokens,
            train__batch_size=options.rows,
            train__max_epochs=100_000,
            train__max_steps=options.steps,
        )
        Job(flags, log=folder / "job.log", on_poll=log.look).run()
        seconds = np.diff([record["time_s"] for record in step_records(output)])
    print(f"{options.steps} steps, {np.median(seconds) * 1e3:.0f} ms each")
    print_table(log, options)
    if options.json:
        options.json.write_text(json.dumps(log.looks), encoding="utf-8")


if __name__ == "__main__":
    main()
