"""What a rank reads for each step: its micro-batches, and the counts of the whole global batch.

Every rank knows the lengths of all rows, so it can tell by itself who computes what: no communication.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from openrlhf_bd.algorithms.base import Needs
from openrlhf_bd.config import Config, DistillConfig
from openrlhf_bd.data.assignment import Assignment, Balance, MicroBatchLimit, assign, balance_of
from openrlhf_bd.data.micro_batches import MicroBatch, collate
from openrlhf_bd.data.order import BlockOrder, RowOrder
from openrlhf_bd.data.row_checks import check_always_included, check_sets_belong, check_vocabulary
from openrlhf_bd.errors import ConfigError, DataError
from openrlhf_bd.functional.candidates import restrict_top_p
from openrlhf_bd.records import Rollout
from openrlhf_bd.store import StoreManifest, StoreReader


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


@dataclass(frozen=True, slots=True)
class SetCut:
    """How recorded candidate sets become those of this run; None for both: as recorded."""

    top_p: float
    always_include: tuple[int, ...]


def plan_cut(
    manifest: StoreManifest, needs: Needs, options: DistillConfig, stop_ids: Sequence[int], *, store: str
) -> SetCut | None:
    """How the store's sets must be cut for these options, or None if they fit as they are.

    Args:
        manifest: of the store.
        needs: of the algorithm.
        options: --algo.distill.*
        stop_ids: tokens that end a response.
        store: its path, for messages.

    Raises:
        ConfigError: the store lacks what the options need.
    """
    if not needs.candidate_sets:
        return None
    if manifest.top_p is None:
        raise ConfigError(
            f"{store}: the rows have no candidate sets, but --algo.distill.name {options.name} needs them; generate "
            "the data with this algorithm"
        )
    if manifest.has_whole_sets:
        _require_no_mask(options, store=store)
        return None
    if needs.candidate_logprobs and not manifest.has_logprobs:
        raise ConfigError(
            f"{store}: the candidates' log-probabilities were not recorded, but --algo.distill.name {options.name} "
            "needs them (bd: for --algo.distill.linear_term expected); generate the data with --teacher.record_logprobs"
        )
    if options.top_p > manifest.top_p:
        raise ConfigError(
            f"--algo.distill.top_p {options.top_p}: {store} was recorded at {manifest.top_p}, and sets cannot grow; "
            f"use at most {manifest.top_p} or generate the data again"
        )
    missing = sorted(set(stop_ids) - set(manifest.always_include))
    if options.include_eos and missing:
        raise ConfigError(
            f"--algo.distill.include_eos: {store} was recorded without the stop tokens {missing} in every set; turn "
            "the option off or generate the data again"
        )
    always_include = manifest.always_include if options.include_eos else ()
    if options.top_p == manifest.top_p and always_include == manifest.always_include:
        return None
    if not manifest.has_logprobs:
        raise ConfigError(
            f"{store} was recorded with --algo.distill.top_p {manifest.top_p} and always-included tokens "
            f"{list(manifest.always_include)}; only with the candidates' log-probabilities, which were not recorded "
            "(--teacher.record_logprobs), can it be cut to other options"
        )
    return SetCut(options.top_p, always_include)


def _require_no_mask(options: DistillConfig, *, store: str) -> None:
    if options.top_p < 1:
        raise ConfigError(
            f"--algo.distill.top_p {options.top_p}: {store} was recorded at 1, without a mask, so it lists no ids and "
            "its sets cannot be cut; use --algo.distill.top_p 1, or generate the data again (another "
            "--teacher.store_path)"
        )


class StudentData:
    """Rows and pre-training blocks of a training stage, as one rank reads them.

    Args:
        config: options of the job.
        store_path: complete store of rows.
        pretrain_path: pre-training blocks, .npy [blocks, length], or None.
        needs: what the algorithm reads of a row.
        stop_ids: tokens that end a response.
        rank: this rank.
        num_ranks: all of them.
        context_length: longest row that the student can read, tokens.
        vocab_size: logits of the student.

    Raises:
        ConfigError: the store does not fit the options.
        DataError: a row or block is longer than the student's context.
        StoreError: the store is damaged or unfinished.
    """

    def __init__(
        self,
        config: Config,
        *,
        store_path: str,
        pretrain_path: str | None,
        needs: Needs,
        stop_ids: Sequence[int],
        rank: int,
        num_ranks: int,
        context_length: int,
        vocab_size: int,
    ) -> None:
        train = config.train
        self._reader = StoreReader(store_path)
        self._needs, self._rank, self._num_ranks, self._vocab_size = needs, rank, num_ranks, vocab_size
        self._cut = plan_cut(self._reader.manifest, needs, config.algo.distill, stop_ids, store=store_path)
        self._lengths = self._reader.prompt_lengths.astype(np.int64) + self._reader.response_lengths
        self._order = RowOrder(len(self._reader), train.batch_size, train.seed)
        self._limit = MicroBatchLimit(
            rows=None if train.dynamic_batch_enable else train.micro_batch_size,
            tokens=train.max_tokens_per_gpu if train.dynamic_batch_enable else None,
            layout="packed" if config.ds.packing_samples else "padded",
        )
        self._require_fit(self._lengths, context_length, store_path)
        self._block_order: BlockOrder | None = None
        self._blocks: NDArray[np.integer] = np.empty((0, 1), np.int32)
        if pretrain_path is not None and config.algo.distill.pretrain_coef > 0:
            self._blocks = np.load(pretrain_path, mmap_mode="r", allow_pickle=False)
            self._require_fit(np.array([self._blocks.shape[1]]), context_length, pretrain_path)
            batch_size = train.pretrain_batch_size or train.batch_size
            self._block_order = BlockOrder(len(self._blocks), batch_size, train.seed)
        self._block_length = self._blocks.shape[1]

    @staticmethod
    def _require_fit(lengths: NDArray[np.integer], context_length: int, path: str) -> None:
        if lengths.max() > context_length:
            raise DataError(
                f"{path}: the longest row has {lengths.max()} tokens, more than the student's context of "
                f"{context_length}; lower --data.max_len and generate the data again"
            )

    def step(self, step: int) -> StepBatch:
        """This rank's share of a step, counted from 1.

        Raises:
            DataError: a row does not fit the student or the algorithm.
            StoreError: a row is damaged.
        """
        rows, blocks = self._order.rows(step), self._blocks_of(step)
        lengths = np.concatenate([self._lengths[rows], np.full(len(blocks), self._block_length)])
        ranks = assign(lengths, num_ranks=self._num_ranks, limit=self._limit, num_rows=len(rows))
        return StepBatch(
            micro_batches=self._micro_batches(ranks[self._rank], rows, blocks),
            num_rows=len(rows),
            num_tokens=int(self._reader.response_lengths[rows].sum()),
            num_prompt_tokens=int(self._reader.prompt_lengths[rows].sum()),
            num_targets=len(blocks) * (self._block_length - 1),
            num_input_tokens=int(lengths.sum()),
            sum_squared_lengths=int((lengths**2).sum()),
            balance=balance_of(ranks, lengths, self._limit),
        )

    def _micro_batches(
        self, assignments: Sequence[Assignment], rows: NDArray[np.int64], blocks: NDArray[np.int64]
    ) -> list[MicroBatch]:
        split = [
            (part.items[part.items < len(rows)], part.items[part.items >= len(rows)] - len(rows))
            for part in assignments
        ]
        # One call, so that each row group of the store is decoded once however its rows are spread.
        rollouts = iter(self._reader.rollouts(rows[np.concatenate([items for items, _ in split])]))
        return [
            self._collate([next(rollouts) for _ in items], blocks[block_items], weight=float(part.counts))
            for part, (items, block_items) in zip(assignments, split, strict=True)
        ]

    def _collate(self, rollouts: Sequence[Rollout], blocks: NDArray[np.int64], *, weight: float) -> MicroBatch:
        texts: dict[str, NDArray[np.integer]] = {}
        for block in blocks.tolist():
            name = f"pre-training block {block}"
            # Where a step spans two epochs of the text, a micro-batch can have a block twice, and both count.
            while name in texts:
                name += " again"
            texts[name] = self._blocks[block]
        with_sets = self._needs.candidate_sets
        check_vocabulary(rollouts, texts, vocab_size=self._vocab_size)
        if with_sets:
            check_sets_belong(rollouts)
        batch = collate(rollouts, texts, layout=self._limit.layout, with_sets=with_sets, weight=weight)
        if batch.sets is None or self._cut is None:
            return batch
        check_always_included(rollouts, self._cut.always_include)
        sets = restrict_top_p(batch.sets, top_p=self._cut.top_p, always_include=self._cut.always_include)
        return replace(batch, sets=sets)

    def _blocks_of(self, step: int) -> NDArray[np.int64]:
        return np.empty(0, np.int64) if self._block_order is None else self._block_order.blocks(step)
