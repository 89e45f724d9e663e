"""The figure of `openrlhf-bd theory`: every measured gap against the bound kappa(p), a panel for each gamma."""

# N MDPs

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from openrlhf_bd.evaluation.figures import GRID, INK, MUTED, SERIES, STYLE

if TYPE_CHECKING:
    from openrlhf_bd.cli.theory import Cell

# Which gap of which MDPs, label, colour, marker, and where the strip stands beside x = kappa(p), in widths of a strip.
_STRIPS = (
    ("projected_gap", False, "projected teacher (Prop. 2), MDPs that never end", SERIES[0], "o", -1.05),
    ("projected_gap", True, "the same, MDPs where every policy ends", SERIES[5], "o", 0.0),
    ("exclusive_gap", None, "if the sets leave out the action that crosses p", SERIES[1], "x", 1.05),
)
_DECADES = 2.5  # shown below the lowest bound, at most: gaps of nearly deterministic teachers go to 0


def draw_gaps(cells: Sequence[Cell], path: Path) -> None:
    """Draw the gaps of all MDPs to a PNG file.

    Args:
        cells: gaps by gamma and p.
        path: the file to write.
    """
    gammas = list(dict.fromkeys(cell.gamma for cell in cells))
    with mpl.rc_context({**STYLE, "font.size": 9.5, "axes.titlesize": 11}):
        figure = Figure(figsize=(1.2 + 3.0 * len(gammas), 4.6), layout="constrained")
        panels = figure.subplots(1, len(gammas), squeeze=False)[0]
        for axes, gamma in zip(panels, gammas, strict=True):
            _draw_panel(axes, [cell for cell in cells if cell.gamma == gamma])
            axes.set_title(f"γ = {gamma:g}")
        panels[0].set_ylabel("measured gap |Q* − Q̂|, nats")
        handles, labels = panels[0].get_legend_handles_labels()
        legend = figure.legend(handles, labels, loc="outside lower center", ncols=min(2, len(gammas)))
        for handle in legend.legend_handles:
            if handle is not None:
                handle.set_alpha(1.0)
        figure.savefig(path, dpi=150, facecolor="white")


def _draw_panel(axes: Axes, cells: Sequence[Cell]) -> None:
    cells = sorted(cells, key=lambda cell: cell.gaps[0].kappa_p)
    bound_K = np.array([cell.gaps[0].kappa_p for cell in cells])
    step = np.diff(np.log10(bound_K)).min(initial=0.5)
    outer = 10 ** (0.6 * step)
    # Each bound is level over its strips: on a slope, points beside x = kappa(p) would look as if they broke it.
    edges_K1 = np.concatenate([[bound_K[0] / outer], np.sqrt(bound_K[1:] * bound_K[:-1]), [bound_K[-1] * outer]])
    lowest = min(min(gaps.projected_gap for gaps in cell.gaps) for cell in cells)
    floor = max(lowest / 1.5, bound_K[0] / 10**_DECADES)
    top = 3 * max(bound_K[-1], *(gaps.exclusive_gap for cell in cells for gaps in cell.gaps))

    axes.set(xscale="log", yscale="log", xlim=(edges_K1[0], edges_K1[-1]), ylim=(floor, top))
    axes.stairs(np.full_like(bound_K, top), edges_K1, baseline=bound_K, fill=True, color=GRID, alpha=0.55, zorder=0)
    axes.stairs(
        bound_K, edges_K1, baseline=None, color=INK, linewidth=1.6, zorder=3, label="bound κ(p) = −γ/(1−γ) log p"
    )
    for number, cell in enumerate(cells):
        _draw_strips(axes, cell, width=step / 4, floor=floor, with_labels=number == 0)
    _label_bounds(axes, cells)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="x", visible=False)


def _draw_strips(axes: Axes, cell: Cell, *, width: float, floor: float, with_labels: bool) -> None:
    rng = np.random.default_rng(0)
    for name, ends, label, colour, marker, place in _STRIPS:
        gap_N = np.array([getattr(gaps, name) for gaps in cell.gaps if ends in (None, gaps.ends)])
        x_N = cell.gaps[0].kappa_p * 10 ** (width * (place + rng.uniform(-0.4, 0.4, size=len(gap_N))))
        axes.scatter(
            x_N,
            gap_N.clip(min=floor),
            s=11,
            linewidth=0.8 if marker == "x" else 0,
            color=colour,
            marker=marker,
            alpha=0.55,
            label=label if with_labels else None,
            zorder=2,
            clip_on=False,
        )


def _label_bounds(axes: Axes, cells: Sequence[Cell]) -> None:
    """Ticks at the bounds, and p above them."""
    bounds = [cell.gaps[0].kappa_p for cell in cells]
    axes.set_xlabel("bound κ(p), nats")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(bounds, [f"{bound:.3g}" for bound in bounds])
    for cell, bound in zip(cells, bounds, strict=True):
        axes.annotate(
            f"p = {cell.top_p:g}",
            (bound, 1.0),
            (0, -4),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            va="top",
            color=MUTED,
            fontsize=8,
        )
