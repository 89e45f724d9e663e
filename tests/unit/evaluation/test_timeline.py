from __future__ import annotations

import json
from pathlib import Path

import pytest

from openrlhf_bd.errors import DataError
from openrlhf_bd.evaluation.figures import to_svg, write_files
from openrlhf_bd.evaluation.timeline import (
    DRIVER,
    RANKS,
    LaneSpan,
    Timeline,
    parse_timeline,
    read_timeline,
    span_record,
    without_pauses,
    write_trace,
)
from openrlhf_bd.evaluation.timeline_figures import timeline_drawing, timeline_drawings
from openrlhf_bd.evaluation.utilisation import phase_windows, utilisation, utilisation_tables, waited_text
from openrlhf_bd.records import Activity, Span

TEACHER, STUDENT = "teacher engine 0", "student engine 0"


def each(
    lane: str, activity: Activity, start_s: float, end_s: float, *, step: int | None = None, session: int = 1
) -> LaneSpan:
    return LaneSpan(lane, Span(activity, start_s, end_s, step), session)


# Seconds 0 to 11; between 9 and 10 nobody works.
SPANS = (
    each(TEACHER, "generate", 0, 2),
    each(RANKS, "train", 0, 4, step=1),
    each(DRIVER, "train", 0, 4, step=1),
    each(STUDENT, "generate", 1, 5),
    each(TEACHER, "score", 4, 6),
    each(DRIVER, "wait", 4, 5, step=2),
    each(STUDENT, "sync", 5, 6),
    each(RANKS, "sync", 5, 6),
    each(DRIVER, "sync", 5, 6, step=1),
    each(RANKS, "train", 6, 9, step=2),
    each(DRIVER, "train", 6, 9, step=2),
    each(RANKS, "train", 10, 11, step=3),
    each(DRIVER, "train", 10, 11, step=3),
)


def lines_of(spans: tuple[LaneSpan, ...]) -> list[str]:
    return [json.dumps(span_record(one.lane, one.span, one.session)) for one in spans]


def test_a_timeline_reads_as_it_was_written() -> None:
    """Lanes, times, steps and parts come back, in the order of their start."""
    spans = (LaneSpan(RANKS, Span("train", 5.0, 7.5, 3, {"data": 0.25, "optimizer": 1.0}), 2), SPANS[0])
    found = parse_timeline(lines_of(spans), source="timeline.jsonl")
    assert found.spans == (SPANS[0], spans[0])
    assert found.lanes == (TEACHER, RANKS)


def test_a_last_line_that_was_cut_is_ignored(tmp_path: Path) -> None:
    """A killed run leaves a readable file; a line in the middle that is no span is named."""
    whole, cut = lines_of(SPANS[:2])
    (tmp_path / "timeline.jsonl").write_text(f"{whole}\n{cut[:30]}", encoding="utf-8")
    found = read_timeline(tmp_path)
    assert found is not None
    assert found.spans == SPANS[:1]
    with pytest.raises(DataError, match=r"timeline.jsonl:1: found .*mend or remove the line"):
        parse_timeline([cut[:30], whole], source="timeline.jsonl")
    assert read_timeline(tmp_path / "no_run") is None


def test_shares_of_the_training_window_add_up() -> None:
    """Working, syncing and waiting by lane; who waits while two others work waits half for each."""
    [phase] = utilisation(Timeline(SPANS))
    assert (phase.name, phase.seconds) == ("training", 11.0)
    by_lane = {use.lane: use for use in phase.lanes}
    assert list(by_lane) == [TEACHER, STUDENT, RANKS]
    times = {lane: (use.working_s, use.syncing_s, use.starting_s, use.waiting_s) for lane, use in by_lane.items()}
    # Teacher: 2 + 2. Student: 1 to 5, and 5 to 6. Ranks: 4 + 3 + 1, and 5 to 6.
    assert times == {TEACHER: (4, 0, 0, 7), STUDENT: (4, 1, 0, 6), RANKS: (8, 1, 0, 2)}
    # Teacher waits 2-4 (student, ranks), 6-9 and 10-11 (ranks), 9-10 (nobody).
    assert by_lane[TEACHER].waited_for == {"student engine": 1, "student ranks": 5, "driver": 1}
    # Student waits 0-1 (teacher, ranks), 6-9 and 10-11 (ranks), 9-10 (nobody).
    assert by_lane[STUDENT].waited_for == {"teacher engine": 0.5, "student ranks": 4.5, "driver": 1}
    # Ranks wait 4-5 (teacher, student), 9-10 (nobody).
    assert by_lane[RANKS].waited_for == {"teacher engine": 0.5, "student engine": 0.5, "driver": 1}
    assert waited_text(by_lane[TEACHER]) == "student ranks 45 %, student engine 9 %, driver 9 %"
    assert phase.driver_s == {"train": 8, "wait": 1, "sync": 1}
    [table] = utilisation_tables(Timeline(SPANS))
    assert table.row_count == 3


