"""What every recorded timeline must be, whatever job made it."""

from __future__ import annotations

import json
import time
from itertools import pairwise
from pathlib import Path

import pytest

from openrlhf_bd.evaluation.timeline import DRIVER, RANKS, Timeline, read_timeline

# Times are kept to a tenth of a millisecond, and clocks of one machine count as equal.
RESOLUTION_S = 0.001


def check_timeline(run: Path, lanes: set[str]) -> Timeline:
    """The timeline of a run that was started once: lanes, no overlaps, within the run's time, as its metrics say."""
    timeline = read_timeline(run)
    assert timeline is not None
    assert set(timeline.lanes) == lanes
    assert timeline.sessions == (1,)
    created = json.loads((run / "run.json").read_text(encoding="utf-8"))["created"]
    for each in timeline.spans:
        assert created - RESOLUTION_S <= each.span.start_s <= each.span.end_s <= time.time()
    for lane in lanes:
        # An evaluation has the start of its engines in it.
        spans = [span for span in timeline.of(lane) if span.activity != "evaluate"]
        for before, after in pairwise(spans):
            assert after.start_s >= before.end_s - RESOLUTION_S, (lane, before, after)
    _check_steps(timeline, run)
    return timeline


def _check_steps(timeline: Timeline, run: Path) -> None:
    """A step lasts as long as its parts and little more, on the ranks and seen from the driver."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if "train/loss" in record]
    steps, asked = timeline.of(RANKS, "train"), timeline.of(DRIVER, "train")
    assert [span.step for span in steps] == [span.step for span in asked] == [record["step"] for record in records]
    for span, call, record in zip(steps, asked, records, strict=True):
        parts = {name: record[f"train/time_{name}_s"] for name in ("data", "forward_backward", "optimizer")}
        assert span.parts == pytest.approx(parts, abs=1e-4)
        assert call.start_s - RESOLUTION_S <= span.start_s
        assert span.end_s <= call.end_s + RESOLUTION_S
    # The parts are means over the ranks, who wait for one another, and metrics are put together after them.
    in_parts, whole = (sum(sum(s.parts.values()) for s in steps), sum(s.end_s - s.start_s for s in steps))
    assert in_parts - 0.01 * len(steps) < whole < 1.5 * in_parts + 0.2 * len(steps)
