"""Tables as they are shown: one form for the page, the picture and the CSV file."""

from __future__ import annotations

import csv
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from openrlhf_bd.evaluation.figures import GRID, INK, MUTED, STYLE

# "best" of its column, "close" to the best, "published" by others, "muted".
CellStyle = Literal["", "best", "close", "published", "muted"]
NOTHING = "–"

_COLUMN_INCHES, _CHARACTER_INCHES, _LINE_INCHES = 0.25, 0.075, 0.17


@dataclass(frozen=True, slots=True)
class SheetCell:
    """A cell: its text, a smaller line below, and what it is."""

    text: str
    small: str = ""
    style: CellStyle = ""


EMPTY = SheetCell(NOTHING, style="muted")


@dataclass(frozen=True, slots=True)
class Heading:
    """A heading over `span` columns, with a smaller line below."""

    text: str
    small: str = ""
    span: int = 1


@dataclass(frozen=True, slots=True)
class SheetRow:
    """A row: its label, a smaller line below it, its cells, and whether it is there for reference only.

    A row without cells is a heading of the rows below it.
    """

    label: str
    cells: tuple[SheetCell, ...]
    small: str = ""
    is_reference: bool = False


@dataclass(frozen=True, slots=True)
class Sheet:
    """A table.

    Attributes:
        name: file name without ending.
        title: heading.
        corner: heading of the row labels.
        headings: rows of headings, each as wide as the cells of a row.
        rows: rows.
        note: what its reader has to know.
        columns: headings of its data.
        data: its data, unrounded, for the CSV file.
    """

    name: str
    title: str
    corner: str
    headings: tuple[tuple[Heading, ...], ...]
    rows: tuple[SheetRow, ...]
    note: str
    columns: tuple[str, ...]
    data: tuple[tuple[Any, ...], ...]

    @property
    def width(self) -> int:
        """Columns beside the labels."""
        return sum(heading.span for heading in self.headings[0])


def write_sheet(sheet: Sheet, folder: Path) -> None:
    """Write the table as PNG and its data as CSV, `<folder>/<name>.png` and `.csv`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{sheet.name}.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(sheet.columns)
        writer.writerows(sheet.data)
    with mpl.rc_context(STYLE):
        _picture(sheet).savefig(folder / f"{sheet.name}.png", dpi=150, facecolor="white")


def _picture(sheet: Sheet) -> Figure:
    widths = _widths(sheet)
    note = textwrap.wrap(sheet.note, max(40, int(sum(widths) / 0.068)))
    heights = [2 if any(item.small for item in row) else 1 for row in sheet.headings]
    heights += [1 + any(line for line in (row.small, *(cell.small for cell in row.cells))) for row in sheet.rows]
    height = _LINE_INCHES * (sum(heights) + 0.6 * len(heights) + 3 + len(note))
    # A bare Figure needs no display and is not kept by pyplot.
    figure = Figure(figsize=(sum(widths) + 0.2, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, sum(widths) + 0.2)
    axes.set_ylim(height, 0)
    y = 1.4 * _LINE_INCHES
    axes.text(0.1, y, sheet.title, fontsize=10, color=INK, va="center")
    y += 1.4 * _LINE_INCHES
    for index, lines in enumerate(heights):
        row_height = _LINE_INCHES * (lines + 0.6)
        middle = y + row_height / 2
        if index < len(sheet.headings):
            _draw_headings(axes, sheet, index, widths, middle)
        else:
            _draw_row(axes, sheet.rows[index - len(sheet.headings)], widths, middle)
        y += row_height
        axes.plot([0.1, sum(widths) + 0.1], [y, y], color=GRID, linewidth=0.7)
    axes.text(0.1, y + _LINE_INCHES / 2, "\n".join(note), fontsize=7, color=MUTED, va="top")
    return figure


def _draw_headings(axes: Axes, sheet: Sheet, index: int, widths: Sequence[float], middle: float) -> None:
    if index == len(sheet.headings) - 1:
        axes.text(0.1, middle, sheet.corner, color=MUTED, fontsize=8, va="center")
    column = 0
    for heading in sheet.headings[index]:
        right = 0.1 + sum(widths[: 1 + column + heading.span])
        left = 0.1 + sum(widths[: 1 + column])
        x, side = ((left + right) / 2, "center") if heading.span > 1 else (right, "right")
        text = f"{heading.text}\n{heading.small}" if heading.small else heading.text
        axes.text(x, middle, text, color=MUTED, fontsize=8, va="center", ha=side)
        column += heading.span


def _draw_row(axes: Axes, row: SheetRow, widths: Sequence[float], middle: float) -> None:
    colour = MUTED if row.is_reference else INK
    label = f"{row.label}\n{row.small}" if row.small else row.label
    weight = "normal" if row.cells else "bold"
    axes.text(0.1, middle, label, color=colour, weight=weight, fontsize=8, va="center")
    for column, cell in enumerate(row.cells):
        text = f"{cell.text}\n{cell.small}" if cell.small else cell.text
        axes.text(
            0.1 + sum(widths[: column + 2]),
            middle,
            text,
            color=MUTED if cell.style in ("published", "muted") else colour,
            weight="bold" if cell.style == "best" else "normal",
            style="italic" if cell.style == "published" else "normal",
            fontsize=8,
            va="center",
            ha="right",
        )


def _widths(sheet: Sheet) -> list[float]:
    """Width of each column, inches: the labels' first."""

    def inches(texts: Sequence[str]) -> float:
        return _COLUMN_INCHES + _CHARACTER_INCHES * max(map(len, texts), default=1)

    labels = [sheet.corner, *(part for row in sheet.rows if row.cells for part in (row.label, row.small))]
    widths = [inches(labels)]
    filled = [row for row in sheet.rows if row.cells]
    for column in range(len(filled[0].cells) if filled else 0):
        cells = [row.cells[column] for row in filled]
        headings = [
            part
            for row in sheet.headings
            if all(heading.span == 1 for heading in row)
            for part in (row[column].text, row[column].small)
        ]
        widths.append(inches([*headings, *(cell.text for cell in cells), *(cell.small for cell in cells)]))
    return widths
