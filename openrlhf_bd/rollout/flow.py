"""Which rows of an online run may begin, which steps have all theirs, and what is too stale. No processes, no clock.

A step trains when all rows of its batch are sealed. Rows are begun for at most `max_ahead` steps beyond the one that
trains next. A student's row of step t that began with weights v has a staleness of t - 1 - v optimizer steps, and
`max_staleness` bounds it: where `stale_rows` is "wait" by beginning rows only with weights that are new enough for
their step, where it is "discard" by making a row again if it is too old when its step's turn comes.

Neither side can wait for the other for ever: the step that trains next is always within the bounds of whoever makes its
rows, since the engines have weights that are at most `sync_steps` - 1 <= `max_staleness` steps behind.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from openrlhf_bd.config import OnlineOptions
from openrlhf_bd.errors import ConfigError
from openrlhf_bd.records import Source
from openrlhf_bd.rollout.plan import PlannedRow, RowPlan

ATTEMPTS_ALONE = 2


def check_flow(options: OnlineOptions) -> None:
    """Refuse bounds under which no row of the next step could ever begin.

    Raises:
        ConfigError: weights arrive more seldom than staleness allows.
    """
    if options.sync_steps > options.max_staleness + 1:
        raise ConfigError(
            f"--algo.distill.sync_steps {options.sync_steps} leaves the engines up to {options.sync_steps - 1} steps "
            f"behind, more than --algo.distill.max_staleness {options.max_staleness} allows; use --algo.distill."
            f"sync_steps {options.max_staleness + 1} or less, or a larger max_staleness"
        )


@dataclass(slots=True)
class _Step:
    """Rows of one step.

    Attributes:
        waiting: rows that nobody makes, by source.
        versions: of the rows that are made, by row id; None for the teacher's.
        missing: rows that are not made yet.
    """

    waiting: dict[Source, deque[PlannedRow]]
    versions: dict[str, int | None] = field(default_factory=dict)
    missing: int = 0


class Flow:
    """Bookkeeping of the rows of an online run.

    Args:
        plan: the rows of every step.
        options: bounds.
        trained: optimizer steps done.
        is_done: whether a row is sealed or given up.

    Attributes:
        num_discarded: rows that were too stale, so far.
    """

    def __init__(self, plan: RowPlan, options: OnlineOptions, *, trained: int, is_done: Callable[[str], bool]) -> None:
        check_flow(options)
        self._plan, self._options, self._is_done = plan, options, is_done
        self._trained = trained
        self._steps: dict[int, _Step] = {}
        self._opened = max(trained, plan.first_step - 1)
        self._failures: dict[str, int] = {}
        self.num_discarded = 0
        self._open()

    def take(self, source: Source, *, version: int | None, limit: int) -> list[PlannedRow]:
        """Rows of one step that an engine shall make now, those of the earliest step first.

        A row that was lost with an engine comes alone.

        Args:
            source: whose engine asks.
            version: of the student's weights on it; None for the teacher's.
            limit: most rows.

        Returns:
            At least one row, or none where the engine has to wait.
        """
        for number, step in sorted(self._steps.items()):
            waiting = step.waiting[source]
            if not waiting or not self._is_fresh_enough(number, version):
                continue
            if waiting[0].row_id in self._failures:
                return [waiting.popleft()]
            rows: list[PlannedRow] = []
            while waiting and len(rows) < limit and waiting[0].row_id not in self._failures:
                rows.append(waiting.popleft())
            return rows
        return []

    def made(self, row: PlannedRow, version: int | None) -> None:
        """A row is made, with its sets."""
        step = self._steps[row.step]
        step.versions[row.row_id] = version
        step.missing -= 1

    def lost(self, rows: Sequence[PlannedRow]) -> list[PlannedRow]:
        """Rows were lost with an engine: they wait again, one by one.

        Returns:
            Those that are given up, because they were lost alone before.
        """
        given_up = []
        for row in reversed(rows):
            failures = self._failures.get(row.row_id, 0) + (1 if len(rows) == 1 else 0)
            self._failures[row.row_id] = failures
            step = self._steps[row.step]
            if failures >= ATTEMPTS_ALONE:
                step.missing -= 1
                given_up.append(row)
            else:
                step.waiting[row.source].append(row)
        return given_up

    def discard_stale(self) -> list[PlannedRow]:
        """Rows of the step that trains next that have become too stale; they wait to be made again."""
        number = self._trained + 1
        step = self._steps.get(number)
        if step is None or step.missing or self._options.stale_rows == "wait":
            return []
        bound = self._options.max_staleness
        stale = [
            row
            for row in self._plan.rows(number)
            if (version := step.versions.get(row.row_id)) is not None and number - 1 - version > bound
        ]
        for row in stale:
            del step.versions[row.row_id]
            step.waiting[row.source].append(row)
        step.missing += len(stale)
        self.num_discarded += len(stale)
        return stale

    def complete_steps(self) -> list[int]:
        """Steps whose rows are all made and not sealed, and may be; in order."""
        # What might yet be discarded is sealed when its turn has come.
        last = self._trained + 1 if self._options.stale_rows == "discard" else self._opened
        return [number for number, step in sorted(self._steps.items()) if number <= last and not step.missing]

    def seal(self, number: int) -> list[int]:
        """A step's rows are sealed.

        Returns:
            Staleness of its student's rows, optimizer steps.
        """
        step = self._steps.pop(number)
        return [number - 1 - version for version in step.versions.values() if version is not None]

    def is_sealed(self, number: int) -> bool:
        """Whether a step can train."""
        return number <= self._opened and number not in self._steps

    def trained(self, number: int) -> None:
        """An optimizer step was done."""
        self._trained = number
        self._open()

    @property
    def has_more(self) -> bool:
        """Whether there are rows that nobody has begun: what idle engines are held back from."""
        waits = any(rows for step in self._steps.values() for rows in step.waiting.values())
        return waits or self._opened < self._plan.last_step

    def _is_fresh_enough(self, number: int, version: int | None) -> bool:
        if version is None or self._options.stale_rows == "discard":
            return True
        return number - 1 - version <= self._options.max_staleness

    def _open(self) -> None:
        last = min(self._plan.last_step, self._trained + 1 + self._options.max_ahead)
        for number in range(self._opened + 1, last + 1):
            rows = [row for row in self._plan.rows(number) if not self._is_done(row.row_id)]
            if rows:
                waiting: dict[Source, deque[PlannedRow]] = {
                    "teacher": deque(row for row in rows if row.source == "teacher"),
                    "student": deque(row for row in rows if row.source == "student"),
                }
                self._steps[number] = _Step(waiting, missing=len(rows))
            self._opened = max(self._opened, number)
