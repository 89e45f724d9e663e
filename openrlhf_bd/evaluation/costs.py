"""Time: until the best validation score (Table 3 of the paper), and of each stage of an experiment."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from openrlhf_bd.evaluation.experiment_data import ExperimentData, Group, StageRecord
from openrlhf_bd.evaluation.overview import format_seconds
from openrlhf_bd.evaluation.published import published
from openrlhf_bd.evaluation.run_data import RunData
from openrlhf_bd.evaluation.sheets import EMPTY, Heading, Sheet, SheetCell, SheetRow

VALIDATION_SCORE = "eval/rouge_l"
# What a step's time is made of; the first step's is not the distance of two records.
_STEP_PARTS = (
    "train/time_rollout_wait_s",
    "train/time_data_s",
    "train/time_forward_backward_s",
    "train/time_optimizer_s",
)


@dataclass(frozen=True, slots=True)
class TimeToBest:
    """When a run reached its best validation score.

    Attributes:
        step: of the best score; the first such step.
        num_steps: last step with metrics.
        score: validation Rouge-L, 0 to 100.
        training_s: wall clock from the beginning of the first step to the validation of that step, seconds. Pauses
            between a kill and the start after it are in it.
        rows_s: time to make the teacher's rows beforehand, seconds; 0 where they are made while training; None where
            it is not known.
    """

    step: int
    num_steps: int
    score: float
    training_s: float
    rows_s: float | None

    @property
    def whole_s(self) -> float | None:
        """With the time to make the rows."""
        return None if self.rows_s is None else self.training_s + self.rows_s


def time_to_best(run: RunData, rows_seconds: Mapping[Path, float]) -> TimeToBest | None:
    """When a run reached its best validation score; None where scores or times are missing.

    Args:
        run: with metrics.
        rows_seconds: seconds that it took to make the stores of the experiment.
    """
    scores, clock = run.curves.get(VALIDATION_SCORE), run.clock
    if scores is None or clock is None:
        return None
    at = dict(zip(clock.steps, clock.values, strict=True))
    found = [
        (value, step)
        for step, value in zip(scores.steps, scores.values, strict=True)
        if math.isfinite(value) and step in at
    ]
    if not found:
        return None
    score, step = max(found, key=lambda item: (item[0], -item[1]))
    first = clock.steps[0]
    first_s = math.fsum(_value_at(run, name, first) for name in _STEP_PARTS)
    return TimeToBest(step, clock.steps[-1], score, at[step] - at[first] + first_s, _rows_seconds(run, rows_seconds))


def time_sheet(data: ExperimentData) -> Sheet | None:
    """Table 3 with our runs: time to the best validation score, and the ratio of BD to MiniLLM beside the paper's."""
    rows_seconds = {
        (stage.folder / "teacher_data").resolve(): stage.seconds
        for stage in data.stages
        if stage.kind == "generate" and stage.seconds is not None
    }
    found = [
        (group, run.label, time)
        for group in data.groups
        if group.compares
        for run in group.methods
        if run.label not in group.reference_labels and (time := time_to_best(run, rows_seconds)) is not None
    ]
    if not found:
        return None
    table = published("table3")
    rows: list[SheetRow] = []
    for group in data.groups:
        times = {label: time for of, label, time in found if of is group}
        if times:
            rows.append(SheetRow(group.name, ()))
        rows += [_time_row(label, time, table.find(group.name, label, "hours")) for label, time in times.items()]
        if (ratio := _ratio_row(group, times)) is not None:
            rows.append(ratio)
    return Sheet(
        "time_to_best",
        "Time to the best validation Rouge-L",
        "Method",
        (
            (
                Heading("best step"),
                Heading("score", "validation"),
                Heading("training", "to that step"),
                Heading("rows", "made before"),
                Heading("both"),
                Heading("published", "paper, 4 A40"),
            ),
        ),
        tuple(rows),
        "Wall clock, from metrics.jsonl; validation is in it, and so are pauses of runs that were killed and started "
        "again. Rows that a method makes while it trains are part of its training time. Times compare only on equal "
        "machines with nothing else running: the published ones are of others. " + " ".join(table.notes),
        ("group", "method", "step", "steps", "rouge_l", "training_s", "rows_s", "published_hours"),
        tuple(
            (group.name, label, time.step, time.num_steps, time.score, round(time.training_s, 1), time.rows_s,
             table.find(group.name, label, "hours"))
            for group, label, time in found
        ),
    )  # fmt: skip


