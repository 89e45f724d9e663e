"""The main table: methods by scores, mean and spread over seeds; for the terminal and for the report."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.table import Table
from rich.text import Text

from openrlhf_bd.evaluation.results import DatasetScores, Evaluation, Exposure
from openrlhf_bd.evaluation.statistics import Estimate, estimate, intervals_overlap


@dataclass(frozen=True, slots=True)
class Score:
    """A column of the table.

    Attributes:
        name: field of `DatasetScores`, or with `exposure` before it, of its `Exposure`.
        title: heading.
        unit: as it stands beside the heading and on axes.
        better: which direction is better; None for a score that is only described.
        scale: factor from the stored value to the shown one.
        digits: shown after the point.
        in_terminal: whether the terminal's narrow table has it too.
    """

    name: str
    title: str
    unit: str
    better: Literal["higher", "lower"] | None
    scale: float
    digits: int
    in_terminal: bool = True

    def values(self, item: DatasetScores) -> list[float] | None:
        """The score of each seed, scaled as shown; None where it was not measured."""
        found = self.stored(item)
        return None if found is None else [value * self.scale for value in found]

    def stored(self, item: DatasetScores) -> list[float] | None:
        """The score of each seed as it is stored; None where it was not measured."""
        section, _, name = self.name.rpartition(".")
        source: Exposure | DatasetScores | None = item.exposure if section else item
        found: list[float] | None = None if source is None else getattr(source, name)
        return found

    def format(self, value: float) -> str:
        """The value as it is shown, scaled already."""
        return f"{value:.{self.digits}f}" if math.isfinite(value) else "n/a"


SCORES = (
    Score("rouge_l", "Rouge-L", "0-100", "higher", 1.0, 2),
    Score("accuracy", "Accuracy", "%", "higher", 100.0, 1),
    Score("teacher_nll", "Teacher NLL", "nats/token", "lower", 1.0, 3),
    Score("response_tokens", "Length", "tokens", None, 1.0, 1),
    Score("stop_rate", "Stop rate", "%", None, 100.0, 1),
    Score("distinct_1", "Distinct-1", "%", None, 100.0, 1, in_terminal=False),
    Score("distinct_2", "Distinct-2", "%", None, 100.0, 1),
    Score("exposure.forward_kl", "Forward KL", "nats/token", "lower", 1.0, 3, in_terminal=False),
    Score("exposure.reverse_kl", "Reverse KL", "nats/token", "lower", 1.0, 3, in_terminal=False),
    Score("exposure.out_of_set_rate", "Out of set", "%", None, 100.0, 1, in_terminal=False),
)


@dataclass(frozen=True, slots=True)
class Cell:
    """One score of one method.

    Attributes:
        estimate: over seeds, scaled as shown; None where it was not measured.
        mark: "best" mean of its column, "close" if its interval overlaps with the best one's, or None.
    """

    estimate: Estimate | None
    mark: Literal["best", "close"] | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One method: label, a cell for each column, and whether it is only there for reference (such as the teacher)."""

    label: str
    cells: tuple[Cell, ...]
    is_reference: bool


@dataclass(frozen=True, slots=True)
class MainTable:
    """Scores of all methods on one test set; columns that nobody measured are left out."""

    dataset: str
    num_prompts: tuple[int, ...]
    num_seeds: tuple[int, ...]
    num_unscored: int
    scores: tuple[Score, ...]
    rows: tuple[Row, ...]


