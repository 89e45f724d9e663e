"""What an experiment shows on the terminal: the plan, a headline for each stage, and what each took."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from rich import box
from rich.markup import escape
from rich.table import Table

from openrlhf_bd.experiments.record import PipelineRecord

if TYPE_CHECKING:
    from openrlhf_bd.experiments.running import Run

_SHOWN = 3
_STYLES = {"finished": "green", "resumes": "yellow", "new": ""}


def plan_table(run: Run) -> Table:
    """Each stage with its folder, its state, and the numbers of the stages that it depends on."""
    table = Table(title="plan", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for heading in ("", "folder", "kind", "state", "needs"):
        # Numbers of stages may take further lines; a folder's name is for copying.
        table.add_column(heading, no_wrap=heading != "needs", justify="right" if not heading else "left")
    numbers = {name: str(number) for number, name in enumerate(run.work, start=1)}
    for name, work in run.work.items():
        state = run.state(name)
        shown = f"[{_STYLES[state]}]{state}[/]" if _STYLES[state] else state
        shown = shown if name in run.asked else f"[dim]{state}, left out[/dim]"
        needs = " ".join(numbers[other] for other in work.stage.depends_on)
        table.add_row(numbers[name], work.stage.folder.name, work.stage.kind, shown, needs)
    return table


def headline(run: Run, waiting: Sequence[str], number: int, record: PipelineRecord, elapsed_s: float) -> str:
    """Of a stage that begins: which of how many, time so far, and time left as stages of the same kind took it.

    Args:
        run: the experiment.
        waiting: names of the stages that are run.
        number: of the stage that begins, from 0.
        record: what earlier stages took.
        elapsed_s: since the first stage began.
    """
    name = waiting[number]
    left = remaining_s([run.work[other].stage.kind for other in waiting[number:]], record)
    text = f"[bold]{number + 1}/{len(waiting)} {escape(name)}[/bold] ({run.work[name].stage.kind})"
    if number:
        text += f", {format_seconds(elapsed_s)} so far"
    return text + (f", about {format_seconds(left)} left" if left is not None else "")


def remaining_s(kinds: Sequence[str], record: PipelineRecord) -> float | None:
    """Seconds that stages will take, as finished ones of the same kinds did; None: of some kind none is finished."""
    seconds = {kind: record.seconds_of_kind(kind) for kind in set(kinds)}
    if not all(seconds.values()):
        return None
    return sum(fmean(seconds[kind]) for kind in kinds)


def final_table(run: Run, ran: Collection[str], record: PipelineRecord) -> Table:
    """What each stage took, in this run or before."""
    table = Table(title="stages", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for heading in ("folder", "kind", "state"):
        table.add_column(heading, overflow="fold")
    table.add_column("seconds", justify="right")
    for name in run.asked:
        stage = run.work[name].stage
        seconds = record.stage(stage).get("seconds")
        state = "finished" if name in ran else "reused"
        table.add_row(stage.folder.name, stage.kind, state, f"{seconds:,.0f}" if seconds is not None else "")
    return table


def some_of(names: Sequence[str]) -> str:
    """ "a, b, c and 59 more"."""
    shown, more = ", ".join(names[:_SHOWN]), len(names) - _SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


def format_seconds(seconds: float) -> str:
    """ "42 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