def cost_sheet(stages: Sequence[StageRecord], *, price: float | None = None) -> Sheet:
    """Wall time and accelerator hours of each stage.

    Args:
        stages: of an experiment.
        price: of an accelerator's hour, in any currency; None leaves the column of costs out.
    """
    totals = [stage.seconds for stage in stages if stage.seconds is not None]
    hours = [_gpu_hours(stage) for stage in stages]
    known = [value for value in hours if value is not None]
    rows = [
        SheetRow(
            stage.name,
            (
                SheetCell(stage.kind),
                SheetCell(stage.state or "unknown", style="" if stage.finished else "muted"),
                EMPTY if stage.seconds is None else SheetCell(format_seconds(stage.seconds)),
                EMPTY if stage.gpus is None else SheetCell(f"{stage.gpus:g}"),
                EMPTY if spent is None else SheetCell(_hours(spent)),
                *_price_cells(spent, price),
            ),
        )
        for stage, spent in zip(stages, hours, strict=True)
    ]
    if totals:
        total = SheetCell(_hours(math.fsum(known)), style="best") if known else EMPTY
        seconds = SheetCell(format_seconds(math.fsum(totals)), style="best")
        rows.append(
            SheetRow(
                "All stages",
                (SheetCell(""), SheetCell(""), seconds, SheetCell(""), total, *_price_cells(math.fsum(known), price)),
            )
        )
    unknown = sum(stage.seconds is None for stage in stages)
    left_out = f" {unknown} of {len(stages)} stages have no time, and are not in the sum." if unknown else ""
    return Sheet(
        "cost",
        "Time and cost by stage",
        "Stage",
        ((*map(Heading, ("kind", "state", "wall time", "GPUs", "GPU hours")), *_price_headings(price)),),
        tuple(rows),
        "GPU hours: wall time times the accelerators that Ray gave the stage; on a machine without any they are "
        f"numbers only. A stage that was reused keeps the time of the run that made it.{left_out}",
        ("stage", "kind", "state", "seconds", "gpus", "gpu_hours"),
        tuple(
            (stage.name, stage.kind, stage.state, stage.seconds, stage.gpus, spent)
            for stage, spent in zip(stages, hours, strict=True)
        ),
    )


def _time_row(label: str, time: TimeToBest, published_hours: float | None) -> SheetRow:
    return SheetRow(
        label,
        (
            SheetCell(f"{time.step:,}", f"of {time.num_steps:,}"),
            SheetCell(f"{time.score:.2f}"),
            SheetCell(format_seconds(time.training_s)),
            _seconds_cell(time.rows_s),
            _seconds_cell(time.whole_s),
            EMPTY if published_hours is None else SheetCell(f"{published_hours:g} h", style="published"),
        ),
    )


def _seconds_cell(seconds: float | None) -> SheetCell:
    return SheetCell("unknown", style="muted") if seconds is None else SheetCell(format_seconds(seconds))


def _ratio_row(group: Group, times: Mapping[str, TimeToBest]) -> SheetRow | None:
    """BD over MiniLLM, ours and the paper's; None where one of them is not there."""
    mine, other = times.get("BD"), times.get("MiniLLM")
    if mine is None or other is None or other.training_s <= 0:
        return None
    whole = mine.whole_s / other.whole_s if mine.whole_s is not None and other.whole_s else None
    hours = [published("table3").find(group.name, label, "hours") for label in ("BD", "MiniLLM")]
    paper = hours[0] / hours[1] if hours[0] is not None and hours[1] is not None else None
    return SheetRow(
        "BD / MiniLLM",
        (
            SheetCell(""),
            SheetCell(""),
            SheetCell(f"{mine.training_s / other.training_s:.2f}", style="best"),
            SheetCell(""),
            EMPTY if whole is None else SheetCell(f"{whole:.2f}", style="best"),
            EMPTY if paper is None else SheetCell(f"{paper:.2f}", style="published"),
        ),
    )


def _rows_seconds(run: RunData, rows_seconds: Mapping[Path, float]) -> float | None:
    if run.option("algo.distill.mode") == "online":
        return 0.0
    store = run.option("teacher.store_path")
    if store and (seconds := rows_seconds.get(Path(str(store)).resolve())) is not None:
        return seconds
    return None if store else run.stage_seconds.get("rows")


def _value_at(run: RunData, name: str, step: int) -> float:
    curve = run.curves.get(name)
    if curve is None or step not in curve.steps:
        return 0.0
    value = curve.values[curve.steps.index(step)]
    return value if math.isfinite(value) else 0.0


def _gpu_hours(stage: StageRecord) -> float | None:
    return None if stage.seconds is None or stage.gpus is None else stage.seconds * stage.gpus / 3600


def _price_headings(price: float | None) -> list[Heading]:
    return [] if price is None else [Heading("cost", f"{price:g} a GPU hour")]


def _price_cells(hours: float | None, price: float | None) -> list[SheetCell]:
    if price is None:
        return []
    return [EMPTY if hours is None else SheetCell(f"{hours * price:,.2f}")]


def _hours(hours: float) -> str:
    return f"{hours:.1f}" if hours >= 10 else f"{hours:.2f}"
