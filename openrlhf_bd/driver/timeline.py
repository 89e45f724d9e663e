"""Records who worked and when: spans of the driver and of its actors, appended to the run folder's timeline.

Actors keep their own spans (`engines/spans.py`), and a thread of the driver asks each of them every few seconds. Spans
go straight to the file. Code that runs outside of `recorded`, such as an evaluation without a run folder, records
nothing.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from openrlhf_bd.evaluation.timeline import DRIVER, TIMELINE_FILE, span_record
from openrlhf_bd.records import Activity, Span

logger = logging.getLogger(__name__)

# Between two questions to an actor.
INTERVAL_S = 2.0
# Longest wait for what actors have left to tell before they are ended.
LAST_TIMEOUT_S = 2.0
# More than a line has.
_TAIL_BYTES = 4096

_recorder: ContextVar[Recorder | None] = ContextVar("timeline", default=None)


class Recorder:
    """Appends spans to a file, from any thread. What cannot be written is left out: no run ends because of it.

    Args:
        path: of the file; what an earlier session wrote stays, but for a last line that it did not finish.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self.session = _next_session(path)
        # Without a buffer: a kill loses no line, and what a full disk refused is not tried again.
        self._file = path.open("ab", buffering=0)

    def write(self, lane: str, spans: Sequence[Span]) -> None:
        """Append spans of a lane, by the driver's clock."""
        lines = "".join(json.dumps(span_record(lane, span, self.session)) + "\n" for span in spans)
        with self._lock:
            if self._file.closed:
                return
            try:
                if self._file.write(lines.encode()) < len(lines):
                    raise OSError("the line was cut")
            except OSError as error:
                logger.warning("%s: not written any more (%s); the run goes on without it", self._path, error)
                self._file.close()

    def close(self) -> None:
        with self._lock:
            self._file.close()


def _next_session(path: Path) -> int:
    """Number of the session that begins, after cutting off what a killed one left of a line."""
    if not path.exists():
        return 1
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        start = file.seek(max(0, size - _TAIL_BYTES))
        tail = file.read()
        whole = tail[: tail.rfind(b"\n") + 1]
        file.truncate(start + len(whole))
    lines = whole.splitlines()
    return json.loads(lines[-1])["session"] + 1 if lines else 1


@contextmanager
def recorded(folder: Path) -> Iterator[None]:
    """Inside, spans go to the timeline of a run folder.

    Raises:
        OSError: its file cannot be opened.
    """
    recorder = Recorder(folder / TIMELINE_FILE)
    token = _recorder.set(recorder)
    try:
        yield
    finally:
        _recorder.reset(token)
        recorder.close()


@contextmanager
def driver_span(activity: Activity, *, step: int | None = None) -> Iterator[None]:
    """What happens inside is the driver's activity, also where it fails."""
    started = time.time()
    try:
        yield
    finally:
        if (recorder := _recorder.get()) is not None:
            recorder.write(DRIVER, [Span(activity, started, time.time(), step)])


@contextmanager
def collected(methods: Callable[[], Mapping[str, Any]]) -> Iterator[None]:
    """Inside, and at the end of the block, actors are asked for their spans.

    Args:
        methods: the actors' `take_spans` by lane; asked each time, so that actors may be replaced.
    """
    recorder = _recorder.get()
    if recorder is None:
        yield
        return
    collector = Collector(recorder, methods)
    thread = threading.Thread(target=collector.run, name="timeline", daemon=True)
    thread.start()
    try:
        yield
    finally:
        collector.stop()
        thread.join()


@dataclass(slots=True)
class ClockBounds:
    """What is known of the clock of an actor's machine, from its answers: by how much to move it to be the driver's.

    An answer was given between question and receipt. As long as the actor's time lies between them, the clocks count as
    equal; otherwise its times are moved as far as is needed, and no further.
    """

    low_s: float = float("-inf")
    high_s: float = float("inf")

    def learn(self, *, asked_s: float, told_s: float, received_s: float) -> float:
        """The offset to add to the actor's times, seconds, after one answer more."""
        self.low_s = max(self.low_s, asked_s - told_s)
        self.high_s = min(self.high_s, received_s - told_s)
        return min(max(0.0, self.low_s), self.high_s)


class Collector:
    """Asks actors for their spans, one question at a time each."""

    def __init__(self, recorder: Recorder, methods: Callable[[], Mapping[str, Any]]) -> None:
        self._recorder, self._methods = recorder, methods
        self._asked: dict[str, tuple[Any, float]] = {}
        self._clocks: dict[str, ClockBounds] = {}
        self._stopping = threading.Event()

    def run(self) -> None:
        """Until `stop`; then once more, for what is left."""
        while not self._stopping.wait(INTERVAL_S):
            self._ask()
            self._take(timeout_s=INTERVAL_S)
        self._take(timeout_s=LAST_TIMEOUT_S)
        self._ask(everything=True)
        self._take(timeout_s=LAST_TIMEOUT_S)

    def stop(self) -> None:
        self._stopping.set()

    def _ask(self, *, everything: bool = False) -> None:
        for lane, method in self._methods().items():
            # One that has not answered is busy, starting or dead.
            if lane not in self._asked:
                self._asked[lane] = (method.remote(everything=everything), time.time())

    def _take(self, *, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while self._asked and (left_s := deadline - time.monotonic()) > 0:
            lane_of = {ref: lane for lane, (ref, _) in self._asked.items()}
            ready, _ = ray.wait(list(lane_of), num_returns=1, timeout=left_s)
            for ref in ready:
                self._note(lane_of[ref], ref)

    def _note(self, lane: str, ref: Any) -> None:
        _, asked_s = self._asked.pop(lane)
        received_s = time.time()
        try:
            told_s, spans = ray.get(ref)
        except RayError:
            # It died: its last spans are lost, and whoever works with it says so.
            return
        clock = self._clocks.setdefault(lane, ClockBounds())
        offset_s = clock.learn(asked_s=asked_s, told_s=told_s, received_s=received_s)
        self._recorder.write(
            lane, [replace(span, start_s=span.start_s + offset_s, end_s=span.end_s + offset_s) for span in spans]
        )
