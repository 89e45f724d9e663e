"""Figures of the report. Each is drawn once and comes out as inline SVG that follows the page's colours, PNG or CSV."""

from __future__ import annotations

import csv
import html
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from openrlhf_bd.evaluation.run_data import Curve
from openrlhf_bd.evaluation.tables import MainTable

INK, MUTED, GRID = "#1c2733", "#5d6b7a", "#dfe4ea"
# Okabe and Ito's colour-blind safe palette without its yellow, which is faint on white.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#8c6d46")
LineStyle = Literal["-", "--", ":", "-."]
LINE_STYLES: tuple[LineStyle, ...] = ("-", "--", ":", "-.")
# Colours in the SVG become variables of the page's style sheet, which has a value for light and one for dark.
_VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)"} | {
    colour: f"var(--s{index})" for index, colour in enumerate(SERIES)
}

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "text.color": INK,
    "svg.fonttype": "none",
    # Labels are the user's: a dollar sign in one is no formula.
    "text.parse_math": False,
    "svg.hashsalt": "openrlhf_bd",
    "legend.frameon": False,
}

MAX_POINTS = 400
_SMOOTH_FROM = 60


@dataclass(frozen=True, slots=True)
class LegendEntry:
    """One method of the legend: its label, colour and line style, the same in all figures of a report."""

    label: str
    colour: str
    line_style: LineStyle

    @property
    def css_colour(self) -> str:
        return _VARIABLES[self.colour]


