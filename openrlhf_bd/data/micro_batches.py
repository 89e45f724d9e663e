"""From the rows of a global batch to the tensors of each rank's micro-batches.

Every rank gets the same number of micro-batches, since DeepSpeed's ranks meet in each of them; where a rank has too
few rows, a filler takes the place: a row that is computed and counts nothing.

Shapes: N rows of the global batch, B rows of a micro-batch, L positions of a row, S states, M candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openrlhf_bd.errors import DataError
from openrlhf_bd.functional.candidates import CandidateSets
from openrlhf_bd.functional.trajectories import Trajectories, num_states
from openrlhf_bd.records import Rollout

Layout = Literal["padded", "packed"]


@dataclass(frozen=True, slots=True)
class MicroBatchLimit:
    """How large a micro-batch may be: by rows, or by tokens (with padding, where the layout has it).

    Attributes:
        rows: most rows; None where tokens count.
        tokens: most tokens; None where rows count. A longer row is a micro-batch by itself.
        layout: whether rows are padded to the longest of the micro-batch or packed into one sequence.
    """

    rows: int | None
    tokens: int | None
    layout: Layout


@dataclass(frozen=True, slots=True)
class Assignment:
    """One micro-batch of one rank.

    Attributes:
        rows: positions in the global batch, longest first; at least one.
        counts: False for a filler, whose loss and metrics are multiplied by 0.
    """

    rows: NDArray[np.int64]
    counts: bool


def assign_rows(lengths_N: NDArray[np.integer], *, num_ranks: int, limit: MicroBatchLimit) -> list[list[Assignment]]:
    """Divide the rows of a global batch among ranks and micro-batches.

    Longest rows first, each to the rank with the fewest tokens so far; each rank's rows are then cut in order of
    length, so that rows of a micro-batch are about as long as each other. Every row is in exactly one micro-batch
    that counts, and every rank has equally many micro-batches.

    Args:
        lengths_N: tokens of each row.
        num_ranks: ranks.
        limit: size of a micro-batch.

    Returns:
        Micro-batches of each rank.
    """
    longest_first = np.argsort(-lengths_N.astype(np.int64), kind="stable")
    ranks = _rows_of_ranks(longest_first, lengths_N, num_ranks, equal_rows=limit.rows is not None)
    if limit.rows is not None:
        count = -(-max(len(rows) for rows in ranks) // limit.rows)
        cut = [[part for part in np.array_split(rows, count) if len(part)] for rows in ranks]
    else:
        cut = [_cut_by_tokens(rows, lengths_N, limit) for rows in ranks]
        count = max(len(parts) for parts in cut)
        cut = [_split_to(parts, count, lengths_N) for parts in cut]
    filler = Assignment(longest_first[-1:], counts=False)
    return [[Assignment(part, counts=True) for part in parts] + [filler] * (count - len(parts)) for parts in cut]


def _rows_of_ranks(
    longest_first: NDArray[np.int64], lengths_N: NDArray[np.integer], num_ranks: int, *, equal_rows: bool
) -> list[NDArray[np.int64]]:
    """Rows of each rank, longest first. With equal_rows, ranks differ by one row at most."""
    rows: list[list[int]] = [[] for _ in range(num_ranks)]
    tokens = [0] * num_ranks
    least, extra = divmod(len(longest_first), num_ranks)
    for row in longest_first.tolist():
        candidates = list(range(num_ranks))
        if equal_rows:
            with_extra = sum(len(mine) > least for mine in rows)
            most = least + (with_extra < extra)
            candidates = [rank for rank in candidates if len(rows[rank]) < most]
        rank = min(candidates, key=lambda rank: (tokens[rank], rank))
        rows[rank].append(row)
        tokens[rank] += int(lengths_N[row])
    return [np.array(mine, dtype=np.int64) for mine in rows]


def _cut_by_tokens(
    rows: NDArray[np.int64], lengths_N: NDArray[np.integer], limit: MicroBatchLimit
) -> list[NDArray[np.int64]]:
    """Cut one rank's rows, longest first, into micro-batches of at most limit.tokens tokens."""
    assert limit.tokens is not None
    parts: list[list[int]] = []
    taken = 0
    for row in rows.tolist():
        # Padded to the first row of the micro-batch, which is its longest.
        cost = int(lengths_N[parts[-1][0]]) if parts and limit.layout == "padded" else int(lengths_N[row])
        if not parts or taken + cost > limit.tokens:
            parts.append([])
            taken, cost = 0, int(lengths_N[row])
        parts[-1].append(row)
        taken += cost
    return [np.array(part, dtype=np.int64) for part in parts]


