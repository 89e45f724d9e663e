"""Who worked and who waited: shares of a run's time by lane, from its timeline.

Shapes: L lanes, S segments of time in which nobody begins or ends anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.table import Table
from rich.text import Text

from openrlhf_bd.evaluation.timeline import DRIVER, RANKS, Timeline, lane_group
from openrlhf_bd.records import Span

Intervals = Sequence[tuple[float, float]]

WORK = ("generate", "score", "train", "validate", "checkpoint", "evaluate")


@dataclass(frozen=True, slots=True)
class LaneUse:
    """How a lane spent a phase of a run. The four add up to the phase.

    Attributes:
        lane: whose.
        working_s: generating, scoring, training, saving.
        syncing_s: weights on their way from ranks to engines.
        starting_s: an engine or rank that starts.
        waiting_s: the rest.
        waited_for: waiting_s by who worked meanwhile ("teacher engine", ...), in equal shares where several did;
            "driver" where nobody did: the driver itself, and the way between the actors.
    """

    lane: str
    working_s: float
    syncing_s: float
    starting_s: float
    waiting_s: float
    waited_for: Mapping[str, float]

    @property
    def total_s(self) -> float:
        return self.working_s + self.syncing_s + self.starting_s + self.waiting_s


@dataclass(frozen=True, slots=True)
class PhaseUse:
    """A phase of a run, all its sessions together.

    Attributes:
        name: "rows", "training" or "evaluation".
        seconds: its length.
        lanes: of those that did something in it.
        driver_s: what the driver was at, seconds by activity: where the time of the run went.
    """

    name: str
    seconds: float
    lanes: tuple[LaneUse, ...]
    driver_s: Mapping[str, float]


def phase_windows(timeline: Timeline) -> dict[str, list[tuple[float, float]]]:
    """When each phase took place: rows made beforehand, training from its first step to its last, evaluation."""
    windows: dict[str, list[tuple[float, float]]] = {"rows": [], "training": [], "evaluation": []}
    for session in timeline.sessions:
        windows["rows"] += _bounds(timeline.of(DRIVER, "generate", session=session))
        windows["training"] += _bounds(timeline.of(RANKS, "train", session=session))
        windows["evaluation"] += _bounds(timeline.of(DRIVER, "evaluate", session=session))
    return {name: found for name, found in windows.items() if found}


def utilisation(timeline: Timeline) -> list[PhaseUse]:
    """How each lane spent each phase of the run, in the order of the phases."""
    return [phase_use(timeline, name, windows) for name, windows in phase_windows(timeline).items()]


def phase_use(timeline: Timeline, name: str, windows: Intervals) -> PhaseUse:
    """How each lane spent some windows of time.

    Args:
        timeline: of the run.
        name: of the phase.
        windows: (start, end), unix seconds, which do not overlap.
    """
    lanes = [lane for lane in timeline.lanes if lane != DRIVER]
    by_lane = {lane: timeline.of(lane) for lane in timeline.lanes}
    edges_S = _edges([span for spans in by_lane.values() for span in spans], windows)
    length_S = np.diff(edges_S) * _covered(edges_S, windows)
    states = {lane: _states(edges_S, spans) for lane, spans in by_lane.items()}
    found = []
    for lane in lanes:
        working_S, syncing_S, starting_S = states[lane]
        if not ((working_S | syncing_S | starting_S) & (length_S > 0)).any():
            continue
        waiting_S = ~(working_S | syncing_S | starting_S)
        found.append(
            LaneUse(
                lane,
                working_s=float(length_S @ (working_S & ~syncing_S & ~starting_S)),
                syncing_s=float(length_S @ syncing_S),
                starting_s=float(length_S @ (starting_S & ~syncing_S)),
                waiting_s=float(length_S @ waiting_S),
                waited_for=_waited_for(length_S * waiting_S, {each: states[each] for each in lanes}),
            )
        )
    return PhaseUse(name, float(length_S.sum()), tuple(found), _driver_s(edges_S, length_S, by_lane.get(DRIVER, [])))


def _driver_s(edges_S: NDArray[np.float64], length_S: NDArray[np.float64], spans: Sequence[Span]) -> dict[str, float]:
    """Seconds of the driver by activity. Within "evaluate" what has a name of its own counts there."""
    during: dict[str, NDArray[np.bool_]] = {
        activity: _covered(edges_S, [(span.start_s, span.end_s) for span in spans if span.activity == activity])
        for activity in dict.fromkeys(span.activity for span in spans)
    }
    if "evaluate" in during:
        inner = [covered for activity, covered in during.items() if activity != "evaluate"]
        during["evaluate"] &= ~np.logical_or.reduce([*inner, np.zeros(len(length_S), np.bool_)])
    seconds = {activity: float(length_S @ covered) for activity, covered in during.items()}
    return {activity: found for activity, found in seconds.items() if found > 0}


def utilisation_tables(timeline: Timeline) -> list[Table]:
    """One table of each phase for a terminal: shares of its time by lane, and for whom a lane waited."""
    return [_table(phase) for phase in utilisation(timeline)]


def waited_text(use: LaneUse, *, smallest: float = 0.005) -> str:
    """Whom a lane waited for, in shares of the phase: "student ranks 31 %, driver 2 %"."""
    shares = sorted(((seconds / use.total_s, group) for group, seconds in use.waited_for.items()), reverse=True)
    return ", ".join(f"{group} {100 * share:.0f} %" for share, group in shares if share >= smallest)


def _table(phase: PhaseUse) -> Table:
    table = Table(
        title=f"{phase.name}, {phase.seconds:.1f} s: shares in percent",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    table.add_column("lane", no_wrap=True)
    for heading in ("works", "syncs", "starts", "waits"):
        table.add_column(heading, justify="right")
    table.add_column("waits while these work", overflow="fold")
    for use in phase.lanes:
        shares = (use.working_s, use.syncing_s, use.starting_s, use.waiting_s)
        cells = [f"{100 * seconds / use.total_s:.1f}" for seconds in shares]
        table.add_row(Text(use.lane), *cells, Text(waited_text(use)))
    if phase.driver_s:
        parts = ", ".join(f"{activity} {100 * s / phase.seconds:.0f} %" for activity, s in phase.driver_s.items())
        table.caption = f"The driver's time: {parts}"
    return table


def _bounds(spans: Sequence[Span]) -> list[tuple[float, float]]:
    return [(min(span.start_s for span in spans), max(span.end_s for span in spans))] if spans else []


def _edges(spans: Sequence[Span], windows: Intervals) -> NDArray[np.float64]:
    """Times at which anything begins or ends, S + 1."""
    times = [time_s for span in spans for time_s in (span.start_s, span.end_s)]
    return np.unique(np.array([*times, *(time_s for window in windows for time_s in window)], np.float64))


def _covered(edges_S: NDArray[np.float64], intervals: Intervals) -> NDArray[np.bool_]:
    """Whether each segment lies in one of the intervals, whose ends are edges."""
    depth = np.zeros(len(edges_S), np.int64)
    starts, ends = (np.array([each[side] for each in intervals], np.float64) for side in (0, 1))
    np.add.at(depth, np.searchsorted(edges_S, starts), 1)
    np.add.at(depth, np.searchsorted(edges_S, np.maximum(starts, ends)), -1)
    covered: NDArray[np.bool_] = np.cumsum(depth)[:-1] > 0
    return covered


def _states(edges_S: NDArray[np.float64], spans: Sequence[Span]) -> tuple[NDArray[np.bool_], ...]:
    """Whether a lane works, syncs, starts, [S] each."""

    def during(*activities: str) -> NDArray[np.bool_]:
        return _covered(edges_S, [(span.start_s, span.end_s) for span in spans if span.activity in activities])

    return during(*WORK), during("sync"), during("start")


def _waited_for(
    waiting_s_S: NDArray[np.float64], states: Mapping[str, tuple[NDArray[np.bool_], ...]]
) -> dict[str, float]:
    """Seconds of waiting by the groups that worked meanwhile; "driver" where none did."""
    busy: dict[str, NDArray[np.bool_]] = {}
    for lane, parts in states.items():
        group = lane_group(lane)
        busy[group] = np.logical_or.reduce([*parts, busy.get(group, np.zeros_like(parts[0]))])
    num_busy_S = np.sum(list(busy.values()), axis=0)
    shared_s_S = waiting_s_S / np.maximum(num_busy_S, 1)
    found = {group: float(shared_s_S @ busy_S) for group, busy_S in busy.items()}
    found[DRIVER] = float(waiting_s_S @ (num_busy_S == 0))
    return {group: seconds for group, seconds in found.items() if seconds > 0}
