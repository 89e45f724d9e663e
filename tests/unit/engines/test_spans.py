from __future__ import annotations

import time

import pytest

from openrlhf_bd.engines.spans import MAX_SPANS, SpanLog
from openrlhf_bd.records import Span


def test_steps_that_follow_closely_are_one_span() -> None:
    """Gaps under 20 ms are closed; another activity, or a longer gap, begins a span."""
    log = SpanLog()
    for start_s in (1.0, 1.115, 1.230):
        log.extend("generate", start_s, start_s + 0.1)
    log.extend("score", 1.331, 1.4)
    log.extend("score", 1.5, 1.6)
    _, spans = log.take(everything=True)
    assert spans == [Span("generate", 1.0, 1.33), Span("score", 1.331, 1.4), Span("score", 1.5, 1.6)]
    assert log.take(everything=True)[1] == []


def test_a_span_that_may_go_on_is_kept_back() -> None:
    """It is given when a gap has shown that it ended, when it is older than 30 s, or when everything is wanted."""
    log, now = SpanLog(), time.time()
    log.extend("generate", now - 1, now + 5)
    assert log.take()[1] == []
    log.extend("generate", now + 5, now + 6)
    assert log.take(everything=True)[1] == [Span("generate", now - 1, now + 6)]
    log.extend("generate", now - 31, now + 5)
    assert log.take()[1] == [Span("generate", now - 31, now + 5)]
    log.extend("generate", now - 2, now - 1)
    told_s, spans = log.take()
    assert spans == [Span("generate", now - 2, now - 1)]
    assert now <= told_s <= time.time()


def test_weights_end_a_span_of_steps() -> None:
    """Spans come in the order in which they were done, and do not overlap."""
    log = SpanLog()
    log.extend("generate", 1.0, 2.0)
    log.add("sync", 2.0, 2.005, step=4)
    log.extend("generate", 2.006, 3.0)
    assert log.take(everything=True)[1] == [
        Span("generate", 1.0, 2.0),
        Span("sync", 2.0, 2.005, 4),
        Span("generate", 2.006, 3.0),
    ]


def test_what_fails_is_recorded_too() -> None:
    """A span ends where its block raises."""
    log = SpanLog()
    with pytest.raises(ValueError, match="no"), log.span("start"):
        raise ValueError("no")
    [span] = log.take()[1]
    assert span.activity == "start"
    assert span.start_s <= span.end_s


def test_memory_is_bounded_where_nobody_asks() -> None:
    """The oldest spans are dropped."""
    log = SpanLog()
    for second in range(MAX_SPANS + 3):
        log.add("generate", second, second + 0.5)
    _, spans = log.take()
    assert len(spans) == MAX_SPANS
    assert spans[0].start_s == 3
