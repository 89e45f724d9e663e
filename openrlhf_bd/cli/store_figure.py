"""A store as a picture: response lengths, set sizes, and the sorted token probabilities (Figure 1 of the paper)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from openrlhf_bd.errors import DataError
from openrlhf_bd.evaluation.published import published
from openrlhf_bd.store import StoreManifest, StoreSummary
from openrlhf_bd.store.statistics import SetSummary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Ranks that the paper names, with the mass that the most probable tokens of its teacher have (Qwen-2.5 3B).
PAPER_MASS = {rank: published("figure1").groups["Qwen-2.5 3B"][f"top {rank}"][0] for rank in (7, 50)}
_COLOURS = {"stop": "tab:blue", "length": "tab:orange"}


def plot_summary(found: StoreSummary, path: Path) -> None:
    """Draw what there is of the three to an image file.

    Raises:
        DataError: the store has no rows, or the file can't be written.
    """
    if not found.num_rows:
        raise DataError(f"--plot {path}: the store has no rows yet; draw it when some are sealed")
    # Figure alone, without pyplot: no window system and no global state.
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    draw_summary(found, figure)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise DataError(
            f"--plot {path}: can't be written: {error}; name a file ending in .png, .svg or .pdf"
        ) from error


def draw_summary(found: StoreSummary, figure: Figure) -> None:
    """Draw what there is of the three onto a figure."""
    draws = [lambda axes: _draw_lengths(axes, found)]
    sets = found.sets
    if sets is not None:
        draws.append(lambda axes: _draw_sizes(axes, sets, found.manifest))
        if sets.sorted_mass is not None:
            draws.append(lambda axes: _draw_sorted(axes, sets))
    figure.set_size_inches(5 * len(draws), 4)
    for axes, draw in zip(figure.subplots(1, len(draws), squeeze=False)[0], draws, strict=True):
        draw(axes)


def _draw_lengths(axes: Axes, found: StoreSummary) -> None:
    """Rows by the length of their response, stacked by how it ended."""
    lows = np.array([low for low, _, _ in found.length_histogram])
    width = found.length_histogram[0][1] - found.length_histogram[0][0] + 1
    bottom = np.zeros(len(lows))
    for reason, total in found.finish_reasons.items():
        counts = np.array([rows.get(reason, 0) for _, _, rows in found.length_histogram])
        label = f"{reason}: {total / found.num_rows:.0%}"
        axes.bar(lows, counts, width, bottom=bottom, align="edge", label=label, color=_COLOURS[reason])
        bottom += counts
    axes.set(title="Responses", xlabel="response tokens", ylabel="rows")
    axes.legend(title="ended by")


def _draw_sizes(axes: Axes, sets: SetSummary, manifest: StoreManifest) -> None:
    labels = [str(low) if low == high else f"{low}-{high}" for low, high, _ in sets.size_histogram]
    bars = axes.bar(labels, [count / sets.num_states for _, _, count in sets.size_histogram])
    axes.bar_label(bars, fmt="{:.1%}", fontsize=8)
    always = f" ({len(manifest.always_include)} always included)" if manifest.always_include else ""
    axes.set(title=f"Candidate sets, p = {manifest.top_p:g}", xlabel=f"tokens{always}", ylabel="share of states")
    axes.tick_params(axis="x", rotation=45)


def _draw_sorted(axes: Axes, sets: SetSummary) -> None:
    """Mean probability of the k-th most probable token, and the mean mass of the k most probable ones."""
    mass_K = np.array(sets.sorted_mass)
    rank_K = np.arange(1, len(mass_K) + 1)
    axes.bar(rank_K, np.diff(mass_K, prepend=0.0), color="tab:gray", label="k-th token")
    named = ", ".join(f"{k}: {mass_K[k - 1]:.1%}" for k in PAPER_MASS)
    paper = ", ".join(f"{k}: {mass:.0%}" for k, mass in PAPER_MASS.items())
    axes.plot(rank_K, mass_K, color="tab:blue", label=f"first k together ({named})")
    axes.plot(*zip(*PAPER_MASS.items(), strict=True), "x", color="tab:red", label=f"the paper's teacher ({paper})")
    axes.set(
        title="Sorted token probabilities (Fig. 1)",
        xlabel="k (in recorded sets; a set's end counts as 0)",
        ylabel="mean probability",
        ylim=(0, 1.02),
    )
    axes.legend(fontsize=8, loc="center right")
    axes.grid(alpha=0.3)
