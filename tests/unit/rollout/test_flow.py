"""Bounds between making rows and training on them."""

from __future__ import annotations

import random
from typing import Any

import pytest

from openrlhf_bd.config import DistillConfig
from openrlhf_bd.errors import ConfigError
from openrlhf_bd.rollout.flow import Flow
from openrlhf_bd.rollout.plan import PlannedRow, RowPlan
from tests.unit.rollout.test_plan import plan


def flow(rows: RowPlan, *, trained: int = 0, done: tuple[str, ...] = (), **options: Any) -> Flow:
    return Flow(rows, DistillConfig(mode="online", **options), trained=trained, is_done=set(done).__contains__)


def student_plan(**options: Any) -> RowPlan:
    return plan(12, batch=2, rollout="student", **options)


def ids(rows: list[PlannedRow]) -> list[str]:
    return [row.row_id for row in rows]


def test_strictly_on_policy_rows_begin_after_the_step_before() -> None:
    """With max_staleness 0, rows of step 2 wait until the engines have the weights of step 1."""
    rows = student_plan()
    bounds = flow(rows, rollout="student", max_staleness=0)
    first = bounds.take("student", version=0, limit=8)
    assert first == rows.rows(1)
    assert bounds.take("student", version=0, limit=8) == []
    assert bounds.has_more
    for row in first:
        bounds.made(row, 0)
    assert bounds.complete_steps() == [1]
    assert bounds.seal(1) == [0, 0]
    bounds.trained(1)
    assert bounds.take("student", version=0, limit=8) == []
    assert bounds.take("student", version=1, limit=8) == rows.rows(2)


def test_staleness_lets_rows_begin_earlier() -> None:
    """With max_staleness 2, weights of step 0 make rows of steps 1 to 3 and no further."""
    rows = student_plan()
    bounds = flow(rows, rollout="student", max_staleness=2)
    begun = [row.step for _ in range(4) for row in bounds.take("student", version=0, limit=8)]
    assert begun == [1, 1, 2, 2, 3, 3]


def test_rows_run_ahead_no_further_than_allowed() -> None:
    """With max_ahead 2 the teacher makes rows of steps 1 to 3, and of step 4 once step 1 is trained."""
    bounds = flow(plan(12, batch=2, rollout="teacher"), rollout="teacher", max_ahead=2)
    assert [row.step for _ in range(4) for row in bounds.take("teacher", version=None, limit=8)] == [1, 1, 2, 2, 3, 3]
    bounds.trained(1)
    assert [row.step for row in bounds.take("teacher", version=None, limit=8)] == [4, 4]


def test_a_step_is_complete_when_rows_of_both_sources_are_made() -> None:
    """A mixed step waits for its last row; the teacher's rows have no staleness."""
    rows = plan(20, batch=20, student_fraction=0.5)
    bounds = flow(rows, student_fraction=0.5)
    teacher, student = bounds.take("teacher", version=None, limit=99), bounds.take("student", version=0, limit=99)
    assert sorted(ids(teacher) + ids(student)) == sorted(ids(rows.rows(1)))
    for row in teacher:
        bounds.made(row, None)
    for row in student[:-1]:
        bounds.made(row, 0)
    assert bounds.complete_steps() == []
    assert not bounds.is_sealed(1)
    bounds.made(student[-1], 0)
    assert bounds.complete_steps() == [1]
    assert bounds.seal(1) == [0] * len(student)
    assert bounds.is_sealed(1)


def test_rows_that_are_there_are_not_made_again() -> None:
    """A run that trained step 1 and has sealed step 2 begins with the rows of step 3."""
    rows = student_plan()
    done = tuple(ids(rows.rows(1)) + ids(rows.rows(2)))
    bounds = flow(rows, trained=1, done=done, rollout="student", max_staleness=1)
    assert bounds.is_sealed(2)
    assert bounds.take("student", version=1, limit=8) == rows.rows(3)


