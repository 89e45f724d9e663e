"""What a rank reads for each step: its micro-batches, and the counts of the whole global batch.

Every rank knows the lengths of all rows, so it can tell by itself who computes what: no communication.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from openrlhf_bd.algorithms.base import Needs
from openrlhf_bd.config import Config
from openrlhf_bd.data.assignment import Assignment, Balance, MicroBatchLimit, assign, balance_of
from openrlhf_bd.data.micro_batches import MicroBatch, collate
from openrlhf_bd.data.order import BlockOrder
from openrlhf_bd.data.row_checks import check_always_included, check_sets_belong, check_vocabulary
from openrlhf_bd.functional.candidates import restrict_top_p
from openrlhf_bd.records import Rollout
from openrlhf_bd.student.row_source import RowSource, RowStores, ValidationRows, require_fit

# Steps over whose rows the constant shift of Q is a mean.
SHIFT_STEPS = 4


@dataclass(frozen=True, slots=True)
class StepBatch:
    """This rank's share of a step, and the counts of the step over all ranks.

    Attributes:
        micro_batches: rows and pre-training blocks of this rank; as many on every rank. Any of them may be without
            rows, or without text.
        num_rows: rows of the global batch.
        num_tokens: response tokens of the global batch.
        num_prompt_tokens: prompt tokens of the global batch.
        num_targets: pre-training targets of the step, over all ranks.
        num_input_tokens: all of them: prompts, responses and pre-training blocks of the step, over all ranks.
        sum_squared_lengths: over their rows and blocks.
        balance: how well the ranks and the token budget are used, over all ranks.
    """

    micro_batches: list[MicroBatch]
    num_rows: int
    num_tokens: int
    num_prompt_tokens: int
    num_targets: int
    num_input_tokens: int
    sum_squared_lengths: int
    balance: Balance


class StudentData:
    """Rows and pre-training blocks of a training stage, as one rank reads them.

    Args:
        config: options of the job.
        stores: of the rows.
        pretrain_path: pre-training blocks, .npy [blocks, length], or None.
        needs: what the algorithm reads of a row.
        stop_ids: tokens that end a response.
        rank: this rank.
        num_ranks: all of them.
        context_length: longest row that the student can read, tokens.
        vocab_size: logits of the student.

    Raises:
        ConfigError: a store does not fit the options.
        DataError: a row or block is longer than the student's context.
        StoreError: a store is damaged or unfinished.
    """

    def __init__(
        self,
        config: Config,
        *,
        stores: RowStores,
        pretrain_path: str | None,
        needs: Needs,
        stop_ids: Sequence[int],
        rank: int,
        num_ranks: int,
        context_length: int,
        vocab_size: int,
    ) -> None:
        train = config.train
        self._rank, self._num_ranks, self._vocab_size = rank, num_ranks, vocab_size
        source = partial(RowSource, config=config, needs=needs, stop_ids=stop_ids, context_length=context_length)
        self._finished = None if stores.finished is None else source(stores.finished)
        self._online = None
        if stores.online is not None:
            self._online = source(stores.online, online=True)
        self._offline_steps = stores.offline_steps
        self._validation = None
        if stores.validation is not None:
            self._validation = ValidationRows(stores.validation, context_length)
        self._batch_size = train.batch_size
        self._limit = MicroBatchLimit(
            rows=None if train.dynamic_batch_enable else train.micro_batch_size,
            tokens=train.max_tokens_per_gpu if train.dynamic_batch_enable else None,
            layout="packed" if config.ds.packing_samples else "padded",
        )
        self._block_order: BlockOrder | None = None
        self._blocks: NDArray[np.integer] = np.empty((0, 1), np.int32)
        if pretrain_path is not None and config.algo.distill.pretrain_coef > 0:
            self._blocks = np.load(pretrain_path, mmap_mode="r", allow_pickle=False)
            require_fit(np.array([self._blocks.shape[1]]), context_length, pretrain_path)
            batch_size = train.pretrain_batch_size or train.batch_size
            self._block_order = BlockOrder(len(self._blocks), batch_size, train.seed)
        self._block_length = self._blocks.shape[1]

    @property
    def shift_steps(self) -> int:
        """Steps whose rows give the constant shift of Q: of rows that name their steps the first step alone.

        An online run has no more at its start, and an offline run over its rows must find the same constant.
        """
        if not self.source(1).is_shuffled:
            return 1
        # Rows of online steps are not there yet.
        return min(SHIFT_STEPS, self._offline_steps) if self._online is not None else SHIFT_STEPS

    def source(self, step: int) -> RowSource:
        """The store that a step reads."""
        found = self._finished if self._online is None or step <= self._offline_steps else self._online
        assert found is not None
        return found

    def step(self, step: int) -> StepBatch:
        """This rank's share of a step, counted from 1.

        Raises:
            DataError: a row does not fit the student or the algorithm.
            StoreError: a row is damaged.
        """
        source = self.source(step)
        rows, blocks = source.rows(step), self._blocks_of(step)
        lengths = np.concatenate([source.lengths(rows), np.full(len(blocks), self._block_length)])
        ranks = assign(lengths, num_ranks=self._num_ranks, limit=self._limit, num_rows=len(rows))
        return StepBatch(
            micro_batches=self._micro_batches(source, ranks[self._rank], rows, blocks),
            num_rows=len(rows),
            num_tokens=int(source.reader.response_lengths[rows].sum()),
            num_prompt_tokens=int(source.reader.prompt_lengths[rows].sum()),
            num_targets=len(blocks) * (self._block_length - 1),
            num_input_tokens=int(lengths.sum()),
            sum_squared_lengths=int((lengths**2).sum()),
            balance=balance_of(ranks, lengths, self._limit),
        )

    def validation(self) -> Iterator[list[MicroBatch]]:
        """This rank's micro-batches of the validation rows, as many rows at a time as a training step has."""
        source = self._validation
        assert source is not None, "RowStores.validation is not given"
        no_blocks = np.empty(0, np.int64)
        for rows in source.batches(self._batch_size):
            ranks = assign(source.lengths(rows), num_ranks=self._num_ranks, limit=self._limit)
            yield self._micro_batches(source, ranks[self._rank], rows, no_blocks)

    def _micro_batches(
        self,
        source: RowSource | ValidationRows,
        assignments: Sequence[Assignment],
        rows: NDArray[np.int64],
        blocks: NDArray[np.int64],
    ) -> list[MicroBatch]:
        split = [
            (part.items[part.items < len(rows)], part.items[part.items >= len(rows)] - len(rows))
            for part in assignments
        ]
        # One call, so that each row group of the store is decoded once however its rows are spread.
        rollouts = iter(source.reader.rollouts(rows[np.concatenate([items for items, _ in split])]))
        return [
            self._collate([next(rollouts) for _ in items], blocks[block_items], source, weight=float(part.counts))
            for part, (items, block_items) in zip(assignments, split, strict=True)
        ]

    def _collate(
        self,
        rollouts: Sequence[Rollout],
        blocks: NDArray[np.int64],
        source: RowSource | ValidationRows,
        *,
        weight: float,
    ) -> MicroBatch:
        texts: dict[str, NDArray[np.integer]] = {}
        for block in blocks.tolist():
            name = f"pre-training block {block}"
            # Where a step spans two epochs of the text, a micro-batch can have a block twice, and both count.
            while name in texts:
                name += " again"
            texts[name] = self._blocks[block]
        cut, with_sets = source.cut, source.with_sets
        check_vocabulary(rollouts, texts, vocab_size=self._vocab_size)
        if with_sets:
            check_sets_belong(rollouts)
        batch = collate(rollouts, texts, layout=self._limit.layout, with_sets=with_sets, weight=weight)
        if batch.sets is None or cut is None:
            return batch
        if cut.require_always:
            check_always_included(rollouts, cut.always_include)
        sets = restrict_top_p(
            batch.sets, top_p=cut.top_p, always_include=cut.always_include, require_always=cut.require_always
        )
        return replace(batch, sets=sets)

    def _blocks_of(self, step: int) -> NDArray[np.int64]:
        return np.empty(0, np.int64) if self._block_order is None else self._block_order.blocks(step)
