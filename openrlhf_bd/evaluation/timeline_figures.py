"""Drawings of a run's timeline: a few steps lane by lane, and the share of time that each lane worked over the run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from numpy.typing import NDArray

from openrlhf_bd.evaluation.figures import GRID, INK, MUTED, SERIES, Drawing
from openrlhf_bd.evaluation.timeline import DRIVER, RANKS, LaneSpan, Timeline, without_pauses
from openrlhf_bd.evaluation.utilisation import WORK, phase_windows
from openrlhf_bd.records import Span

COLOURS = {
    "generate": SERIES[0],
    "score": SERIES[5],
    "train": SERIES[2],
    "sync": SERIES[1],
    "validate": SERIES[3],
    "evaluate": SERIES[3],
    "checkpoint": SERIES[7],
    "start": SERIES[4],
    "wait": GRID,
}
WIDTH = 7.4
LANE_HEIGHT = 0.34
ZOOM_STEPS = 6
# More bars than this are no longer told apart, and make the page large.
MAX_BARS = 2000
MAX_BINS = 120
MIN_BIN_S = 1.0


def timeline_drawings(timeline: Timeline) -> list[Drawing]:
    """The whole run and some of its steps, as far as there is something to draw."""
    drawings = [timeline_overview(timeline)] if timeline.spans else []
    if "training" in phase_windows(timeline):
        drawings.append(timeline_drawing(timeline))
    return drawings


def timeline_drawing(timeline: Timeline, *, first_step: int | None = None, num_steps: int = ZOOM_STEPS) -> Drawing:
    """Some steps of training: who did what, lane by lane.

    Args:
        timeline: of a run that trained.
        first_step: the first to show; None: steps from the middle of the run.
        num_steps: most steps to show.

    Raises:
        ValueError: the run has no such step.
    """
    steps, start_s, end_s = _zoom(timeline, first_step, num_steps)
    shown = [each for each in timeline.spans if each.span.end_s > start_s and each.span.start_s < end_s][:MAX_BARS]
    lanes = [lane for lane in timeline.lanes if any(each.lane == lane for each in shown)]
    activities = [name for name in COLOURS if any(each.span.activity == name for each in shown)]

    def draw(axes: Axes) -> None:
        for place, lane in enumerate(lanes):
            for activity in activities:
                spans = [each.span for each in shown if each.lane == lane and each.span.activity == activity]
                bars = [
                    (max(s.start_s, start_s) - start_s, min(s.end_s, end_s) - max(s.start_s, start_s)) for s in spans
                ]
                axes.broken_barh(bars, (place - 0.36, 0.72), facecolor=COLOURS[activity], linewidth=0)
        for span in timeline.of(RANKS, "train"):
            if start_s <= span.start_s < end_s and span.step is not None:
                axes.axvline(span.start_s - start_s, color=MUTED, linewidth=0.5, linestyle=":")
        _lanes_of(axes, lanes)
        axes.set_xlim(0, end_s - start_s)
        _legend(axes, {name: COLOURS[name] for name in activities})

    return Drawing(
        "timeline_steps",
        f"Who worked in steps {steps[0]} to {steps[-1]}",
        "What each engine, the ranks and the driver did; an empty place is waiting. Dotted: a step begins.",
        (WIDTH, 1.05 + LANE_HEIGHT * len(lanes)),
        draw,
        (),
        ("lane", "activity", "start_s", "end_s", "step"),
        tuple(_row(each, start_s) for each in shown),
    )


def timeline_overview(timeline: Timeline) -> Drawing:
    """Over all sessions of a run, the share of time in which each lane worked, synced or started; rest is waiting."""
    timeline = without_pauses(timeline)
    kinds = {"working": WORK, "weights": ("sync",), "starting": ("start",)}
    colours = {"working": SERIES[2], "weights": SERIES[1], "starting": SERIES[4]}
    start_s = min(each.span.start_s for each in timeline.spans)
    length_s = max(each.span.end_s for each in timeline.spans) - start_s
    lanes = [lane for lane in timeline.lanes if lane != DRIVER]
    # Per minute where that is fine enough to see and coarse enough to draw.
    bin_s = max(min(60.0, length_s / 40), length_s / MAX_BINS, MIN_BIN_S)
    edges: NDArray[np.float64] = np.arange(0.0, length_s + bin_s, bin_s, dtype=np.float64)
    shares = {
        lane: {
            kind: _shares([span for span in timeline.of(lane) if span.activity in names], start_s + edges)
            for kind, names in kinds.items()
        }
        for lane in lanes
    }

    def draw(axes: Axes) -> None:
        for place, lane in enumerate(lanes):
            floor = np.zeros(len(edges) - 1)
            axes.axhspan(place - 0.4, place + 0.4, color=GRID, alpha=0.35, linewidth=0)
            for kind, share in shares[lane].items():
                if not share.any():
                    continue
                top = floor + share
                # Lanes count downwards, so a strip grows towards smaller numbers.
                axes.stairs(
                    place + 0.4 - 0.8 * top, edges, baseline=place + 0.4 - 0.8 * floor, fill=True, color=colours[kind]
                )
                floor = top
        _lanes_of(axes, lanes)
        axes.set_xlim(0, edges[-1])
        _legend(axes, colours)

    rows = tuple(
        (lane, float(left), *(round(float(shares[lane][kind][index]), 4) for kind in kinds))
        for lane in lanes
        for index, left in enumerate(edges[:-1])
    )
    return Drawing(
        "timeline",
        "Who worked over the run",
        f"Share of each {bin_s:.0f} s in which a lane worked, moved weights or started; the rest is waiting.",
        (WIDTH, 1.05 + 1.5 * LANE_HEIGHT * len(lanes)),
        draw,
        (),
        ("lane", "start_s", *(f"{kind}_share" for kind in kinds)),
        rows,
    )


def _zoom(timeline: Timeline, first_step: int | None, num_steps: int) -> tuple[list[int], float, float]:
    """(steps, start, end) of what to show: of the newest session that has them."""
    for session in reversed(timeline.sessions):
        spans = {span.step: span for span in timeline.of(RANKS, "train", session=session) if span.step is not None}
        steps = sorted(step for step in spans if step is not None)
        if not steps or (first_step is not None and first_step not in spans):
            continue
        first = steps.index(first_step) if first_step is not None else max(0, (len(steps) - num_steps) // 2)
        chosen = steps[first : first + num_steps]
        # What came before a step belongs to it: the wait for its rows.
        before = spans[steps[first - 1]].end_s if first > 0 else spans[chosen[0]].start_s
        return chosen, before, spans[chosen[-1]].end_s
    found = sorted({span.step for span in timeline.of(RANKS, "train") if span.step is not None})
    raise ValueError(f"no step {first_step} in this timeline; it has steps {found[:1]} to {found[-1:]}")


def _shares(spans: Sequence[Span], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of each bin that spans of one lane cover."""
    time_s = np.array([[span.start_s, span.end_s] for span in spans], np.float64).reshape(-1, 2)
    # Covered time until each edge: every span adds min(max(edge - start, 0), length).
    order = np.argsort(time_s[:, 0])
    starts, ends = time_s[order, 0], np.maximum.accumulate(time_s[order, 1])
    # Spans of a lane may overlap a little after a correction of clocks: each second counts once.
    starts = np.maximum(starts, np.concatenate([[-np.inf], ends[:-1]]))
    ends = np.maximum(ends, starts)
    lengths = np.concatenate([[0.0], np.cumsum(ends - starts)])
    begun = np.searchsorted(starts, edges, side="right")
    inside = np.where(begun > 0, np.minimum(edges, ends[begun - 1]) - starts[begun - 1], 0.0) if len(starts) else 0.0
    until = lengths[np.maximum(begun - 1, 0)] + inside
    return np.diff(until) / np.diff(edges)


def _lanes_of(axes: Axes, lanes: Sequence[str]) -> None:
    axes.set_yticks(range(len(lanes)), lanes)
    axes.tick_params(axis="y", labelcolor=INK, length=0)
    axes.set_ylim(len(lanes) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("seconds")


def _legend(axes: Axes, colours: dict[str, str]) -> None:
    handles = [Patch(facecolor=colour, label=name) for name, colour in colours.items()]
    axes.figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), handlelength=1)


def _row(each: LaneSpan, start_s: float) -> tuple[str, str, float, float, int | None]:
    span = each.span
    return each.lane, span.activity, round(span.start_s - start_s, 4), round(span.end_s - start_s, 4), span.step