def test_lost_rows_come_alone_and_are_given_up_after_two_losses() -> None:
    """A lost pair comes back one by one; the row that is lost alone twice is given up, the step goes on without it."""
    rows = student_plan()
    bounds = flow(rows, rollout="student")
    pair = bounds.take("student", version=0, limit=8)
    assert bounds.lost(pair) == []
    [one] = bounds.take("student", version=0, limit=8)
    assert bounds.lost([one]) == []
    [two] = bounds.take("student", version=0, limit=8)
    assert {one, two} == set(pair)
    bounds.made(two, 0)
    assert bounds.take("student", version=0, limit=8) == [one]
    assert bounds.lost([one]) == [one]
    assert bounds.complete_steps() == [1]
    assert bounds.seal(1) == [0]


def test_rows_too_old_at_their_turn_are_made_again() -> None:
    """With discard, rows of step 3 made by weights 0 are begun at once and fall when step 3 is next."""
    rows = student_plan()
    bounds = flow(rows, rollout="student", max_staleness=1, stale_rows="discard")
    for step in (1, 2, 3):
        for row in bounds.take("student", version=0, limit=8):
            assert row.step == step
            bounds.made(row, 0)
    for step in (1, 2):
        assert bounds.discard_stale() == []
        assert bounds.complete_steps() == [step]
        bounds.seal(step)
        bounds.trained(step)
    assert bounds.discard_stale() == rows.rows(3)
    assert bounds.num_discarded == 2
    assert bounds.complete_steps() == []
    for row in bounds.take("student", version=2, limit=8):
        bounds.made(row, 2)
    assert bounds.discard_stale() == []
    assert bounds.seal(3) == [0, 0]


def test_bounds_that_could_never_be_met_are_refused() -> None:
    """New weights every 3 steps leave engines 2 steps behind: too much for max_staleness 1."""
    with pytest.raises(ConfigError, match="sync_steps 2 or less"):
        flow(student_plan(), rollout="student", sync_steps=3, max_staleness=1)


@pytest.mark.parametrize("stale_rows", ["wait", "discard"])
@pytest.mark.parametrize(("max_staleness", "sync_steps"), [(0, 1), (1, 1), (1, 2), (3, 1), (3, 2), (3, 4)])
def test_neither_side_waits_for_ever(stale_rows: Any, max_staleness: int, sync_steps: int) -> None:
    """Engines and trainer in random order: every row is used once, never staler than allowed, and the run ends."""
    for seed in range(20):
        rng = random.Random(seed)
        rows = plan(30, batch=4, student_fraction=0.5)
        options = {"max_staleness": max_staleness, "sync_steps": sync_steps, "stale_rows": stale_rows, "max_ahead": 3}
        bounds = flow(rows, **options)
        trained, version = 0, 0
        staleness: list[int] = []
        made: list[str] = []
        given_up: list[str] = []
        running: list[tuple[PlannedRow, int | None]] = []
        for _ in range(10_000):
            if trained == rows.last_step:
                break
            action = rng.choice(["teacher", "student", "finish", "seal", "train"])
            if action == "teacher":
                running += [(row, None) for row in bounds.take("teacher", version=None, limit=rng.randint(1, 4))]
            elif action == "student":
                running += [(row, version) for row in bounds.take("student", version=version, limit=rng.randint(1, 4))]
            elif action == "finish" and running:
                row, made_by = running.pop(rng.randrange(len(running)))
                if rng.random() < 0.1:
                    given_up += ids(bounds.lost([row]))
                else:
                    bounds.made(row, made_by)
                    made.append(row.row_id)
            elif action == "seal":
                bounds.discard_stale()
                for step in bounds.complete_steps():
                    staleness += bounds.seal(step)
            elif action == "train" and bounds.is_sealed(trained + 1):
                trained += 1
                bounds.trained(trained)
                version = trained - trained % sync_steps
        assert trained == rows.last_step
        assert not running
        assert not bounds.has_more
        assert max(staleness) <= max_staleness
        planned = [row.row_id for step in range(1, rows.last_step + 1) for row in rows.rows(step)]
        assert len(made) == len(planned) - len(given_up) + bounds.num_discarded
        assert set(made) | set(given_up) == set(planned)
