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
from openrlhf_bd.data.micro_batches import (
    Assignment,
    MicroBatch,
    MicroBatchLimit,
    PretrainBatch,
    assign_rows,
    collate_blocks,
    collate_rollouts,
)
from openrlhf_bd.data.order import BlockOrder, RowOrder
from openrlhf_bd.errors import ConfigError, DataError
from openrlhf_bd.functional.candidates import CandidateSets, restrict_top_p
from openrlhf_bd.records import Rollout
from openrlhf_bd.store import StoreManifest, StoreReader


@dataclass(frozen=True, slots=True)
class Part:
    """One micro-batch of this rank, of rows or of pre-training blocks.

    Attributes:
        batch: its tensors, on CPU.
        weight: 1, or 0 for a filler.
        names: rows or blocks in it, for messages.
    """

    batch: MicroBatch | PretrainBatch
    weight: float
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StepBatch:
    """This rank's share of a step, and the counts of the step over all ranks.

    Attributes:
        rollouts: micro-batches of rows; as many on every rank.
        pretrain: micro-batches of pre-training blocks; as many on every rank.
        num_rows: rows of the global batch.
        num_tokens: response tokens of the global batch.
        num_prompt_tokens: prompt tokens of the global batch.
        num_targets: pre-training targets of the step, over all ranks.
    """

    rollouts: list[Part]
    pretrain: list[Part]
    num_rows: int
    num_tokens: int
    num_prompt_tokens: int
    num_targets: int


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
    if needs.candidate_logprobs and not manifest.has_logprobs:
        raise ConfigError(
            f"{store}: the candidates' log-probabilities were not recorded, but --algo.distill.linear_term "
            f"{options.linear_term} needs them; generate the data with --teacher.record_logprobs"
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
        self._blocks: NDArray[np.integer] | None = None
        if pretrain_path is not None and config.algo.distill.pretrain_coef > 0:
            self._blocks = np.load(pretrain_path, mmap_mode="r", allow_pickle=False)
            self._require_fit(np.array([self._blocks.shape[1]]), context_length, pretrain_path)
            batch_size = train.pretrain_batch_size or train.batch_size
            self._block_order = BlockOrder(len(self._blocks), batch_size, train.seed)

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
        rows = self._order.rows(step)
        pretrain, num_targets = self._pretrain(step)
        return StepBatch(
            rollouts=self._rollouts(rows),
            pretrain=pretrain,
            num_rows=len(rows),
            num_tokens=int(self._reader.response_lengths[rows].sum()),
            num_prompt_tokens=int(self._reader.prompt_lengths[rows].sum()),
            num_targets=num_targets,
        )

    def _assign(self, lengths: NDArray[np.integer]) -> list[Assignment]:
        return assign_rows(lengths, num_ranks=self._num_ranks, limit=self._limit)[self._rank]

    def _rollouts(self, rows: NDArray[np.int64]) -> list[Part]:
        assignments = self._assign(self._lengths[rows])
        mine = np.concatenate([assignment.rows for assignment in assignments])
        rollouts = iter(self._reader.rollouts(rows[mine]))
        parts = []
        for assignment in assignments:
            part = [next(rollouts) for _ in assignment.rows]
            parts.append(Part(self._collate(part), float(assignment.counts), tuple(row.row_id for row in part)))
        return parts

    def _collate(self, rollouts: Sequence[Rollout]) -> MicroBatch:
        batch = collate_rollouts(rollouts, layout=self._limit.layout, with_sets=self._needs.candidate_sets)
        if batch.sets is not None and self._cut is not None:
            sets = restrict_top_p(batch.sets, top_p=self._cut.top_p, always_include=self._cut.always_include)
            batch = replace(batch, sets=sets)
        self._require_vocabulary(batch.tokens.input_ids.max().item(), batch.sets, batch.row_ids)
        return batch

    def _require_vocabulary(self, largest: float, sets: CandidateSets | None, names: Sequence[str]) -> None:
        if sets is not None:
            largest = max(largest, sets.ids_M.max().item())
        if largest >= self._vocab_size:
            raise DataError(
                f"rows {', '.join(names)}: token id {largest:.0f} is outside the student's vocabulary of "
                f"{self._vocab_size}; teacher and student need the same tokenizer"
            )

    def _pretrain(self, step: int) -> tuple[list[Part], int]:
        if self._blocks is None:
            return [], 0
        indices = self._block_order.blocks(step)
        length = self._blocks.shape[1]
        parts = []
        for assignment in self._assign(np.full(len(indices), length)):
            chosen = indices[assignment.rows]
            batch = collate_blocks(self._blocks[chosen])
            names = tuple(f"pre-training block {index}" for index in chosen.tolist())
            self._require_vocabulary(batch.tokens.input_ids.max().item(), None, names)
            parts.append(Part(batch, float(assignment.counts), names))
        return parts, len(indices) * (length - 1)
