"""Which responses a job asks the teacher for: one request a row of the store."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from openrlhf_bd.config import Config
from openrlhf_bd.data.limits import teacher_length
from openrlhf_bd.errors import DataError
from openrlhf_bd.records import Prompt, Rollout


@dataclass(frozen=True, slots=True)
class RolloutRequest:
    """One response to sample from the teacher.

    Attributes:
        row_id: "<prompt_id>:<sample>".
        prompt_ids: prompt tokens, as the student sees them.
        seed: of this request's sampler.
        max_new_tokens: longest response.
        teacher_ids: prompt tokens as the teacher sees them; None: as the student does.
        teacher: name of the teacher, where a store has several.
    """

    row_id: str
    prompt_ids: NDArray[np.int32]
    seed: int
    max_new_tokens: int
    teacher_ids: NDArray[np.int32] | None = None
    teacher: str | None = None

    @property
    def seen_by_teacher(self) -> NDArray[np.int32]:
        """The prompt that the engine gets."""
        return self.prompt_ids if self.teacher_ids is None else self.teacher_ids


@dataclass(frozen=True, slots=True)
class ScoringRequest:
    """One response for the teacher to score.

    Attributes:
        rollout: the row, without the teacher's log-probabilities and sets.
        teacher_ids: prompt tokens as the teacher sees them; None: as the student does.
    """

    rollout: Rollout
    teacher_ids: NDArray[np.int32] | None = None

    @property
    def row_id(self) -> str:
        return self.rollout.row_id


Request = RolloutRequest | ScoringRequest


def rollout_requests(
    prompts: Sequence[Prompt], *, config: Config, completed: Container[str] = ()
) -> Iterator[RolloutRequest]:
    """One request a row, the samples of a prompt side by side so that they share its cache.

    A response has room in the student's sequence and in the teacher's.

    Args:
        prompts: prompts.
        config: `rollout`, `data.max_len`, `teacher.max_len`, `train.seed`.
        completed: row ids to leave out.

    Raises:
        DataError: a prompt leaves no room for a response.
    """
    for prompt in prompts:
        for sample in range(config.rollout.n_samples_per_prompt):
            row_id = f"{prompt.prompt_id}:{sample}"
            if row_id not in completed:
                yield rollout_request(prompt, row_id, config=config)


def rollout_request(prompt: Prompt, row_id: str, *, config: Config) -> RolloutRequest:
    """The request of one row; see `rollout_requests`.

    Raises:
        DataError: the prompt leaves no room for a response.
    """
    room, limit = _room(prompt, config), config.rollout.max_new_tokens
    return RolloutRequest(
        row_id=row_id,
        prompt_ids=prompt.token_ids,
        seed=row_seed(config.train.seed, row_id),
        max_new_tokens=room if limit is None else min(room, limit),
        teacher_ids=prompt.teacher_ids,
        teacher=prompt.teacher,
    )


def _room(prompt: Prompt, config: Config) -> int:
    """Tokens that a response to a prompt may have."""
    room = config.data.max_len - len(prompt.token_ids)
    if room < 1:
        raise DataError(
            f"prompt {prompt.prompt_id}: found {len(prompt.token_ids)} tokens, expected fewer than --data.max_len "
            f"{config.data.max_len}, which holds prompt and response; raise it, or lower --data.max_prompt_len"
        )
    if prompt.teacher_ids is None:
        return room
    length, num_seen = teacher_length(config), len(prompt.teacher_ids)
    if num_seen >= length:
        raise DataError(
            f"prompt {prompt.prompt_id}: found {num_seen} tokens as the teacher sees it, expected fewer than "
            f"--teacher.max_len {length}, which holds prompt and response; raise it"
        )
    return min(room, length - num_seen)


def row_seed(seed: int, row_id: str) -> int:
    """Sampler seed of a row, in [0, 2^63): the same whatever batch, engine or run the row comes from."""
    digest = hashlib.blake2b(f"{seed}:{row_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