@dataclass(frozen=True, slots=True)
class Drawing:
    """A figure, not yet drawn.

    Attributes:
        name: file name without ending.
        title: heading.
        caption: what it shows, one or two sentences.
        size: width and height, inches.
        draw: draws into the axes.
        legend: methods in it; empty where none is needed.
        columns: headings of its data.
        rows: its data, for the CSV file.
    """

    name: str
    title: str
    caption: str
    size: tuple[float, float]
    draw: Callable[[Axes], None]
    legend: tuple[LegendEntry, ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


def legend_entries(labels: Sequence[str]) -> dict[str, LegendEntry]:
    """Colour and line style of each method, by its place in the list."""
    return {
        label: LegendEntry(label, SERIES[i % len(SERIES)], LINE_STYLES[(i // len(SERIES)) % len(LINE_STYLES)])
        for i, label in enumerate(labels)
    }


def to_svg(drawing: Drawing) -> str:
    """The figure as an SVG element for an HTML page: transparent, text as text, colours as the page's variables."""
    with mpl.rc_context(STYLE):
        figure = _figure(drawing, size=drawing.size)
        buffer = io.StringIO()
        metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = _own_ids(svg, slug(drawing.name))
    # Size comes from the page; the view box keeps the proportions.
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r"#[0-9a-f]{6}", lambda match: _VARIABLES.get(match[0], match[0]), svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(drawing.title)}"', 1).strip()


def _own_ids(svg: str, prefix: str) -> str:
    """Ids that nothing refers to go, the others get a prefix: on a page with many figures each id is there once."""
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda match: f' id="{prefix}-{match[1]}"' if match[1] in used else "", svg)
    return re.sub(r'(url\(#|href="#)([^)"]+)', rf"\g<1>{prefix}-\g<2>", svg)


def write_files(drawing: Drawing, folder: Path) -> None:
    """Write the figure as PNG and its data as CSV, `<folder>/<name>.png` and `.csv`."""
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        # Alone on a page there is more room than beside others, and the legend needs some of it.
        width, height = drawing.size
        figure = _figure(drawing, size=(6.0, 6.0 * height / width))
        figure.axes[0].set_title(drawing.title)
        if len(drawing.legend) > 1:
            longest = max(len(entry.label) for entry in drawing.legend)
            handles = [
                mpl.lines.Line2D([], [], color=entry.colour, linestyle=entry.line_style, label=entry.label)
                for entry in drawing.legend
            ]
            figure.legend(
                handles=handles, loc="outside lower center", ncols=max(1, min(len(handles), 75 // (longest + 8)))
            )
        figure.savefig(folder / f"{drawing.name}.png", dpi=200, facecolor="white")
    with (folder / f"{drawing.name}.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(drawing.columns)
        writer.writerows(drawing.rows)


def _figure(drawing: Drawing, *, size: tuple[float, float]) -> Figure:
    # A bare Figure needs no display and is not kept by pyplot.
    figure = Figure(figsize=size, layout="constrained")
    drawing.draw(figure.add_subplot())
    return figure


def moving_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and up to window - 1 before it; values that are not finite are left out."""
    array = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(array)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, array, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    stop = np.arange(1, len(array) + 1)
    start = np.maximum(stop - window, 0)
    number = counts[stop] - counts[start]
    return np.where(number > 0, (sums[stop] - sums[start]) / np.maximum(number, 1), np.nan).tolist()


def thin_out(steps: Sequence[int], values: Sequence[float], max_points: int) -> tuple[list[float], list[float]]:
    """Means over runs of neighbouring points, so that at most max_points are left; not finite means NaN."""
    size = math.ceil(len(steps) / max_points)
    if size <= 1:
        return [float(step) for step in steps], [value if math.isfinite(value) else math.nan for value in values]
    groups = range(0, len(steps), size)
    means = []
    for start in groups:
        finite = [value for value in values[start : start + size] if math.isfinite(value)]
        means.append(math.fsum(finite) / len(finite) if finite else math.nan)
    return [float(np.mean(steps[start : start + size])) for start in groups], means


def curves(
    name: str,
    title: str,
    caption: str,
    unit: str,
    by_label: dict[str, Curve],
    legend: dict[str, LegendEntry],
    *,
    size: tuple[float, float] = (3.7, 2.3),
    scale: float = 1.0,
    smooth: bool = True,
    x_label: str = "optimizer step",
) -> Drawing:
    """A metric over training steps (or over what x_label says), one line a method.

    Long curves are drawn thin, with their moving mean over a thirtieth of their length as the strong line.

    Args:
        name, title, caption: see `Drawing`.
        unit: label of the y axis.
        by_label: curve of each method.
        legend: entries of all methods of the report.
        size: inches.
        scale: factor from the logged value to the shown one.
        smooth: draw moving means; without, markers at the points.
        x_label: of the x axis.
    """

    def draw(axes: Axes) -> None:
        for label, curve in by_label.items():
            entry = legend[label]
            style: dict[str, Any] = {"color": entry.colour, "linestyle": entry.line_style}
            values = [value * scale for value in curve.values]
            if smooth and len(values) >= _SMOOTH_FROM:
                axes.plot(*thin_out(curve.steps, values, MAX_POINTS), color=entry.colour, linewidth=0.6, alpha=0.3)
                values = moving_mean(values, len(values) // 30)
            marker: dict[str, Any] = {} if len(values) > 40 else {"marker": "o", "markersize": 3}
            axes.plot(*thin_out(curve.steps, values, MAX_POINTS), linewidth=1.4, **style, **marker)
        axes.set_xlabel(x_label)
        axes.set_ylabel(unit)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.margins(x=0.02)
        _widen(axes)

    rows = tuple(
        (label, step, value * scale)
        for label, curve in by_label.items()
        for step, value in zip(curve.steps, curve.values, strict=True)
    )
    x_name = "step" if x_label == "optimizer step" else x_label
    return Drawing(
        name, title, caption, size, draw, tuple(legend[label] for label in by_label), ("method", x_name, unit), rows
    )


def score_plot(table: MainTable, column: int, legend: dict[str, LegendEntry]) -> Drawing:
    """One score of all methods: mean, 95 % confidence interval, and every seed as a small dot.

    Args:
        table: the main table of a test set.
        column: which of its scores.
        legend: entries of all methods of the report.
    """
    score = table.scores[column]
    found = [(row.label, row.cells[column].estimate) for row in table.rows]
    shown = [(label, cell) for label, cell in found if cell is not None and math.isfinite(cell.mean)]

    def draw(axes: Axes) -> None:
        for place, (label, cell) in enumerate(shown):
            colour = legend[label].colour
            finite = [value for value in cell.values if math.isfinite(value)]
            if len(finite) > 1:
                axes.plot(finite, [place] * len(finite), "o", color=colour, alpha=0.35, markersize=3.5, mew=0)
            axes.plot(list(cell.interval), [place, place], color=colour, linewidth=2)
            axes.plot([cell.mean], [place], "D", color=colour, markersize=5.5)
            axes.annotate(
                score.format(cell.mean), (cell.mean, place), (0, 6), textcoords="offset points", ha="center", color=INK
            )
        axes.set_yticks(range(len(shown)), [_short(label) for label, _ in shown])
        axes.tick_params(axis="y", labelcolor=INK, length=0)
        axes.set_ylim(len(shown) - 0.5, -0.7)
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.margins(x=0.08)
        direction = {"higher": ", higher is better", "lower": ", lower is better", None: ""}[score.better]
        axes.set_xlabel(f"{score.title}, {score.unit}{direction}")

    rows = tuple((label, cell.mean, *cell.interval) for label, cell in shown)
    return Drawing(
        f"score_{slug(table.dataset)}_{score.name}",
        f"{score.title} on {table.dataset}",
        "Diamond: mean over seeds; bar: its 95 % confidence interval; dots: the seeds.",
        (3.7, 0.75 + 0.36 * max(len(shown), 1)),
        draw,
        (),
        ("method", "mean", "ci95_low", "ci95_high"),
        rows,
    )


def set_sizes(histogram: Sequence[tuple[int, int, int]], *, top_p: float, quantiles: dict[float, int]) -> Drawing:
    """Share of states by the size of their candidate set.

    Args:
        histogram: (smallest size, largest size, states) of each bin.
        top_p: mass p of the sets.
        quantiles: size by quantile, for the caption.
    """
    total = sum(count for _, _, count in histogram)
    names = [str(low) if low == high else f"{low}-{high}" for low, high, _ in histogram]
    shares = [100 * count / total for _, _, count in histogram]

    def draw(axes: Axes) -> None:
        bars = axes.bar(range(len(names)), shares, color=SERIES[0], width=0.78)
        axes.bar_label(bars, [_percent(share) for share in shares], padding=2, color=INK, fontsize=7.5)
        axes.set_xticks(range(len(names)), names, rotation=35 if len(names) > 8 else 0)
        axes.set_xlabel("tokens in the candidate set")
        axes.set_ylabel("states, %")
        axes.grid(axis="x", visible=False)
        axes.margins(y=0.12)

    sizes = ", ".join(f"{size} at {quantile:.0%}" for quantile, size in quantiles.items())
    return Drawing(
        "set_sizes",
        "Size of the candidate sets",
        f"Share of the teacher's states by the size of their top-p set, p = {top_p:g}. Quantiles: {sizes}.",
        (5.0, 2.9),
        draw,
        (),
        ("smallest", "largest", "states"),
        tuple(tuple(row) for row in histogram),
    )


def sorted_mass(mass_K: Sequence[float], *, top_p: float) -> Drawing:
    """Mean teacher mass of the k most probable tokens (Fig. 1 of the paper).

    Args:
        mass_K: mean over states, entry k - 1 for k tokens. Beyond the end of a recorded set its whole mass counts.
        top_p: mass p of the recorded sets.
    """

    def draw(axes: Axes) -> None:
        ranks = range(1, len(mass_K) + 1)
        axes.plot(ranks, mass_K, color=SERIES[0], linewidth=1.6, marker="o", markersize=2.4)
        if top_p < 1:
            axes.axhline(top_p, color=SERIES[1], linewidth=1, linestyle="--")
            axes.annotate(f"p = {top_p:g}", (len(mass_K), top_p), (0, -9), textcoords="offset points", ha="right")
        axes.set_xlabel("k, most probable tokens")
        axes.set_ylabel("mean probability mass")
        axes.set_xlim(0.5, len(mass_K) + 0.5)
        axes.set_ylim(min(0.9, max(0.0, min(mass_K) - 0.08)), 1.005)

    beyond = (
        ""
        if top_p >= 1
        else " The sets end once they hold p, so the curve is a lower bound where k exceeds a set's size: it flattens "
        "at the mean mass of the sets."
    )
    return Drawing(
        "sorted_mass",
        "Sorted probability mass of the teacher",
        f"Mass of the k most probable tokens, mean over the teacher's states (Fig. 1 of the paper).{beyond}",
        (5.0, 2.9),
        draw,
        (),
        ("k", "mean_mass"),
        tuple((k, mass) for k, mass in enumerate(mass_K, start=1)),
    )


def _widen(axes: Axes) -> None:
    """At least one percent of its level on the y axis: a constant must not look like noise."""
    low, high = axes.get_ylim()
    smallest = 0.01 * max(abs(low), abs(high))
    if high - low < smallest:
        middle = (low + high) / 2
        axes.set_ylim(middle - smallest / 2, middle + smallest / 2)


def _percent(share: float) -> str:
    return f"{share:.0f}" if share >= 10 else f"{share:.1f}" if share >= 0.05 else "<0.1"


def _short(label: str) -> str:
    return label if len(label) <= 26 else f"{label[:25]}…"


def slug(text: str) -> str:
    """A name as part of a file name or an id: lower case, letters, digits and underscores."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_") or "data"