def main_table(
    evaluations: Sequence[tuple[str, Evaluation]], dataset: str, *, reference_labels: Collection[str] = ()
) -> MainTable:
    """Put the scores of several methods on one test set side by side.

    Args:
        evaluations: (label, evaluation) of each method; those without this test set are left out.
        dataset: name of the test set.
        reference_labels: methods that do not compete for the best mark.
    """
    found = [(label, item.datasets[dataset]) for label, item in evaluations if dataset in item.datasets]
    scores = tuple(score for score in SCORES if any(score.values(item) is not None for _, item in found))
    estimates = [
        [None if (values := score.values(item)) is None else estimate(values) for score in scores] for _, item in found
    ]
    competing = [label not in reference_labels for label, _ in found]
    marks = [_marks([row[column] for row in estimates], competing, score.better) for column, score in enumerate(scores)]
    rows = tuple(
        Row(
            label,
            tuple(Cell(estimates[i][column], marks[column][i]) for column in range(len(scores))),
            is_reference=not competing[i],
        )
        for i, (label, _) in enumerate(found)
    )
    return MainTable(
        dataset,
        num_prompts=tuple(sorted({item.num_prompts for _, item in found})),
        num_seeds=tuple(sorted({len(item.seeds) for _, item in found})),
        num_unscored=max((item.num_unscored for _, item in found), default=0),
        scores=scores,
        rows=rows,
    )


def _marks(
    column: Sequence[Estimate | None], competing: Sequence[bool], better: Literal["higher", "lower"] | None
) -> list[Literal["best", "close"] | None]:
    """Marks of one column; none where nothing is compared."""
    marks: list[Literal["best", "close"] | None] = [None] * len(column)
    candidates = [
        (i, cell) for i, cell in enumerate(column) if cell is not None and competing[i] and math.isfinite(cell.mean)
    ]
    if better is None or len(candidates) < 2:
        return marks
    sign = 1.0 if better == "higher" else -1.0
    _, best = max(candidates, key=lambda item: sign * item[1].mean)
    for i, cell in candidates:
        if cell.mean == best.mean:
            marks[i] = "best"
        elif intervals_overlap(cell, best):
            marks[i] = "close"
    return marks


def format_spread(score: Score, cell: Estimate) -> str:
    """Mean and standard deviation over seeds: "25.31 ± 0.42"; the mean alone where there is no spread."""
    mean = score.format(cell.mean)
    return mean if cell.std is None else f"{mean} ± {score.format(cell.std)}"


def format_interval(score: Score, cell: Estimate) -> str:
    """95 % confidence interval of the mean: "24.79 to 25.83"; empty where it is unknown."""
    if cell.half_width is None:
        return ""
    low, high = cell.interval
    return f"{score.format(low)} to {score.format(high)}"


def terminal_table(table: MainTable) -> Table:
    """The table for a terminal: best in bold, scores whose interval overlaps with the best one's with a ≈."""
    prompts = " or ".join(str(count) for count in table.num_prompts)
    seeds = " or ".join(str(count) for count in table.num_seeds)
    unscored = f"; {table.num_unscored} without a reference, not in Rouge-L" if table.num_unscored else ""
    rendered = Table(
        title=f"{table.dataset}: {prompts} prompts, {seeds} seeds{unscored}",
        caption="mean±std over seeds; bold: best; ≈: its 95 % interval overlaps the best one's",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        show_edge=False,
    )
    rendered.add_column("method", overflow="fold")
    shown = [column for column, score in enumerate(table.scores) if score.in_terminal]
    for score in (table.scores[column] for column in shown):
        arrow = {"higher": " ↑", "lower": " ↓", None: ""}[score.better]
        title = score.title.replace(" ", "\n")
        rendered.add_column(Text(f"{title}{arrow}\n{score.unit}"), justify="right", no_wrap=True, vertical="bottom")
    for row in table.rows:
        cells = [terminal_cell(table.scores[column], row.cells[column]) for column in shown]
        rendered.add_row(Text(row.label), *cells, style="dim" if row.is_reference else "")
    return rendered


def terminal_cell(score: Score, cell: Cell) -> Text:
    """One score as the terminal shows it: best in bold, a ≈ before those that may be as good."""
    if cell.estimate is None:
        return Text("-")
    # Tighter than in the report, without the spread of scores that are not compared: it is to fit into 80 columns.
    compared = score.better is not None
    text = format_spread(score, cell.estimate).replace(" ", "") if compared else score.format(cell.estimate.mean)
    return Text(f"≈{text}" if cell.mark == "close" else text, style="bold" if cell.mark == "best" else "")
