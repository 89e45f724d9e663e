"""What a process did and when, kept until the driver asks for it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from openrlhf_bd.records import Activity, Span

# Steps of an engine that follow one another this closely are one span.
MERGE_GAP_S = 0.02
# A span that is still growing is given away as far as it is after so long, so that a kill loses no more.
LONGEST_OPEN_S = 30.0
# Where nobody asks the oldest are dropped.
MAX_SPANS = 4096


class SpanLog:
    """Spans of one process. Any thread may add or take some."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._closed: deque[Span] = deque(maxlen=MAX_SPANS)
        self._open: tuple[Activity, float, float] | None = None

    def add(
        self,
        activity: Activity,
        start_s: float,
        end_s: float,
        *,
        step: int | None = None,
        parts: Mapping[str, float] | None = None,
    ) -> None:
        """Note something whole.

        Args:
            activity: what was done.
            start_s: unix time, seconds.
            end_s: unix time, seconds.
            step: see `Span`.
            parts: see `Span`.
        """
        with self._lock:
            self._close()
            self._closed.append(Span(activity, start_s, end_s, step, dict(parts or {})))

    def extend(self, activity: Activity, start_s: float, end_s: float) -> None:
        """Note one of many small things of a kind: those that follow one another closely become one span."""
        with self._lock:
            if self._open is not None and self._open[0] == activity and start_s - self._open[2] < MERGE_GAP_S:
                self._open = (activity, self._open[1], end_s)
            else:
                self._close()
                self._open = (activity, start_s, end_s)

    @contextmanager
    def span(self, activity: Activity, *, step: int | None = None) -> Iterator[None]:
        """What happens inside is one span, also where it fails."""
        started = time.time()
        try:
            yield
        finally:
            self.add(activity, started, time.time(), step=step)

    def take(self, *, everything: bool = False) -> tuple[float, list[Span]]:
        """Spans since the last call, which are forgotten here, and the unix time now by this machine's clock.

        Args:
            everything: also a span that may go on.
        """
        with self._lock:
            now = time.time()
            if self._open is not None:
                _, start_s, end_s = self._open
                if everything or now - end_s > MERGE_GAP_S or end_s - start_s > LONGEST_OPEN_S:
                    self._close()
            spans = list(self._closed)
            self._closed.clear()
        return now, spans

    def _close(self) -> None:
        if self._open is not None:
            self._closed.append(Span(*self._open))
            self._open = None
