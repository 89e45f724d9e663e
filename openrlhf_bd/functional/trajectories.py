"""How the states of a micro-batch follow each other in time, and which action was taken in each."""

# S states of a micro-batch, B rows, T response tokens of a row

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from openrlhf_bd.records import Rollout


@dataclass(frozen=True)
class Behaviour:
    """Who took the actions of an online run's states. Zeros and False where a state has no action.

    Attributes:
        is_student_S: True in rows that the student's engines sampled.
        logprob_S: log-probability of the taken token under the distribution that it was sampled from, nats; for the
            teacher's rows that of the teacher.
        teacher_logprob_S: the teacher's log-probability of the taken token at temperature 1, nats.
    """

    is_student_S: Tensor
    logprob_S: Tensor
    teacher_logprob_S: Tensor

    def to(self, device: torch.device | str) -> Behaviour:
        """The same with tensors on `device`."""
        return Behaviour(self.is_student_S.to(device), self.logprob_S.to(device), self.teacher_logprob_S.to(device))

    def narrow(self, start: int, length: int) -> Behaviour:
        """Of states [start, start + length)."""
        parts = (self.is_student_S, self.logprob_S, self.teacher_logprob_S)
        return Behaviour(*(part.narrow(0, start, length) for part in parts))

    @staticmethod
    def from_rollouts(rollouts: Sequence[Rollout]) -> Behaviour | None:
        """Of the same states as Trajectories.from_rollouts; None unless every row has an origin.

        Raises:
            ValueError: a row lacks the teacher's log-probabilities, or a student's row those of its behaviour.
        """
        if not rollouts or any(rollout.origin is None for rollout in rollouts):
            return None
        student, logprobs, teacher = [], [], []
        for rollout in rollouts:
            assert rollout.origin is not None
            is_student, behaviour_T = rollout.origin.source == "student", rollout.logprobs_T
            if is_student:
                behaviour_T = rollout.origin.behaviour_logprobs_T
            if behaviour_T is None or rollout.logprobs_T is None:
                raise ValueError(
                    f"row {rollout.row_id}: log-probabilities of its tokens are missing; it needs them all"
                )
            room = num_states(rollout) - len(rollout.response_ids)
            student.append(np.append(np.full(len(rollout.response_ids), is_student), [False] * room))
            logprobs.append(np.append(behaviour_T, [0.0] * room))
            teacher.append(np.append(rollout.logprobs_T, [0.0] * room))
        return Behaviour(
            is_student_S=torch.from_numpy(np.concatenate(student).astype(bool)),
            logprob_S=torch.from_numpy(np.concatenate(logprobs).astype(np.float32)),
            teacher_logprob_S=torch.from_numpy(np.concatenate(teacher).astype(np.float32)),
        )


@dataclass(frozen=True)
class Trajectories:
    """Rows of a micro-batch, flat over their states: row after row, in time order.

    A row of T response tokens has T states with an action. One more, without an action, follows where the response
    was cut and the set of the state after its last token was recorded: it only serves as a next state.

    Attributes:
        taken_S: token taken in each state, int64; -1 where a state has no action.
        next_S: index of the state that follows, int64; -1 where none is there.
        terminal_S: True where the taken token is the stop token that ended the response.
        row_S: row of each state, int64, non-decreasing from 0.
        behaviour: who took the actions, in an online run's rows; None in others.
    """

    taken_S: Tensor
    next_S: Tensor
    terminal_S: Tensor
    row_S: Tensor
    behaviour: Behaviour | None = None

    @property
    def num_states(self) -> int:
        return len(self.taken_S)

    @property
    def has_action_S(self) -> Tensor:
        """True where a token was taken: the states that a loss is a mean over."""
        return self.taken_S >= 0

    @cached_property
    def student_S(self) -> Tensor | None:
        """True at the states of rows that the student sampled; None where there is no such row."""
        if self.behaviour is None or not bool(self.behaviour.is_student_S.any()):
            return None
        return self.behaviour.is_student_S

    def to(self, device: torch.device | str) -> Trajectories:
        """The same trajectories with tensors on `device`."""
        return Trajectories(
            self.taken_S.to(device),
            self.next_S.to(device),
            self.terminal_S.to(device),
            self.row_S.to(device),
            None if self.behaviour is None else self.behaviour.to(device),
        )

    @staticmethod
    def from_rollouts(rollouts: Sequence[Rollout]) -> Trajectories:
        """Lay out the states of rows in the order given; row i has num_states(rollouts[i]) of them.

        Args:
            rollouts: rows of a micro-batch. What is terminal comes from `finish_reason`, never from a token's id.

        Returns:
            CPU tensors.

        Raises:
            ValueError: no row, an empty response, or sets whose number fits neither T nor, in a cut response, T + 1.
        """
        if not rollouts:
            raise ValueError("no row: a micro-batch needs at least one")
        taken, following, terminal, rows = [], [], [], []
        start = 0
        for row, rollout in enumerate(rollouts):
            num_tokens, length = len(rollout.response_ids), num_states(rollout)
            taken.append(np.append(rollout.response_ids.astype(np.int64), [-1] * (length - num_tokens)))
            following.append(np.append(np.arange(start + 1, start + length), -1))
            terminal.append(np.arange(length) == (num_tokens - 1 if rollout.finish_reason == "stop" else -1))
            rows.append(np.full(length, row))
            start += length
        return Trajectories(
            taken_S=torch.from_numpy(np.concatenate(taken).astype(np.int64)),
            next_S=torch.from_numpy(np.concatenate(following).astype(np.int64)),
            terminal_S=torch.from_numpy(np.concatenate(terminal)),
            row_S=torch.from_numpy(np.concatenate(rows).astype(np.int64)),
            behaviour=Behaviour.from_rollouts(rollouts),
        )


def num_states(rollout: Rollout) -> int:
    """States of one row: T response tokens, or T + 1 where a cut response has the set of the state that follows.

    State t is the position that predicts response token t, so the logits needed are those at the last prompt token
    and at the first `num_states - 1` response tokens.

    Raises:
        ValueError: an empty response, or a number of sets that does not fit it.
    """
    num_tokens = len(rollout.response_ids)
    if not num_tokens:
        raise ValueError(f"row {rollout.row_id}: the response is empty; it needs at least one token")
    if rollout.sets is None or rollout.sets.num_states == num_tokens:
        return num_tokens
    if rollout.sets.num_states == num_tokens + 1 and rollout.finish_reason == "length":
        return num_tokens + 1
    raise ValueError(
        f"row {rollout.row_id}: {rollout.sets.num_states} candidate sets for {num_tokens} response tokens that "
        f'ended by "{rollout.finish_reason}"; expected {num_tokens}, or one more after "length"'
    )


def reduction_weights(trajectories: Trajectories, reduction: Literal["token", "sequence"]) -> Tensor:
    """Weight of each state in a sum over the micro-batch, before division by the count of the global batch.

    token: 1 (divide by the number of response tokens);  sequence: 1 / T of its row (divide by the number of rows);
    0 where a state has no action.

    Returns:
        [S] float32.
    """
    action_S = trajectories.has_action_S.float()
    if reduction == "token":
        return action_S
    length_S = torch.zeros_like(action_S).index_add(0, trajectories.row_S, action_S)
    return action_S / length_S[trajectories.row_S].clamp(min=1.0)