def _split_to(parts: list[NDArray[np.int64]], count: int, lengths_N: NDArray[np.integer]) -> list[NDArray[np.int64]]:
    """Halve the largest micro-batches of several rows until there are `count`, as far as rows allow."""
    parts = list(parts)
    while len(parts) < count and any(len(part) > 1 for part in parts):
        divisible = [index for index, part in enumerate(parts) if len(part) > 1]
        largest = max(divisible, key=lambda index: int(lengths_N[parts[index]].sum()))
        parts[largest : largest + 1] = np.array_split(parts[largest], 2)
    return parts


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
    """Rollouts as tensors.

    Attributes:
        tokens: input of the forward pass; state_index_S runs over the states of `trajectories`.
        trajectories: actions and how states follow each other.
        sets: candidate sets of the same states, or None.
        row_ids: of the rows, for messages.
    """

    tokens: TokenBatch
    trajectories: Trajectories
    sets: CandidateSets | None
    row_ids: tuple[str, ...]

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same micro-batch with tensors on `device`."""
        sets = None if self.sets is None else self.sets.to(device)
        return MicroBatch(self.tokens.to(device), self.trajectories.to(device), sets, self.row_ids)


@dataclass(frozen=True, slots=True)
class PretrainBatch:
    """Blocks of pre-training text as tensors.

    Attributes:
        tokens: input of the forward pass; its states are all positions of a block but the last.
        target_S: the token that follows each state.
    """

    tokens: TokenBatch
    target_S: Tensor

    def to(self, device: torch.device | str) -> PretrainBatch:
        """The same batch with tensors on `device`."""
        return PretrainBatch(self.tokens.to(device), self.target_S.to(device))


def collate_rollouts(rollouts: Sequence[Rollout], *, layout: Layout, with_sets: bool) -> MicroBatch:
    """Tensors of a micro-batch of rollouts, on CPU.

    State t of a row with P prompt tokens is position P - 1 + t: its hidden state predicts response token t.

    Args:
        rollouts: rows, at least one.
        layout: pad rows on the right, or pack them into one sequence.
        with_sets: whether the algorithm reads candidate sets; without them a row has no bootstrap state.

    Raises:
        DataError: a prompt is empty, a row has no sets though they are needed, or a row's parts don't fit together.
    """
    rollouts = [rollout if with_sets else replace(rollout, sets=None) for rollout in rollouts]
    _check(rollouts, with_sets=with_sets)
    rows = [np.concatenate([rollout.prompt_ids, rollout.response_ids]) for rollout in rollouts]
    try:
        states = [np.arange(num_states(rollout), dtype=np.int64) + len(rollout.prompt_ids) - 1 for rollout in rollouts]
        trajectories = Trajectories.from_rollouts(rollouts)
    except ValueError as error:
        raise DataError(str(error)) from error
    recorded = [rollout.sets for rollout in rollouts if rollout.sets is not None]
    return MicroBatch(
        tokens=_packed(rows, states) if layout == "packed" else _padded(rows, states),
        trajectories=trajectories,
        sets=CandidateSets.from_recorded(recorded) if with_sets else None,
        row_ids=tuple(rollout.row_id for rollout in rollouts),
    )


def collate_blocks(blocks_BL: NDArray[np.integer]) -> PretrainBatch:
    """Tensors of pre-training blocks [B, L], on CPU. Every token but the first of a block is a target."""
    num_blocks, length = blocks_BL.shape
    ids_BL = torch.from_numpy(blocks_BL.astype(np.int64))
    positions_BL = torch.arange(num_blocks * length).view(num_blocks, length)
    tokens = TokenBatch(
        input_ids=ids_BL,
        position_ids=torch.arange(length).expand(num_blocks, length),
        attention_mask=None,
        state_index_S=positions_BL[:, :-1].flatten(),
        num_tokens=num_blocks * length,
    )
    return PretrainBatch(tokens=tokens, target_S=ids_BL[:, 1:].flatten())


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
