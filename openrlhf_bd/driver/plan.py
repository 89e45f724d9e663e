"""What a job is going to do, in numbers: stages, rows, tokens, steps, actors, GPUs, files and disk space."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

from openrlhf_bd.data.prompts import PromptTable
from openrlhf_bd.driver.disk import DiskUse, disk_places
from openrlhf_bd.driver.model_files import ModelFacts
from openrlhf_bd.paths import format_bytes

if TYPE_CHECKING:
    from openrlhf_bd.driver.gpu_memory import GpuUse


@dataclass(frozen=True, slots=True)
class ActorGroup:
    """Actors of one kind that a stage starts.

    Attributes:
        what: name in messages, "student ranks".
        num_actors: how many.
        gpus_each: GPUs of each.
        flags: the options that asked for them, with their values.
    """

    what: str
    num_actors: int
    gpus_each: int
    flags: str

    @property
    def num_gpus(self) -> int:
        return self.num_actors * self.gpus_each


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage. Stages run one after another, so a job needs as many GPUs as its largest stage.

    Attributes:
        name: of the stage.
        rows: rows, or prompts times seeds.
        tokens: prompt and response tokens at most; each epoch counts.
        steps: optimizer steps, or None.
        actors: what is started.
        files: what is written, or what is read if that is there already.
    """

    name: str
    rows: int
    tokens: int
    steps: int | None
    actors: tuple[ActorGroup, ...]
    files: str

    @property
    def num_gpus(self) -> int:
        return sum(group.num_gpus for group in self.actors)


@dataclass(frozen=True, slots=True)
class Plan:
    """The result of a job's checks. Printing it through rich shows the table.

    Attributes:
        stages: in the order in which they run.
        data_sets: one line for each data set that was read.
        tables: the prompts that were read: "train", "validation", and "test:<name>".
        models: the models that stages load, by the option that names each.
        notes: what the stages put into memory that is easily overlooked.
        warnings: what is allowed and probably not meant.
        disk: what takes disk space.
        gpu: what each actor keeps in its GPUs, where models' sizes are known; None: everything runs on CPUs.
    """

    stages: tuple[StagePlan, ...]
    data_sets: tuple[str, ...]
    tables: Mapping[str, PromptTable] = field(repr=False)
    models: Mapping[str, ModelFacts] = field(repr=False)
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    disk: tuple[DiskUse, ...]
    gpu: tuple[GpuUse, ...] | None = None

    @property
    def num_gpus(self) -> int:
        """GPUs of the largest stage."""
        return max((stage.num_gpus for stage in self.stages), default=0)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # Narrow enough for 80 columns, the width of a log: what is long stands below the table.
        table = Table("stage", title="plan", title_justify="left")
        for heading in ("rows", "tokens, at most", "steps", "GPUs"):
            table.add_column(heading, justify="right")
        table.add_column("actors")
        for stage in self.stages:
            actors = "\n".join(f"{group.num_actors} {group.what}" for group in stage.actors)
            steps = f"{stage.steps:,}" if stage.steps is not None else ""
            table.add_row(stage.name, f"{stage.rows:,}", f"{stage.tokens:,}", steps, str(stage.num_gpus), actors)
        lines = [
            *self.data_sets,
            *(f"{stage.name} writes {stage.files}" for stage in self.stages),
            *self.notes,
            f"GPUs of the largest stage: {self.num_gpus}",
            *self._gpu_lines(),
            *(f"disk space: {use.what} {format_bytes(use.num_bytes)}, {use.basis}" for use in self.disk),
            *(f"disk space: {format_bytes(place.free_bytes)} free in {place.path}" for place in disk_places(self.disk)),
            *(f"warning: {warning}" for warning in self.warnings),
        ]
        yield Group(table, *(Text(line) for line in lines))

    def _gpu_lines(self) -> list[str]:
        if self.gpu is None:
            return ["GPU memory: not checked, there is no GPU here: their number is only a number"]
        return [use.line() for use in self.gpu]
