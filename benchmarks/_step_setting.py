"""What all sides of the train step benchmark share: the setting, its rows, and the report of one side."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from benchmarks._lengths import MAX_TOKENS, dolly_lengths
from benchmarks._measure import memory_bytes, now, peak_memory_bytes, reset_peak_memory
from benchmarks._models import SHAPES, new_model, new_teacher

LEARNING_RATE = 5e-6
BETAS = (0.9, 0.95)
MAX_NORM = 1.0


@dataclass(frozen=True)
class Setting:
    """One side's part of the benchmark, as it crosses to the side's process.

    Attributes:
        student, teacher: names of _models.SHAPES.
        device: "cpu" or "cuda".
        rows: rows of an optimizer step.
        steps, warm_up_steps: optimizer steps that are timed, and that come before them.
        micro_tokens: positions of a micro-batch, for a side that packs rows.
        micro_rows: rows of a micro-batch, for a side that pads them.
        variant: what the side is to be, where it can be several things.
        sets_folder: where candidate sets are.
        threads: CPU threads; None leaves them as they are.
        liger: Liger's kernels in every model.
        seed: of weights and rows.
    """

    student: str
    teacher: str
    device: str
    rows: int
    steps: int
    warm_up_steps: int
    micro_tokens: int
    micro_rows: int
    variant: str
    sets_folder: str
    threads: int | None
    liger: bool = False
    seed: int = 1

    @property
    def vocab_size(self) -> int:
        return int(SHAPES[self.student].vocab_size)

    @property
    def stop_id(self) -> int:
        """The token that ends every response."""
        return self.vocab_size - 1

    @property
    def num_steps(self) -> int:
        """Steps with those of the warm-up."""
        return self.warm_up_steps + self.steps

    def torch_device(self) -> torch.device:
        """The device, with the number of threads set."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        return torch.device(self.device)

    def new_student(self, attention: str = "sdpa") -> PreTrainedModel:
        """The student, the same on every side."""
        return new_model(
            self.student, seed=self.seed, device=torch.device(self.device), attention=attention, liger=self.liger
        )

    def new_teacher(self) -> PreTrainedModel:
        """The teacher, the same on every side."""
        return new_teacher(self.teacher, seed=self.seed + 1, device=torch.device(self.device), liger=self.liger)


@dataclass(frozen=True)
class Row:
    """A prompt and its response, the stop token included."""

    prompt_ids: NDArray[np.int32]
    response_ids: NDArray[np.int32]

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass
class Report:
    """What a side measured. Lists have one entry a timed step.

    Attributes:
        seconds: wall clock of the step, from its rows to the optimizer's end.
        cpu_seconds: processor time of the step, of all threads; on a busy machine it says more than the wall clock.
        tokens: prompt and response tokens, without padding.
        positions: positions that the models computed.
        flops: floating-point operations that the side's way of training needs for these tokens.
        weights_bytes: memory before the first step: models, and the libraries on CPU.
        peak_bytes: most memory during the steps.
        parts: seconds of the parts of a step, where the side tells them.
        notes: figures of this side alone.
    """

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    weights_bytes: int = 0
    peak_bytes: int = 0
    parts: dict[str, list[float]] = field(default_factory=dict)
    notes: dict[str, float] = field(default_factory=dict)


def rows_of_step(setting: Setting, step: int) -> list[Row]:
    """Rows of one optimizer step: lengths as of Dolly, at most MAX_TOKENS; random ids, on which no time depends."""
    random = np.random.default_rng((setting.seed, step))
    prompt_N, response_N = dolly_lengths(setting.rows, seed=setting.seed + step)
    rows = []
    for num_prompt, num_response in zip(prompt_N.tolist(), response_N.tolist(), strict=True):
        ids = random.integers(1, setting.stop_id, num_prompt + num_response).astype(np.int32)
        ids[-1] = setting.stop_id
        rows.append(Row(ids[:num_prompt], ids[num_prompt:]))
    assert max(row.num_tokens for row in rows) <= MAX_TOKENS
    return rows


def read_setting() -> tuple[Setting, Path]:
    """The setting and the report's path, from the command line of a side's process."""
    return Setting(**json.loads(sys.argv[1])), Path(sys.argv[2])


def write_report(report: Report, path: Path) -> None:
    """Give the report to the process that asked for it."""
    path.write_text(json.dumps(asdict(report)), encoding="utf-8")


def timed_steps(
    setting: Setting,
    step: Callable[[int, list[Row]], tuple[int, dict[str, float]]],
    flops: Callable[[list[Row]], float],
) -> Report:
    """Run and time the steps of a side that has a step function.

    Args:
        setting: the setting.
        step: does the step of that number on these rows; gives the positions computed, and seconds of its parts.
        flops: operations that rows need.
    """
    device = setting.torch_device()
    report = Report(weights_bytes=memory_bytes(device))
    for number in range(setting.num_steps):
        rows = rows_of_step(setting, number)
        if number == setting.warm_up_steps:
            reset_peak_memory(device)
        start, cpu_start = now(device), time.process_time()
        positions, parts = step(number, rows)
        seconds, cpu_seconds = now(device) - start, time.process_time() - cpu_start
        if number < setting.warm_up_steps:
            continue
        report.seconds.append(seconds)
        report.cpu_seconds.append(cpu_seconds)
        report.tokens.append(sum(row.num_tokens for row in rows))
        report.positions.append(positions)
        report.flops.append(flops(rows))
        for name, part in parts.items():
            report.parts.setdefault(name, []).append(part)
    report.peak_bytes = peak_memory_bytes(device)
    return report
