"""The timeline of a run, as its folder keeps it: spans of engines, ranks and driver; also as a Perfetto trace."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from openrlhf_bd.errors import DataError
from openrlhf_bd.records import Span
from openrlhf_bd.store.files import write_text

TIMELINE_FILE = "timeline.jsonl"
DRIVER, RANKS, TEACHER, STUDENT = "driver", "student ranks", "teacher engine", "student engine"
# From the top to the bottom of a drawing.
_GROUPS = (TEACHER, STUDENT, RANKS, DRIVER)
_MICROSECONDS = 1e6


@dataclass(frozen=True, slots=True)
class LaneSpan:
    """A span, of whom it is, and which start of the run it belongs to.

    Attributes:
        lane: "teacher engine 0", "student engine 1", "student ranks" (what rank 0 did), "driver".
        span: what was done, by the driver's clock.
        session: 1 when the run began, one more each time it was resumed. Steps done again appear again.
    """

    lane: str
    span: Span
    session: int


@dataclass(frozen=True, slots=True)
class Timeline:
    """Spans of a run, by their start."""

    spans: tuple[LaneSpan, ...]

    @property
    def lanes(self) -> tuple[str, ...]:
        """Lanes that have a span: the teacher's engines, the student's, ranks, driver."""
        return tuple(sorted({each.lane for each in self.spans}, key=lane_order))

    @property
    def sessions(self) -> tuple[int, ...]:
        return tuple(sorted({each.session for each in self.spans}))

    def of(self, lane: str, *activities: str, session: int | None = None) -> list[Span]:
        """Spans of a lane; of these activities, where some are named; of one session, or all."""
        return [
            each.span
            for each in self.spans
            if each.lane == lane
            and (not activities or each.span.activity in activities)
            and session in (None, each.session)
        ]


def lane_group(lane: str) -> str:
    """What kind of actor a lane is: "teacher engine", "student engine", "student ranks" or "driver"."""
    return next((group for group in _GROUPS if lane.startswith(group)), lane)


def lane_order(lane: str) -> tuple[int, int, str]:
    """Sort key of lanes: teacher, student's engines, ranks, driver, others; engines by number."""
    group = lane_group(lane)
    number = lane.removeprefix(group).strip()
    return (_GROUPS.index(group) if group in _GROUPS else len(_GROUPS), int(number) if number.isdigit() else 0, lane)


def read_timeline(folder: Path) -> Timeline | None:
    """The timeline of a run folder, or None where it has none.

    A last line that is cut short, as a killed process leaves it, is ignored.

    Raises:
        DataError: another line is no span.
    """
    path = folder / TIMELINE_FILE
    if not path.exists():
        return None
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return parse_timeline(lines, source=str(path))


def parse_timeline(lines: Sequence[str], *, source: str) -> Timeline:
    """The timeline of the lines of its file; see `read_timeline`.

    Args:
        lines: JSON objects.
        source: file name in messages.

    Raises:
        DataError: a line before the last is no span.
    """
    spans = []
    for number, line in enumerate(lines, start=1):
        try:
            spans.append(_parsed(json.loads(line)))
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            if number == len(lines):
                break
            raise DataError(
                f'{source}:{number}: found {line[:80]!r}, expected a JSON object with "lane", "activity", "start_s" '
                'and "end_s"; mend or remove the line'
            ) from error
    return Timeline(tuple(sorted(spans, key=lambda each: (each.span.start_s, each.span.end_s))))


def without_pauses(timeline: Timeline) -> Timeline:
    """The same spans as if each session had begun when the one before it ended."""
    moved: list[LaneSpan] = []
    end_s: float | None = None
    for session in timeline.sessions:
        spans = [each for each in timeline.spans if each.session == session]
        shift_s = 0.0 if end_s is None else end_s - spans[0].span.start_s
        moved += [replace(each, span=_moved(each.span, shift_s)) for each in spans]
        end_s = max(each.span.end_s for each in spans) + shift_s
    return Timeline(tuple(moved))


def _moved(span: Span, seconds: float) -> Span:
    return replace(span, start_s=span.start_s + seconds, end_s=span.end_s + seconds)


def span_record(lane: str, span: Span, session: int) -> dict[str, Any]:
    """A span as it stands in the file, times to a tenth of a millisecond."""
    record: dict[str, Any] = {
        "lane": lane,
        "activity": span.activity,
        "start_s": round(span.start_s, 4),
        "end_s": round(span.end_s, 4),
        "step": span.step,
        "session": session,
    }
    if span.parts:
        record["parts"] = {name: round(seconds, 4) for name, seconds in span.parts.items()}
    return record


def _parsed(record: Any) -> LaneSpan:
    step = record.get("step")
    span = Span(
        record["activity"],
        float(record["start_s"]),
        float(record["end_s"]),
        None if step is None else int(step),
        {str(name): float(seconds) for name, seconds in record.get("parts", {}).items()},
    )
    return LaneSpan(str(record["lane"]), span, int(record.get("session", 1)))


def write_trace(timeline: Timeline, path: Path, *, title: str) -> None:
    """Write the timeline as a trace that ui.perfetto.dev and chrome://tracing open.

    Args:
        timeline: of a run.
        path: JSON file; replaced in one step.
        title: name of the run there.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    start_s = min((each.span.start_s for each in timeline.spans), default=0.0)
    trace = {
        "traceEvents": list(trace_events(timeline, title=title)),
        "displayTimeUnit": "ms",
        "otherData": {"run": title, "start_unix_s": start_s},
    }
    write_text(path, json.dumps(trace))


def trace_events(timeline: Timeline, *, title: str) -> Iterator[dict[str, Any]]:
    """Events of the Chrome trace form: a process for each session, a thread for each lane, times in microseconds."""
    thread_of = {lane: number for number, lane in enumerate(timeline.lanes, start=1)}
    for session in timeline.sessions:
        yield _name("process_name", session, 0, title if session == 1 else f"{title}, session {session}")
        for lane, thread in thread_of.items():
            yield _name("thread_name", session, thread, lane)
            yield {
                "ph": "M",
                "name": "thread_sort_index",
                "pid": session,
                "tid": thread,
                "args": {"sort_index": thread},
            }
    zero_s = min((each.span.start_s for each in timeline.spans), default=0.0)
    for each in timeline.spans:
        span, place = each.span, {"pid": each.session, "tid": thread_of[each.lane]}
        label = span.activity if span.step is None else f"{span.activity} {span.step}"
        arguments = {} if span.step is None else {"step": span.step}
        yield _slice(label, span.activity, span.start_s - zero_s, span.end_s - span.start_s, **place, args=arguments)
        start_s = span.start_s
        for name, seconds in span.parts.items():
            # Parts are means over the ranks: those of this one may be a little shorter.
            seconds = min(seconds, span.end_s - start_s)
            yield _slice(name, "part", start_s - zero_s, seconds, **place, args=arguments)
            start_s += seconds


def _name(kind: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": {"name": name}}


def _slice(name: str, category: str, start_s: float, seconds: float, **more: Any) -> dict[str, Any]:
    microseconds = {"ts": round(start_s * _MICROSECONDS, 1), "dur": round(max(seconds, 0.0) * _MICROSECONDS, 1)}
    return {"ph": "X", "name": name, "cat": category, **microseconds, **more}
