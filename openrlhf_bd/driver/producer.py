"""The side of an online run that makes rows, beside the ranks that train: engines, scoring, sealing.

The driver's one thread drives both sides. It hands rows to engines that are free, passes references of what the
student sampled on to the teacher, and seals each step's rows as one shard. Rows are in its memory from the time that
they are whole until they are sealed: those of at most `max_ahead` + 1 steps.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import RayError

from openrlhf_bd.config import Config
from openrlhf_bd.driver.engines import EngineActors
from openrlhf_bd.errors import ClusterError
from openrlhf_bd.records import Origin, Prompt, Rollout
from openrlhf_bd.rollout.calls import EngineLostError, control, engine_result
from openrlhf_bd.rollout.flow import Flow
from openrlhf_bd.rollout.mixture import mixture_logprobs
from openrlhf_bd.rollout.plan import PlannedRow, RowPlan
from openrlhf_bd.rollout.pulse import Pulse
from openrlhf_bd.rollout.weights import CONTROL_TIMEOUT_S
from openrlhf_bd.store import StoreWriter
from openrlhf_bd.teacher.requests import rollout_request

logger = logging.getLogger(__name__)

# A second call waits in the engine, so that it never stands still while the driver is busy.
CALLS_PER_STUDENT_ENGINE = 2
CALLS_PER_TEACHER_ENGINE = 1

Kind = Literal["teacher", "student", "score", "start"]


@dataclass(slots=True, eq=False)
class _Engine:
    """One engine's actor and what it has to do.

    Attributes:
        handle: its actor.
        calls: most calls at once.
        version: of the student's weights on it; None on a teacher's.
        is_ready: it has started, and a student's has the weights that its version says.
        running: calls now.
        counted_at: until when its work has been counted, monotonic seconds.
        pulse: its signs of life.
    """

    handle: Any
    calls: int
    version: int | None
    is_ready: bool = True
    running: int = 0
    counted_at: float = 0.0
    pulse: Pulse = field(init=False)

    def __post_init__(self) -> None:
        self.pulse = Pulse(self.handle)


@dataclass(frozen=True, slots=True)
class _Call:
    """What an engine was asked to do.

    Attributes:
        kind: sample from the teacher or the student, score, or start.
        engine: who does it.
        rows: of which rows.
        deadline: when it counts as hung, monotonic seconds.
        sampled: reference of what a student's engine will have sampled, or of what is scored.
        versions: of the student's weights when sampling of each row began; while it is scored.
    """

    kind: Kind
    engine: _Engine
    rows: list[PlannedRow]
    deadline: float
    sampled: Any = None
    versions: Sequence[int] = ()


@dataclass(slots=True)
class _Tally:
    """What happened since the last step."""

    rollout_wait_s: float = 0.0
    back_pressure_s: float = 0.0
    busy_s: dict[Kind, float] = field(default_factory=lambda: {"teacher": 0.0, "student": 0.0, "score": 0.0})
    seal_s: float = 0.0


class Producer:
    """Makes the rows of an online run.

    Args:
        config: the job.
        prompts: prompts of the run.
        plan: which rows each step has.
        writer: of the run's store; each `append` of a step is one shard.
        teachers: the teacher's engines, ready.
        students: the student's rollout engines with the weights after `trained` steps; None: no row needs them.
        trained: optimizer steps done.
    """

    def __init__(
        self,
        config: Config,
        prompts: Sequence[Prompt],
        plan: RowPlan,
        writer: StoreWriter,
        *,
        teachers: EngineActors,
        students: EngineActors | None,
        trained: int,
    ) -> None:
        self._config, self._prompts, self._plan, self._writer = config, prompts, plan, writer
        is_done = writer.settled_rows().__contains__
        self._flow = Flow(plan, config.algo.distill, trained=trained, is_done=is_done)
        self._actors = {"teacher": teachers, "student": students}
        self._teachers = [_Engine(handle, CALLS_PER_TEACHER_ENGINE, None) for handle in teachers.handles]
        self._students = [
            _Engine(handle, CALLS_PER_STUDENT_ENGINE, trained) for handle in (students.handles if students else ())
        ]
        self._running: dict[Any, _Call] = {}
        self._to_score: deque[_Call] = deque()
        self._made: dict[str, Rollout] = {}
        self._staleness: dict[int, list[int]] = {}
        self._num_rows: dict[int, int] = {}
        self._tally, self._discarded_before = _Tally(), 0
        self._num_restarts, self._num_quarantined = 0, len(writer.quarantined_row_ids())
        self._students_rest = False
        self._teacher_mix = config.algo.distill.teacher_mix
        self._now = time.monotonic()

    @property
    def needs_weights(self) -> bool:
        """Whether a student's engine has started anew and waits for the student's weights."""
        return any(not engine.is_ready and engine.running == 0 for engine in self._students)

    def wait_for_students(self) -> None:
        """Until the student's engines that take the place of others have started.

        Raises:
            ClusterError, StoreError: see `advance`.
        """
        while any(not engine.is_ready and engine.running for engine in self._students):
            self.advance(timeout_s=1.0)

    def replace_dead_students(self) -> bool:
        """Replace the student's engines that do not answer; False where all do.

        Until all have weights again none of them gets rows: one that was left behind in an update would refuse them.

        Raises:
            ClusterError: no more may be replaced.
        """
        dead = _silent(self._students)
        for engine in self._students:
            engine.is_ready = False
        for engine in dead:
            self._lose_engine(engine, "it does not answer")
        return bool(dead)

    def has_weights(self, version: int) -> None:
        """All of the student's engines have the weights after so many steps."""
        for engine in self._students:
            engine.version, engine.is_ready = version, True

    def advance(self, *, timeout_s: float, beside: Sequence[Any] = ()) -> None:
        """Make progress: hand out rows, take one result, seal what is complete.

        Args:
            timeout_s: longest wait for a result.
            beside: references of other work, whose end also ends the wait.

        Raises:
            ClusterError: no engine is left, or too many rows were given up.
            BDError: what an engine raised, if it is one of ours.
            StoreError: rows could not be written.
        """
        self._hand_out()
        self._count_time()
        refs = [*self._running, *beside]
        if refs:
            ready, _ = ray.wait(refs, num_returns=1, timeout=max(0.0, min(timeout_s, self._next_deadline_s())))
            self._count_time()
            for ref in ready:
                if ref in self._running:
                    self._settle(ref, self._running.pop(ref))
            self._end_overdue()
        self._end_silent()
        self._seal_complete()

    def wait_for_rows(self, step: int, *, on_idle: Callable[[], None]) -> None:
        """Until the rows of a step are sealed.

        Args:
            step: the step that trains next.
            on_idle: called between results, while the ranks have nothing to do.

        Raises:
            ClusterError: they will never be; see `advance`.
        """
        started = time.monotonic()
        while not self._flow.is_sealed(step):
            on_idle()
            self.advance(timeout_s=1.0)
            if not self._running and not self.needs_weights and not self._flow.is_sealed(step):
                self._hand_out()
                assert self._running, f"no engine makes the rows of step {step}, and nobody will"
        self._tally.rollout_wait_s += time.monotonic() - started

    @contextmanager
    def students_resting(self) -> Iterator[None]:
        """Inside, the student's engines sample no rows: what was begun is finished first. It may be nested.

        Raises:
            ClusterError, StoreError: see `advance`.
        """
        rested, self._students_rest = self._students_rest, True
        while any(call.kind == "student" for call in self._running.values()):
            self.advance(timeout_s=1.0)
        try:
            yield
        finally:
            self._students_rest = rested

    def trained(self, step: int) -> None:
        """The ranks have done a step."""
        self._flow.trained(step)
        self._hand_out()

    def lap(self, step: int) -> dict[str, float]:
        """Metrics of a step: where the time since the last one went, and how stale its rows were."""
        tally, self._tally = self._tally, _Tally()
        staleness = self._staleness.pop(step, [])
        discarded = self._flow.num_discarded - self._discarded_before
        self._discarded_before = self._flow.num_discarded
        metrics = {
            "time_rollout_wait_s": tally.rollout_wait_s,
            "time_back_pressure_s": tally.back_pressure_s,
            "time_seal_s": tally.seal_s,
            "time_teacher_engines_s": tally.busy_s["teacher"],
            "time_student_engines_s": tally.busy_s["student"],
            "time_scoring_s": tally.busy_s["score"],
            "discarded_rows": float(discarded),
        }
        if step in self._num_rows:
            metrics["student_rows"] = len(staleness) / self._num_rows.pop(step)
        if staleness:
            metrics |= {
                "staleness": sum(staleness) / len(staleness),
                "staleness_max": float(max(staleness)),
            }
        return metrics

    def _hand_out(self) -> None:
        for engine in self._teachers:
            while engine.is_ready and engine.running < engine.calls:
                if not (self._score_next(engine) or self._sample("teacher", engine)):
                    break
        for engine in () if self._students_rest else self._students:
            while engine.is_ready and engine.running < engine.calls and self._sample("student", engine):
                pass

    def _sample(self, source: Literal["teacher", "student"], engine: _Engine) -> bool:
        """Give an engine rows to sample; False where there are none for it now."""
        if source == "student" and self._teacher_mix and not any(teacher.is_ready for teacher in self._teachers):
            return False
        num_engines = len(self._teachers if source == "teacher" else self._students)
        limit = -(-self._config.train.batch_size // num_engines)
        rows = self._flow.take(source, version=engine.version, limit=limit)
        if not rows:
            return False
        requests = [rollout_request(self._prompts[row.prompt], row.row_id, config=self._config) for row in rows]
        sampler = {"temperature": self._config.rollout.temperature, "top_p": self._config.rollout.top_p}
        if source == "teacher":
            self._start("teacher", engine, rows, engine.handle.generate_rollouts.remote(requests, **sampler))
        else:
            steps = [row.step for row in rows]
            # What was sampled stays where it is; only the versions come to the driver.
            if self._teacher_mix:
                mixed = {"teacher": self._any_teacher(), "teacher_share": self._teacher_mix}
                method, sampler = engine.handle.sample_mixed, mixed
            else:
                method = engine.handle.sample
            sampled, versions = method.options(num_returns=2).remote(requests, steps=steps, **sampler)
            self._start("student", engine, rows, versions, sampled=sampled)
        return True

    def _score_next(self, engine: _Engine) -> bool:
        if not self._to_score:
            return False
        call = self._to_score.popleft()
        prompts = [self._prompts[row.prompt].teacher_ids for row in call.rows]
        seen = None if all(prompt is None for prompt in prompts) else prompts
        ref = engine.handle.score.remote(call.sampled, seen)
        self._start("score", engine, call.rows, ref, sampled=call.sampled, versions=call.versions)
        return True

    def _start(self, kind: Kind, engine: _Engine, rows: list[PlannedRow], ref: Any, **more: Any) -> None:
        now = time.monotonic()
        limit_s = self._config.cluster.start_timeout_s if kind == "start" else self._config.cluster.generate_timeout_s
        if engine.running == 0:
            engine.counted_at = now
        engine.running += 1
        self._running[ref] = _Call(kind, engine, rows, now + limit_s, **more)

    def _settle(self, ref: Any, call: _Call) -> None:
        call.engine.running -= 1
        if call.kind != "start":
            # Of calls that an engine had at once each second counts once.
            now = time.monotonic()
            self._tally.busy_s[call.kind] += now - call.engine.counted_at
            call.engine.counted_at = now
        try:
            # An engine that refuses to sample, after an update that did not come whole, is lost too.
            result = engine_result(ref, losses=(ClusterError,))
        except EngineLostError as error:
            if error.of_another:
                self._again(call, str(error))
                for teacher in _silent(self._teachers):
                    self._lose_engine(teacher, "it does not answer")
            else:
                self._lose(call, str(error))
            return
        if call.kind == "start":
            # A student's engine also needs the student's weights first.
            call.engine.is_ready = call.engine in self._teachers
        elif call.kind == "student":
            self._to_score.append(replace(call, versions=result))
        else:
            self._keep(call, result)

    def _keep(self, call: _Call, rollouts: Sequence[Rollout]) -> None:
        versions: Sequence[int | None] = call.versions if call.kind == "score" else [None] * len(call.rows)
        for row, rollout, version in zip(call.rows, rollouts, versions, strict=True):
            origin = rollout.origin or Origin(row.step, "teacher")
            if self._teacher_mix and origin.source == "student":
                origin = replace(origin, behaviour_logprobs_T=self._mixture(rollout))
            self._made[row.row_id] = replace(rollout, origin=origin)
            self._flow.made(row, version)

    def _mixture(self, rollout: Rollout) -> NDArray[np.float32]:
        assert rollout.origin is not None
        student_T, teacher_T = rollout.origin.behaviour_logprobs_T, rollout.logprobs_T
        assert student_T is not None
        assert teacher_T is not None
        return mixture_logprobs(teacher_T, student_T, self._teacher_mix)

    def _any_teacher(self) -> Any:
        """The engine of the teacher with the least to do, for the tokens that it adds to the student's responses."""
        return min((engine for engine in self._teachers if engine.is_ready), key=lambda engine: engine.running).handle

    def _seal_complete(self) -> None:
        for row in self._flow.discard_stale():
            del self._made[row.row_id]
        for step in self._flow.complete_steps():
            started = time.monotonic()
            rows = [self._made.pop(row.row_id) for row in self._plan.rows(step) if row.row_id in self._made]
            if not rows:
                raise ClusterError(
                    f"every row of step {step} was given up, so there is nothing to train on; look at the log for what "
                    "ended the engines. Sealed rows are safe"
                )
            self._writer.append(rows)
            self._writer.flush()
            self._staleness[step], self._num_rows[step] = self._flow.seal(step), len(rows)
            self._tally.seal_s += time.monotonic() - started

    def _next_deadline_s(self) -> float:
        now = time.monotonic()
        return min((call.deadline - now for call in self._running.values()), default=float("inf"))

    def _end_overdue(self) -> None:
        now = time.monotonic()
        for ref, call in list(self._running.items()):
            # One that answered while the driver was away is not overdue.
            if call.deadline <= now and ref in self._running and not ray.wait([ref], timeout=0)[0]:
                del self._running[ref]
                call.engine.running -= 1
                self._lose(call, "it did not answer in time")

    def _end_silent(self) -> None:
        limit_s = self._config.cluster.heartbeat_timeout_s
        at_work = {call.engine: (ref, call) for ref, call in self._running.items() if call.kind != "start"}
        for engine in (*self._teachers, *self._students):
            if engine not in at_work:
                engine.pulse.rest()
            elif engine.pulse.silence_s() > limit_s:
                ref, call = at_work[engine]
                del self._running[ref]
                engine.running -= 1
                self._lose(call, f"it made no step for {limit_s:.0f} s (--cluster.heartbeat_timeout_s)")

    def _lose(self, call: _Call, reason: str) -> None:
        """An engine is lost with all its calls: its rows come again, and another engine takes its place."""
        doing = f"rows {call.rows[0].row_id} to {call.rows[-1].row_id}" if call.rows else "its start"
        logger.warning("an engine was lost over %s: %s", doing, reason)
        self._again(call, reason)
        self._lose_engine(call.engine, reason)

    def _lose_engine(self, engine: _Engine, reason: str) -> None:
        lost = [(ref, call) for ref, call in self._running.items() if call.engine is engine]
        for ref, call in lost:
            del self._running[ref]
            self._again(call, reason)
        self._replace(engine, reason)

    def _again(self, call: _Call, reason: str) -> None:
        limit = self._config.teacher.max_quarantined_rows
        for row in self._flow.lost(call.rows):
            if self._num_quarantined >= limit:
                raise ClusterError(
                    f"row {row.row_id} ended two engines by itself ({reason}), and --teacher.max_quarantined_rows is "
                    f"{limit}; sealed rows are safe. Look at this prompt, or raise the limit to leave such rows out, "
                    "then run the same command again to resume"
                )
            logger.warning("row %s is quarantined: it ended two engines by itself (%s)", row.row_id, reason)
            self._writer.quarantine(row.row_id, reason)
            self._num_quarantined += 1

    def _replace(self, engine: _Engine, reason: str) -> None:
        actors = self._actors["teacher" if engine in self._teachers else "student"]
        assert actors is not None
        if self._num_restarts >= self._config.teacher.max_engine_restarts:
            raise ClusterError(
                f"an engine was lost because {reason}, after {self._num_restarts} had been replaced "
                "(--teacher.max_engine_restarts); sealed rows are safe. See Ray's logs for the cause (often memory), "
                "then run the same command again to resume"
            )
        self._num_restarts += 1
        engine.handle, engine.is_ready, engine.running = actors.replace(engine.handle), False, 0
        engine.pulse = Pulse(engine.handle)
        self._start("start", engine, [], engine.handle.ready.remote())

    def _count_time(self) -> None:
        now = time.monotonic()
        if not self._running and self._flow.has_more:
            self._tally.back_pressure_s += now - self._now
        self._now = now


def _silent(engines: Sequence[_Engine]) -> list[_Engine]:
    """Of the engines that have started those that do not answer."""
    started = [engine for engine in engines if engine.is_ready or not engine.running]
    asked = [(engine, control(engine.handle.progress).remote()) for engine in started]
    return [engine for engine, ref in asked if not _answers(ref)]


def _answers(ref: Any) -> bool:
    try:
        ray.get(ref, timeout=CONTROL_TIMEOUT_S)
    except RayError:
        return False
    return True
