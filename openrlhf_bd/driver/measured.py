"""The measured plan: what a job will take, computed from a sample, as a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from operator import add

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from openrlhf_bd.driver.disk import TEACHER_DATA, DiskUse, disk_places
from openrlhf_bd.driver.estimate import Amount, Estimate
from openrlhf_bd.driver.plan import Plan
from openrlhf_bd.errors import ConfigError
from openrlhf_bd.paths import format_bytes


@dataclass(frozen=True, slots=True)
class MeasuredPlan:
    """What a job will take. Printing it through rich shows the table.

    Attributes:
        plan: of the job's checks.
        estimates: by the teacher's name; at least one.
        num_engines: teacher engines of the job.
        rank_bytes: memory of a student rank without activations; None where none trains, or its size is not known.
        driver_bytes: resident memory of the driver.
    """

    plan: Plan
    estimates: Mapping[str, Estimate]
    num_engines: int
    rank_bytes: int | None
    driver_bytes: int

    def disk(self, *, end: str = "value") -> tuple[DiskUse, ...]:
        """The plan's, with the measured size of the rows: its "value", or the "low" or "high" end of its range."""
        num_bytes = int(getattr(self._store_bytes, end))
        return tuple(
            replace(use, num_bytes=num_bytes, basis="measured") if use.what == TEACHER_DATA else use
            for use in self.plan.disk
        )

    def require_room(self) -> str | None:
        """A warning where the upper end of the range does not fit on a disk.

        Raises:
            ConfigError: not even the lower end fits.
        """
        for place in disk_places(self.disk(end="low")):
            if place.used_bytes > place.free_bytes:
                raise ConfigError(
                    f"{place.path}: {format_bytes(place.free_bytes)} are free there, the job takes at least "
                    f"{format_bytes(place.used_bytes)}; make room or name a folder on another disk "
                    "(--teacher.store_path, --ckpt.output_dir), or store less: a smaller --algo.distill.top_p, "
                    "--teacher.record_logprobs false, shorter responses (--rollout.max_new_tokens)"
                )
        for place in disk_places(self.disk(end="high")):
            if place.used_bytes > place.free_bytes:
                return (
                    f"{format_bytes(place.used_bytes)}, the upper end of the range, do not fit into the "
                    f"{format_bytes(place.free_bytes)} that are free in {place.path}"
                )
        return None

    @property
    def _store_bytes(self) -> Amount:
        return reduce(add, (found.store_bytes for found in self.estimates.values()))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table("", title="what the job will take", title_justify="left")
        for heading in ("estimate", "range", "from"):
            table.add_column(heading, justify="right" if heading != "from" else "left")
        for name, found in self.estimates.items():
            for line in _teacher_lines(found):
                table.add_row(*(Text(cell) for cell in line))
            table.add_section()
            if len(self.estimates) > 1:
                table.add_row(Text(f"(teacher {name})"))
                table.add_section()
        for section in (self._disk_lines(), self._time_lines(), self._memory_lines()):
            for line in section:
                table.add_row(*(Text(cell) for cell in line))
            table.add_section()
        yield table
        yield Text(
            "range: two standard errors over the rows of the sample; for time also between the sample's own speed and "
            "the fitted one. Training, with the rows that are made in it, and evaluation are not timed."
        )

    def _disk_lines(self) -> list[tuple[str, str, str, str]]:
        store = self._store_bytes
        lines = []
        for use in self.disk():
            is_store = use.what == TEACHER_DATA
            shown = _range(store, format_bytes) if is_store else ""
            lines.append((f"disk: {use.what}", format_bytes(use.num_bytes), shown, use.basis))
        places = disk_places(self.disk())
        lines += [("disk: free", format_bytes(place.free_bytes), "", str(place.path)) for place in places]
        return lines

    def _time_lines(self) -> list[tuple[str, str, str, str]]:
        starts_s = sum(found.start_s for found in self.estimates.values())
        work_s = reduce(add, (found.engine_s for found in self.estimates.values()))
        engine_s = work_s + Amount(starts_s, starts_s, starts_s).times(self.num_engines)
        wall_s = engine_s.times(1 / self.num_engines)
        start = f"start of an engine {format_duration(starts_s)}"
        return [
            (
                "engine hours",
                _hours(engine_s.value),
                _range(engine_s, _hours),
                f"{self.num_engines} x {start}, and work",
            ),
            (
                "generation, wall time",
                format_duration(wall_s.value),
                _range(wall_s, format_duration),
                "all engines busy",
            ),
        ]

    def _memory_lines(self) -> list[tuple[str, str, str, str]]:
        lines = []
        for found in self.estimates.values():
            sample = found.sample
            if sample.cache_bytes is None:
                full, basis = "", "its process; on the GPU --teacher.gpu_memory_utilization"
            else:
                full = f"up to {format_bytes(sample.engine_bytes + sample.cache_bytes)}"
                basis = "after the sample; up to: with its cache full"
            lines.append(("memory: a teacher engine", format_bytes(sample.engine_bytes), full, basis))
        if self.rank_bytes is not None:
            basis = "computed: weights, gradients, optimizer; activations on top"
            lines.append(("memory: a student rank", format_bytes(self.rank_bytes), "", basis))
        lines.append(("memory: driver", format_bytes(self.driver_bytes), "", "now, with all prompts read"))
        return lines


def _teacher_lines(found: Estimate) -> list[tuple[str, str, str, str]]:
    sample, summary = found.sample, found.sample.summary
    stopped = summary.finish_reasons.get("stop", 0) / summary.num_rows
    lengths = f"mean {sample.lengths_N.mean():.1f}, 95 % {np.quantile(sample.lengths_N, 0.95):.0f}, {stopped:.0%} stop"
    lines = [
        ("rows", f"{found.num_rows:,}", "", f"a sample of {summary.num_rows}"),
        ("response tokens", _count(found.response_tokens.value), _range(found.response_tokens, _count), lengths),
    ]
    if summary.sets is not None:
        sets = summary.sets
        quantiles = ", ".join(f"{quantile:.0%} {size:,}" for quantile, size in sets.size_quantiles.items())
        lines.append(("candidates a set", f"{sets.mean_size:.2f}", "", quantiles))
    lines.append(("bytes a token on disk", f"{found.bytes_per_token:.1f}", "", "two shards of the sample"))
    sampled = max(sample.calls, key=lambda call: call.num_rows)
    speed = f"{sampled.num_tokens / sampled.wall_s:,.0f} with the sample's {sampled.num_rows} rows at once"
    lines.append((f"tokens/s, {found.at_once} rows at once", f"{found.tokens_per_s:,.0f}", "", f"fitted; {speed}"))
    return lines


def _range(amount: Amount, shown: Callable[[float], str]) -> str:
    return f"{shown(amount.low)} - {shown(amount.high)}"


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _hours(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:,.1f}" if hours >= 10 else f"{hours:.2g}"


def format_duration(seconds: float) -> str:
    """Seconds in the largest unit that leaves at least 1: "3.5 min"."""
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
