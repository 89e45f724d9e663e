"""The nouns that cross processes: prompts, rollouts and the candidate sets recorded for them. NumPy only.

Shapes: T response tokens of one row, S states with a recorded set (T, or T + 1 where a truncated response also has
the set of the state after its last token), M candidates of one row, flattened over its states.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

FinishReason = Literal["stop", "length"]
Source = Literal["teacher", "student"]
Activity = Literal["start", "generate", "score", "train", "sync", "validate", "checkpoint", "evaluate", "wait"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of the data set, tokenised.

    Attributes:
        prompt_id: stable name of the prompt within its data set; row ids are made from it.
        token_ids: prompt as the student sees it.
        record: the data set's own record (instruction, input, reference, ...), for evaluation and reports.
        teacher_ids: prompt as the teacher sees it; None: as the student does.
        teacher: name of the teacher that answers; None where there is one teacher.
    """

    prompt_id: str
    token_ids: NDArray[np.int32]
    record: Mapping[str, Any]
    teacher_ids: NDArray[np.int32] | None = None
    teacher: str | None = None

    @property
    def seen_by_teacher(self) -> NDArray[np.int32]:
        """The teacher's prompt, whether it is another or not."""
        return self.token_ids if self.teacher_ids is None else self.teacher_ids


@dataclass(frozen=True, slots=True)
class RecordedSets:
    """Top-p candidate sets of the states of one row, ragged (CSR), as the teacher's engine recorded them.

    The candidates of a state are in descending order of teacher probability (ties by lower id). Ids that are always
    included and lie outside the top-p set come last, which keeps the order. A set has at least one id; sets of p = 1
    are the whole vocabulary and list none (see `whole`).

    Attributes:
        ids_M: candidate token ids.
        offsets: S + 1 positions in ids_M; state s owns ids_M[offsets[s]:offsets[s + 1]].
        neg_log_mass_S: -log of the teacher's mass on each set, nats, >= 0.
        logprobs_M: the teacher's log-probability of every candidate at temperature 1, or None if not recorded.
    """

    ids_M: NDArray[np.int32]
    offsets: NDArray[np.int64]
    neg_log_mass_S: NDArray[np.float32]
    logprobs_M: NDArray[np.float32] | None

    @staticmethod
    def whole(num_states: int) -> RecordedSets:
        """The sets of p = 1: of each state the whole vocabulary."""
        return RecordedSets(
            ids_M=np.empty(0, np.int32),
            offsets=np.zeros(num_states + 1, np.int64),
            neg_log_mass_S=np.zeros(num_states, np.float32),
            logprobs_M=None,
        )

    @property
    def is_whole(self) -> bool:
        """Whether each set is the whole vocabulary."""
        return not len(self.ids_M)

    @property
    def num_states(self) -> int:
        return len(self.offsets) - 1

    @property
    def sizes_S(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)


@dataclass(frozen=True, slots=True)
class Origin:
    """Which step of an online run a row was made for, and by whom.

    Attributes:
        step: optimizer step whose global batch the row belongs to, counted from 1.
        source: whose engines sampled it; "student" also where the teacher was mixed in.
        policy_version: optimizer steps behind the student's weights when sampling began; None for the teacher's rows.
        behaviour_logprobs_T: log-probability of each response token under the distribution that it was sampled from,
            nats; None for the teacher's rows.
    """

    step: int
    source: Source
    policy_version: int | None = None
    behaviour_logprobs_T: NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class Rollout:
    """One response to one prompt: a row of the store.

    Attributes:
        row_id: "<prompt_id>:<sample>", unique in a store.
        prompt_ids: prompt tokens, as the student sees them.
        response_ids: response tokens, the stop token included where it was produced; at least one.
        finish_reason: "stop" if the last token is a stop token, "length" if the response was cut.
        logprobs_T: the teacher's log-probability of each response token at temperature 1, or None (gold responses).
        sets: candidate sets, T of them, or T + 1 for a cut response whose following state was recorded too; None where
            the algorithm needs none.
        teacher_prompt_hash: hash of the prompt under which the teacher gave logprobs_T and sets; None where that is
            prompt_ids.
        teacher: name of the teacher that made the row; None where a store has one teacher.
        origin: in a store of an online run, where the row comes from; else None.
    """

    row_id: str
    prompt_ids: NDArray[np.int32]
    response_ids: NDArray[np.int32]
    finish_reason: FinishReason
    logprobs_T: NDArray[np.float32] | None = None
    sets: RecordedSets | None = None
    teacher_prompt_hash: int | None = None
    teacher: str | None = None
    origin: Origin | None = None


@dataclass(frozen=True, slots=True)
class Span:
    """What an actor did for a while.

    Attributes:
        activity: what.
        start_s: unix time, seconds, by the clock of the actor's machine.
        end_s: unix time, seconds.
        step: optimizer step that it belongs to; None where it belongs to none.
        parts: seconds of what it consists of, by name, in order; the rest of it has no name.
    """

    activity: Activity
    start_s: float
    end_s: float
    step: int | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
