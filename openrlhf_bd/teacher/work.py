"""What a generation job asks its engines for: responses sampled from the teacher, or gold ones scored by it."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from openrlhf_bd.config import Config
from openrlhf_bd.records import Prompt
from openrlhf_bd.teacher.requests import Request, RolloutRequest, ScoringRequest, rollout_requests


class Work(Protocol):
    """All rows of a job, and the call of an engine that makes some of them."""

    verb: str

    def requests(self, *, completed: Container[str] = ()) -> Iterator[Request]:
        """A request for each row, without those that are there already."""

    def ask(self, engine: Any, requests: Sequence[Any]) -> Any:
        """Have an engine (a handle of `TeacherEngine`) make rows; a reference to them."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """The teacher's own responses.

    Attributes:
        prompts: that it answers.
        config: see `rollout_requests`; `rollout.temperature`, `rollout.top_p`.
    """

    prompts: Sequence[Prompt]
    config: Config
    verb = "generates"

    def requests(self, *, completed: Container[str] = ()) -> Iterator[RolloutRequest]:
        return rollout_requests(self.prompts, config=self.config, completed=completed)

    def ask(self, engine: Any, requests: Sequence[RolloutRequest]) -> Any:
        rollout = self.config.rollout
        return engine.generate_rollouts.remote(list(requests), temperature=rollout.temperature, top_p=rollout.top_p)


@dataclass(frozen=True, slots=True)
class Scoring:
    """The teacher's log-probabilities and sets on responses that are there.

    Attributes:
        rows: each response, and what the teacher sees before it.
    """

    rows: Sequence[ScoringRequest]
    verb = "scores"

    def requests(self, *, completed: Container[str] = ()) -> Iterator[ScoringRequest]:
        return (row for row in self.rows if row.row_id not in completed)

    def ask(self, engine: Any, requests: Sequence[ScoringRequest]) -> Any:
        return engine.score.remote([row.rollout for row in requests], [row.teacher_ids for row in requests])
