from __future__ import annotations

import os
from pathlib import Path

import pytest

from openrlhf_bd.driver.timeline import ClockBounds, Recorder, driver_span, recorded
from openrlhf_bd.evaluation.timeline import LaneSpan, read_timeline
from openrlhf_bd.records import Span


def sessions_of(folder: Path) -> list[tuple[int, int | None]]:
    timeline = read_timeline(folder)
    assert timeline is not None
    return [(each.session, each.span.step) for each in timeline.spans]


def test_sessions_follow_one_another(tmp_path: Path) -> None:
    """A resumed run appends: steps done again appear again, with the next session's number."""
    for steps in ((1, 2), (2, 3)):
        with recorded(tmp_path):
            for step in steps:
                with driver_span("train", step=step):
                    pass
    assert sessions_of(tmp_path) == [(1, 1), (1, 2), (2, 2), (2, 3)]


def test_a_line_that_a_kill_cut_is_removed_before_others_follow(tmp_path: Path) -> None:
    """The file stays readable over any number of kills, and whole lines stay."""
    path = tmp_path / "timeline.jsonl"
    with recorded(tmp_path), driver_span("train", step=1):
        pass
    for _ in range(2):
        with path.open("ab") as file:
            file.write(b'{"lane": "driver", "acti')
        with recorded(tmp_path), driver_span("train", step=2):
            pass
    assert sessions_of(tmp_path) == [(1, 1), (2, 2), (3, 2)]
    path.write_bytes(b'{"lane": "dri')
    Recorder(path).close()
    assert path.read_bytes() == b""


def test_nothing_is_recorded_outside_of_a_run(tmp_path: Path) -> None:
    """Code that also runs without a run folder needs no switch; a run's own recording ends with its block."""
    with recorded(tmp_path):
        pass
    with driver_span("train", step=1):
        pass
    assert sessions_of(tmp_path) == []


def test_a_failing_step_is_recorded(tmp_path: Path) -> None:
    """A span ends where its block raises."""
    with pytest.raises(RuntimeError, match="lost"), recorded(tmp_path), driver_span("sync", step=3):
        raise RuntimeError("lost")
    assert sessions_of(tmp_path) == [(1, 3)]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
def test_a_full_disk_does_not_end_the_run(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """What cannot be written is left out, with one warning."""
    path = tmp_path / "timeline.jsonl"
    path.symlink_to("/dev/full")
    recorder = Recorder(tmp_path / "other")
    recorder.close()
    recorder._file = path.open("wb", buffering=0)
    for _ in range(2):
        recorder.write("driver", [Span("train", 1.0, 2.0)])
    assert [record.message.count("not written any more") for record in caplog.records] == [1]


def test_clocks_that_agree_are_left_alone() -> None:
    """An actor that answered between question and receipt, by its own clock, needs no correction."""
    clock = ClockBounds()
    assert clock.learn(asked_s=100.0, told_s=100.2, received_s=100.5) == 0.0
    # Only one side of this answer is tight.
    assert clock.learn(asked_s=110.0, told_s=110.0, received_s=130.0) == 0.0


def test_clocks_that_differ_are_moved_as_far_as_is_known() -> None:
    """Each answer narrows the offset: the actor's clock is 5 s behind, and answers come 0.1 s after the question."""
    clock = ClockBounds()
    # Between 104 - 100.1 + ... : asked at 105, told 100.1 (105.1 here), received at 107.
    assert clock.learn(asked_s=105.0, told_s=100.1, received_s=107.0) == pytest.approx(4.9)
    # Asked at 110, told 105.001 (110.001 here), received at once: 4.999 to 5.003.
    assert clock.learn(asked_s=110.0, told_s=105.001, received_s=110.004) == pytest.approx(4.999)
    ahead = ClockBounds()
    # 3 s ahead: told 103.1 at 100.1 here, received at 100.2: at most -2.9.
    assert ahead.learn(asked_s=100.0, told_s=103.1, received_s=100.2) == pytest.approx(-2.9)


def test_spans_of_actors_carry_their_lane(tmp_path: Path) -> None:
    """What an actor did stands beside what the driver did, under its own name."""
    recorder = Recorder(tmp_path / "timeline.jsonl")
    recorder.write("student ranks", [Span("train", 1.0, 2.0, 4, {"data": 0.5})])
    recorder.close()
    timeline = read_timeline(tmp_path)
    assert timeline is not None
    assert timeline.spans == (LaneSpan("student ranks", Span("train", 1.0, 2.0, 4, {"data": 0.5}), 1),)
