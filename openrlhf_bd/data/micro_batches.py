"""From rollouts and blocks of pre-training text to the tensors of one micro-batch.

Shapes: B rows of a micro-batch, L positions of a row, S states of the rollouts, P states of the text, M candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openrlhf_bd.data.assignment import Layout
from openrlhf_bd.errors import DataError
from openrlhf_bd.functional.candidates import CandidateSets
from openrlhf_bd.functional.trajectories import Trajectories, num_states
from openrlhf_bd.records import Rollout


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Input of the student's forward pass.

    Attributes:
        input_ids: token ids, [B, L]; packed rows are [1, L].
        position_ids: position of each token in its own row, like input_ids.
        attention_mask: 1 on tokens and 0 on padding, [B, L]; None where there is no padding.
        state_index_S: position in the flattened input of each state: the token before the action, [S].
        num_tokens: tokens, without padding.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    state_index_S: Tensor
    num_tokens: int

    @property
    def num_positions(self) -> int:
        """Tokens and padding."""
        return self.input_ids.numel()

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same batch with tensors on `device`."""
        return TokenBatch(
            self.input_ids.to(device),
            self.position_ids.to(device),
            None if self.attention_mask is None else self.attention_mask.to(device),
            self.state_index_S.to(device),
            self.num_tokens,
        )


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rollouts and blocks of pre-training text as tensors of one forward pass.

    Attributes:
        tokens: input of the forward pass; state_index_S has the states of `trajectories`, then those of the text.
        trajectories: actions of the rollouts and how states follow each other; no state where there is no rollout.
        sets: candidate sets of the same states; None where the algorithm reads none or there is no rollout.
        target_P: the token that follows each state of the text.
        weight: 1, or 0 for a filler, which is computed and counts nothing.
        names: rows and blocks, for messages.
    """

    tokens: TokenBatch
    trajectories: Trajectories
    sets: CandidateSets | None
    target_P: Tensor
    weight: float
    names: tuple[str, ...]

    @property
    def num_states(self) -> int:
        """States of the rollouts: the first entries of tokens.state_index_S."""
        return self.trajectories.num_states

    @property
    def num_targets(self) -> int:
        """States of the text: the last entries of tokens.state_index_S."""
        return len(self.target_P)

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same micro-batch with tensors on `device`."""
        return replace(
            self,
            tokens=self.tokens.to(device),
            trajectories=self.trajectories.to(device),
            sets=None if self.sets is None else self.sets.to(device),
            target_P=self.target_P.to(device),
        )


def collate(
    rollouts: Sequence[Rollout],
    blocks: Mapping[str, NDArray[np.integer]] | None = None,
    *,
    layout: Layout,
    with_sets: bool,
    weight: float = 1.0,
) -> MicroBatch:
    """Tensors of a micro-batch, on CPU.

    State t of a rollout with P prompt tokens is position P - 1 + t: its hidden state predicts response token t. Every
    token of a block but the first is the target of the position before it.

    Args:
        rollouts: rows; without blocks at least one.
        blocks: name -> tokens of a block of pre-training text, at least two.
        layout: pad rows on the right, or pack them into one sequence.
        with_sets: whether the algorithm reads candidate sets; without them a row has no bootstrap state.
        weight: 1, or 0 for a filler.

    Raises:
        DataError: a prompt or response is empty, a row has no sets though they are needed, or a row's parts don't fit
            together; the message names the row.
    """
    blocks = blocks or {}
    rollouts = [rollout if with_sets else replace(rollout, sets=None) for rollout in rollouts]
    _check(rollouts, with_sets=with_sets)
    rows = [np.concatenate([rollout.prompt_ids, rollout.response_ids]) for rollout in rollouts]
    try:
        states = [np.arange(num_states(rollout), dtype=np.int64) + len(rollout.prompt_ids) - 1 for rollout in rollouts]
        trajectories = Trajectories.from_rollouts(rollouts) if rollouts else _no_trajectories()
    except ValueError as error:
        raise DataError(str(error)) from error
    rows += list(blocks.values())
    states += [np.arange(len(block) - 1, dtype=np.int64) for block in blocks.values()]
    recorded = [rollout.sets for rollout in rollouts if rollout.sets is not None]
    return MicroBatch(
        tokens=_packed(rows, states) if layout == "packed" else _padded(rows, states),
        trajectories=trajectories,
        sets=CandidateSets.from_recorded(recorded) if recorded else None,
        target_P=torch.from_numpy(np.concatenate([_NO_IDS, *(block[1:] for block in blocks.values())])),
        weight=weight,
        names=(*(f"row {rollout.row_id}" for rollout in rollouts), *blocks),
    )


_NO_IDS = np.empty(0, dtype=np.int64)


def _no_trajectories() -> Trajectories:
    none = torch.from_numpy(_NO_IDS)
    return Trajectories(taken_S=none, next_S=none, terminal_S=none.bool(), row_S=none)


def _check(rollouts: Sequence[Rollout], *, with_sets: bool) -> None:
    for rollout in rollouts:
        if not len(rollout.prompt_ids):
            raise DataError(f"row {rollout.row_id}: the prompt is empty; the first action needs a token before it")
        if with_sets and rollout.sets is None:
            raise DataError(f"row {rollout.row_id}: no candidate sets were recorded, but the algorithm needs them")


def _padded(rows: Sequence[NDArray[np.integer]], states: Sequence[NDArray[np.int64]]) -> TokenBatch:
    lengths = [len(row) for row in rows]
    longest = max(lengths)
    # What stands in the padding doesn't matter: masks are made from lengths.
    input_ids = np.zeros((len(rows), longest), dtype=np.int64)
    attention_mask = np.zeros((len(rows), longest), dtype=np.int64)
    for index, row in enumerate(rows):
        input_ids[index, : len(row)] = row
        attention_mask[index, : len(row)] = 1
    index_S = np.concatenate([index * longest + row_states for index, row_states in enumerate(states)])
    return TokenBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.arange(longest).expand(len(rows), longest),
        attention_mask=torch.from_numpy(attention_mask) if min(lengths) < longest else None,
        state_index_S=torch.from_numpy(index_S),
        num_tokens=sum(lengths),
    )


def _packed(rows: Sequence[NDArray[np.integer]], states: Sequence[NDArray[np.int64]]) -> TokenBatch:
    lengths = [len(row) for row in rows]
    starts = np.cumsum([0, *lengths[:-1]])
    index_S = np.concatenate([start + row_states for start, row_states in zip(starts, states, strict=True)])
    return TokenBatch(
        input_ids=torch.from_numpy(np.concatenate(rows).astype(np.int64))[None],
        position_ids=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))[None],
        attention_mask=None,
        state_index_S=torch.from_numpy(index_S),
        num_tokens=sum(lengths),
    )
