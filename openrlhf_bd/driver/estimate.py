"""From a sample of rows to the whole of a teacher's data: tokens, disk space, engine hours. No processes, no clock.

Shapes: N rows of the sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from openrlhf_bd.store import StoreSummary
from openrlhf_bd.store.shards import GROUP_CANDIDATES, GROUP_TOKENS
from openrlhf_bd.teacher.generate import batch_rows

# The range of an estimate: so many standard errors to either side, about 95 %.
STANDARD_ERRORS = 2.0


@dataclass(frozen=True, slots=True)
class Amount:
    """An estimated quantity and the ends of its range.

    Attributes:
        value: the estimate.
        low: lower end, at least 0.
        high: upper end.
    """

    value: float
    low: float
    high: float

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.value + other.value, self.low + other.low, self.high + other.high)

    def times(self, factor: float) -> Amount:
        """A multiple of it, for a factor of at least 0."""
        return Amount(self.value * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True, slots=True)
class Call:
    """One call of an engine: rows that it got at once.

    Attributes:
        num_rows: of the call.
        num_tokens: response tokens.
        longest: tokens of its longest response: the steps that the engine took.
        wall_s: duration, seconds.
    """

    num_rows: int
    num_tokens: int
    longest: int
    wall_s: float


@dataclass(frozen=True, slots=True)
class Written:
    """Rows that were sealed into one shard.

    Attributes:
        raw_bytes: of their arrays.
        file_bytes: of the shard.
    """

    raw_bytes: int
    file_bytes: int


@dataclass(frozen=True, slots=True)
class Sample:
    """What was measured of one teacher.

    Attributes:
        lengths_N: response tokens of each row.
        raw_bytes_N: bytes of each row's arrays, before encoding and compression.
        written: a part of the rows, and all of them.
        calls: of the engine, after its first one.
        summary: of the sample's store.
        start_s: time until the engine could work, seconds.
        engine_bytes: resident memory of its process afterwards.
        cache_bytes: size of its key-value cache in that memory, where it is not on a GPU. Only what was used of it
            counts in engine_bytes.
    """

    lengths_N: NDArray[np.int64]
    raw_bytes_N: NDArray[np.int64]
    written: tuple[Written, Written]
    calls: tuple[Call, ...]
    summary: StoreSummary
    start_s: float
    engine_bytes: int
    cache_bytes: int | None


@dataclass(frozen=True, slots=True)
class Estimate:
    """What all rows of one teacher will take.

    Attributes:
        num_rows: rows.
        response_tokens: of all rows.
        store_bytes: on disk.
        bytes_per_token: store_bytes over response_tokens.
        at_once: rows that an engine decodes at once in the job.
        tokens_per_s: response tokens a second of one engine in the job.
        engine_s: engine time without starting, seconds, over all engines.
        start_s: start of an engine, seconds.
        sample: what it was computed from.
    """

    num_rows: int
    response_tokens: Amount
    store_bytes: Amount
    bytes_per_token: float
    at_once: int
    tokens_per_s: float
    engine_s: Amount
    start_s: float
    sample: Sample


def mean_of(values_N: NDArray[np.integer]) -> Amount:
    """The mean, and a range of `STANDARD_ERRORS` standard errors of the mean: sqrt(variance / N)."""
    mean = float(values_N.mean())
    error = float(values_N.std(ddof=1)) / math.sqrt(len(values_N)) if len(values_N) > 1 else math.inf
    return Amount(mean, max(0.0, mean - STANDARD_ERRORS * error), mean + STANDARD_ERRORS * error)


def estimate(sample: Sample, *, num_rows: int, num_engines: int, max_num_seqs: int, rows_per_shard: int) -> Estimate:
    """Extrapolate from a sample to a job.

    Args:
        sample: at least two rows.
        num_rows: rows of the job.
        num_engines: that share them.
        max_num_seqs: rows that an engine decodes at once, at most.
        rows_per_shard: of its store.
    """
    tokens = mean_of(sample.lengths_N).times(num_rows)
    store_bytes = _store_bytes(sample, num_rows=num_rows, rows_per_shard=rows_per_shard)
    rows = min(num_rows, batch_rows(num_rows, num_engines=num_engines, max_num_seqs=max_num_seqs))
    seconds_per_token = _seconds_per_token(sample, rows=rows, max_num_seqs=max_num_seqs)
    engine_s = Amount(
        tokens.value * seconds_per_token.value,
        tokens.low * seconds_per_token.low,
        tokens.high * seconds_per_token.high,
    )
    return Estimate(
        num_rows=num_rows,
        response_tokens=tokens,
        store_bytes=store_bytes,
        bytes_per_token=store_bytes.value / tokens.value,
        at_once=min(rows, max_num_seqs),
        tokens_per_s=1.0 / seconds_per_token.value,
        engine_s=engine_s,
        start_s=sample.start_s,
        sample=sample,
    )


def _store_bytes(sample: Sample, *, num_rows: int, rows_per_shard: int) -> Amount:
    """Each row group costs the same beside its rows, and rows cost in proportion to the bytes of their arrays.

    Both follow from two shards of different size; without the first part a small sample would make tokens dear.
    """
    part, whole = sample.written
    compression = (whole.file_bytes - part.file_bytes) / max(whole.raw_bytes - part.raw_bytes, 1)
    groups = _num_groups(sample, len(sample.lengths_N), rows_per_shard=rows_per_shard)
    group_bytes = max(0.0, whole.file_bytes - compression * whole.raw_bytes) / groups
    overhead = group_bytes * _num_groups(sample, num_rows, rows_per_shard=rows_per_shard)
    return mean_of(sample.raw_bytes_N).times(num_rows * compression) + Amount(overhead, overhead, overhead)


def _num_groups(sample: Sample, num_rows: int, *, rows_per_shard: int) -> int:
    found = sample.summary
    scale = num_rows / found.num_rows
    num_tokens = (found.num_prompt_tokens + found.num_response_tokens) * scale
    num_candidates = (found.sets.num_candidates if found.sets is not None else 0) * scale
    fullest = max(num_rows / rows_per_shard, num_tokens / GROUP_TOKENS, num_candidates / GROUP_CANDIDATES)
    return math.ceil(fullest)


def _seconds_per_token(sample: Sample, *, rows: int, max_num_seqs: int) -> Amount:
    """Time of one engine for a response token, in the job's batches.

    A call takes step_s * steps + token_s * tokens seconds: the fit gives both, and so the time of a batch with more
    rows, or fewer, than the sample's. The range goes from there to the speed that the sample itself had.
    """
    step_s, token_s = fit_step_time(sample.calls)
    mean, longest = float(sample.lengths_N.mean()), int(sample.lengths_N.max())
    # Rows that end make room for others; at the end of a batch the longest one is alone.
    steps = mean * max(rows / max_num_seqs, 1.0) + (longest - mean)
    fitted = (step_s * steps + token_s * mean * rows) / (mean * rows)
    largest = max(sample.calls, key=lambda call: call.num_rows)
    measured = largest.wall_s / largest.num_tokens
    return Amount(fitted, min(fitted, measured), max(fitted, measured))


def fit_step_time(calls: Sequence[Call]) -> tuple[float, float]:
    """Least squares of wall_s = step_s * longest + token_s * num_tokens, with neither below 0.

    Returns:
        (step_s, token_s), seconds.
    """
    steps, tokens, wall = (
        np.array([getattr(call, name) for call in calls], np.float64) for name in ("longest", "num_tokens", "wall_s")
    )
    (step_s, token_s), *_ = np.linalg.lstsq(np.stack([steps, tokens], axis=1), wall, rcond=None)
    if step_s < 0:
        return 0.0, float(tokens @ wall / (tokens @ tokens))
    if token_s < 0:
        return float(steps @ wall / (steps @ steps)), 0.0
    return float(step_s), float(token_s)
