"""Progress of long work: one bar with rate and time left on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

console = Console(soft_wrap=True)
_LOG_INTERVAL_S = 10.0


class _RateColumn(ProgressColumn):
    """Units a second, once it is known."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.2f}/s" if task.speed is not None else "")


class StageProgress:
    """Progress of one stage. `advance` is cheap; it prints at most once an interval where there is no terminal."""

    def __init__(self, title: str, total: int, unit: str, bar: Progress | None) -> None:
        self._title, self._total, self._unit, self._bar = title, total, unit, bar
        self._task = bar.add_task(title, total=total, note="") if bar else None
        self._done = 0
        self._at_start = 0
        self._started = self._printed = time.monotonic()

    def start_at(self, done: int) -> None:
        """Say what an earlier run has finished already; it does not count in the rate."""
        self._done = self._at_start = done
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=done)

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count finished units; `note` stands beside the bar (a loss, a rate)."""
        self._done += count
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=self._done, note=note)
            return
        now = time.monotonic()
        if now - self._printed >= _LOG_INTERVAL_S or self._done >= self._total:
            self._printed = now
            rate = (self._done - self._at_start) / max(now - self._started, 1e-9)
            left = (self._total - self._done) / rate if rate > 0 else float("inf")
            print(
                f"{self._title}: {self._done}/{self._total} {self._unit}, {rate:.2f}/s, {left:.0f} s left  {note}",
                flush=True,
            )


@contextmanager
def stage_progress(title: str, total: int, unit: str) -> Iterator[StageProgress]:
    """A bar for one stage while the block runs."""
    if not (sys.stdout.isatty() and console.is_terminal):
        yield StageProgress(title, total, unit, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn(unit),
        _RateColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bar:
        yield StageProgress(title, total, unit, bar)
