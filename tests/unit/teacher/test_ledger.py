"""`teacher.ledger`: which rows an engine gets, and what becomes of rows that were lost with one."""

from collections.abc import Iterator

import numpy as np

from openrlhf_bd.teacher.ledger import Batch, Ledger
from openrlhf_bd.teacher.requests import RolloutRequest


def requests(num_rows: int) -> Iterator[RolloutRequest]:
    for row in range(num_rows):
        yield RolloutRequest(f"r{row}", np.array([1], dtype=np.int32), seed=row, max_new_tokens=1)


def names(batch: Batch | None) -> list[str]:
    assert batch is not None
    return [request.row_id for request in batch.requests]


def run(ledger: Ledger, *, deadly: set[str]) -> tuple[list[str], list[str], int]:
    """One engine that dies of some rows: rows done in order, rows given up, engines lost."""
    done, quarantined, num_lost = [], [], 0
    while batch := ledger.next_batch():
        if deadly.isdisjoint(names(batch)):
            done += names(batch)
            continue
        num_lost += 1
        if (row := ledger.lost(batch, "it died")) is not None:
            quarantined.append(row.row_id)
    assert not ledger.has_waiting
    return done, quarantined, num_lost


def test_rows_are_given_once_in_their_order() -> None:
    """Ten rows in batches of four: 4, 4, 2, each row once."""
    ledger = Ledger(requests(10), batch_rows=4)
    assert [len(names(ledger.next_batch())) for _ in range(3)] == [4, 4, 2]
    assert not ledger.has_waiting
    assert ledger.next_batch() is None


def test_rows_lost_by_accident_come_again() -> None:
    """A batch that is lost once is made in parts after the others, and nothing is given up."""
    ledger = Ledger(requests(20), batch_rows=10)
    first = ledger.next_batch()
    assert first is not None
    assert ledger.lost(first, "it died") is None
    done, quarantined, _ = run(ledger, deadly=set())
    assert done == [f"r{row}" for row in [*range(10, 20), *range(10)]]
    assert quarantined == []


def test_row_that_ends_engines_is_found() -> None:
    """One of 64 rows kills: 64 -> 8 parts of 8 -> 8 parts of 1 -> alone twice: four engines, and 63 rows are made."""
    done, quarantined, num_lost = run(Ledger(requests(64), batch_rows=64), deadly={"r37"})
    assert quarantined == ["r37"]
    assert sorted(done) == sorted(f"r{row}" for row in range(64) if row != 37)
    assert num_lost == 4


def test_every_row_that_ends_engines_is_found() -> None:
    """Two deadly rows of one batch are both given up, by name."""
    done, quarantined, _ = run(Ledger(requests(10), batch_rows=5), deadly={"r0", "r4"})
    assert sorted(quarantined) == ["r0", "r4"]
    assert len(done) == 8


def test_span_names_rows() -> None:
    """Messages name the first and the last row of a batch, or the one."""
    ledger = Ledger(requests(3), batch_rows=2)
    spans = [batch.span for batch in (ledger.next_batch(), ledger.next_batch()) if batch]
    assert spans == ["r0 to r1", "r2"]
