"""Which rows of a generation job wait, which failed with an engine, and which are given up. No processes, no clock.

Nobody can ask a dead engine which of its rows killed it. So a batch that was lost with its engine comes back in
smaller parts, after all other rows: a row that kills engines ends up alone, and is quarantined by name when it has
done so twice. Rows that were lost by an accident succeed when they come again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from openrlhf_bd.teacher.requests import Request

PARTS = 8
ATTEMPTS_ALONE = 2


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows that an engine gets at once.

    Attributes:
        requests: at least one.
        failures: times that exactly these rows were lost with an engine.
    """

    requests: tuple[Request, ...]
    failures: int = 0

    @property
    def span(self) -> str:
        """Its rows, for messages."""
        first, last = self.requests[0].row_id, self.requests[-1].row_id
        return first if first == last else f"{first} to {last}"


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A row that is given up.

    Attributes:
        row_id: its name.
        reason: how the last engine that worked on it ended.
    """

    row_id: str
    reason: str


class Ledger:
    """The rows of a job that no store has yet.

    Args:
        requests: all of them, in the order in which they are asked for.
        batch_rows: rows of a batch.
    """

    def __init__(self, requests: Iterator[Request], *, batch_rows: int) -> None:
        self._requests, self._batch_rows = requests, batch_rows
        self._fresh = self._take()
        self._suspects: deque[Batch] = deque()

    @property
    def has_waiting(self) -> bool:
        """Whether a row waits for an engine."""
        return bool(self._fresh or self._suspects)

    def next_batch(self) -> Batch | None:
        """Rows for an engine that is free; those that were lost with another come last. None: no row waits."""
        if self._fresh:
            batch, self._fresh = Batch(self._fresh), self._take()
            return batch
        return self._suspects.popleft() if self._suspects else None

    def lost(self, batch: Batch, reason: str) -> Quarantined | None:
        """A batch was lost with its engine.

        Args:
            batch: its rows.
            reason: how the engine ended.

        Returns:
            The row, if it was alone and is given up now.
        """
        if len(batch.requests) > 1:
            self._suspects.extend(Batch(part) for part in _parts(batch.requests))
            return None
        if batch.failures + 1 < ATTEMPTS_ALONE:
            self._suspects.append(Batch(batch.requests, batch.failures + 1))
            return None
        return Quarantined(batch.requests[0].row_id, reason)

    def _take(self) -> tuple[Request, ...]:
        return tuple(islice(self._requests, self._batch_rows))


def _parts(requests: Sequence[Request]) -> Iterator[tuple[Request, ...]]:
    size = -(-len(requests) // PARTS)
    for start in range(0, len(requests), size):
        yield tuple(requests[start : start + size])