def test_phases_of_a_run_and_its_sessions() -> None:
    """Rows, training and evaluation by session; the time between two sessions belongs to none."""
    spans = (
        each(DRIVER, "generate", 0, 5),
        each(TEACHER, "generate", 1, 5),
        each(RANKS, "train", 10, 12, step=1),
        each(RANKS, "train", 12, 13, step=2),
        each(RANKS, "train", 1000, 1002, step=2, session=2),
        each(DRIVER, "evaluate", 1010, 1020, session=2),
        each(DRIVER, "start", 1010, 1014, session=2),
        each(STUDENT, "generate", 1015, 1019, session=2),
    )
    timeline = Timeline(spans)
    assert phase_windows(timeline) == {
        "rows": [(0, 5)],
        "training": [(10, 13), (1000, 1002)],
        "evaluation": [(1010, 1020)],
    }
    rows, training, evaluation = utilisation(timeline)
    assert (rows.lanes[0].working_s, rows.lanes[0].waiting_s) == (4, 1)
    assert (training.seconds, training.lanes[0].working_s, training.lanes[0].waiting_s) == (5, 5, 0)
    assert evaluation.driver_s == {"evaluate": 6, "start": 4}
    moved = without_pauses(timeline)
    assert [(one.span.start_s, one.span.end_s) for one in moved.spans if one.session == 2][:2] == [(13, 15), (23, 33)]


def test_overlapping_spans_of_a_lane_count_once() -> None:
    """Requests of one client of a server may overlap: busy time is that of their union."""
    spans = (each(DRIVER, "generate", 0, 10), each(TEACHER, "generate", 1, 4), each(TEACHER, "generate", 3, 6))
    [phase] = utilisation(Timeline(spans))
    assert (phase.lanes[0].working_s, phase.lanes[0].waiting_s) == (5, 5)
    [overview] = timeline_drawings(Timeline(spans))
    working = [row[2] for row in overview.rows]
    assert working == [0, 1, 1, 1, 1, 1, 0, 0, 0, 0]


def test_trace_has_the_form_that_perfetto_opens(tmp_path: Path) -> None:
    """Complete events with ts and dur in microseconds on named threads; parts lie inside their step, in order."""
    step = LaneSpan(RANKS, Span("train", 2.0, 4.0, 7, {"data": 0.5, "forward_backward": 1.0, "optimizer": 0.75}), 1)
    timeline = Timeline((each(TEACHER, "score", 1.0, 1.5), step, each(DRIVER, "start", 9.0, 9.5, session=2)))
    write_trace(timeline, tmp_path / "trace.json", title="run")
    trace = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))
    events = trace["traceEvents"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert names[1, 1] == TEACHER
    assert names[1, 2] == RANKS
    assert {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"} == {
        1: "run",
        2: "run, session 2",
    }
    slices = [e for e in events if e["ph"] == "X"]
    assert {e["ph"] for e in events} == {"X", "M"}
    for event in slices:
        assert {"name", "cat", "ph", "ts", "dur", "pid", "tid"} <= event.keys()
        assert (event["pid"], event["tid"]) in names
        assert event["ts"] >= 0
        assert event["dur"] >= 0
    found = [(e["name"], e["ts"], e["dur"]) for e in slices]
    assert found == [
        ("score", 0, 500_000),
        ("train 7", 1_000_000, 2_000_000),
        ("data", 1_000_000, 500_000),
        ("forward_backward", 1_500_000, 1_000_000),
        # Means over the ranks: what does not fit into this rank's step is cut.
        ("optimizer", 2_500_000, 500_000),
        ("start", 8_000_000, 500_000),
    ]


def test_drawings_show_the_run_and_some_steps(tmp_path: Path) -> None:
    """The zoom begins where the step before ended; steps that are not there are refused."""
    whole, zoom = timeline_drawings(Timeline(SPANS))
    assert zoom.title == "Who worked in steps 1 to 3"
    part = timeline_drawing(Timeline(SPANS), first_step=2, num_steps=1)
    # From 4, the end of step 1, to 9.
    assert part.rows == (
        (STUDENT, "generate", -3.0, 1.0, None),
        (TEACHER, "score", 0.0, 2.0, None),
        (DRIVER, "wait", 0.0, 1.0, 2),
        (STUDENT, "sync", 1.0, 2.0, None),
        (RANKS, "sync", 1.0, 2.0, None),
        (DRIVER, "sync", 1.0, 2.0, 1),
        (RANKS, "train", 2.0, 5.0, 2),
        (DRIVER, "train", 2.0, 5.0, 2),
    )
    with pytest.raises(ValueError, match="no step 9"):
        timeline_drawing(Timeline(SPANS), first_step=9)
    for drawing in (whole, zoom, part):
        assert "student ranks" in to_svg(drawing)
        write_files(drawing, tmp_path)
    assert (tmp_path / "timeline.png").exists()
    assert timeline_drawings(Timeline(())) == []
