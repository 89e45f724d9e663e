"""What a rank reads for each step: its micro-batches, and the counts of the whole global batch.

Every rank knows the lengths of all rows, so it can tell by itself who computes what: no communication.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from openrlhf_bd.algorithms.base import Needs
from openrlhf_bd.config import Config, DistillConfig
from openrlhf_bd.data.assignment import Assignment, Balance, MicroBatchLimit, assign, balance_of
from openrlhf_bd.data.micro_batches import MicroBatch, collate
from openrlhf_bd.data.order import BlockOrder, RecordedOrder, RowOrder
from openrlhf_bd.data.row_checks import check_always_included, check_sets_belong, check_vocabulary
from openrlhf_bd.errors import ClusterError, ConfigError, DataError
from openrlhf_bd.functional.candidates import restrict_top_p
from openrlhf_bd.records import Rollout
from openrlhf_bd.store import StoreManifest, StoreReader

# Steps over whose rows the constant shift of Q is a mean.
SHIFT_STEPS = 4
_POLL_S = 0.02


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
    """How recorded candidate sets become those of this run.

    Attributes:
        top_p: p.
        always_include: ids that stay in the sets.
        require_always: each of them is in every set; of sets that a server told of, where it was known.
    """

    top_p: float
    always_include: tuple[int, ...]
    require_always: bool = True


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
    return SetCut(options.top_p, always_include, require_always=manifest.max_candidates is None)


def _require_no_mask(options: DistillConfig, *, store: str) -> None:
    if options.top_p < 1:
        raise ConfigError(
            f"--algo.distill.top_p {options.top_p}: {store} was recorded at 1, without a mask, so it lists no ids and "
            "its sets cannot be cut; use --algo.distill.top_p 1, or generate the data again (another "
            "--teacher.store_path)"
        )


class RowSource:
    """The rows of one store, as the steps of a run read them.

    Args:
        path: of the store. One that an online run is still filling grows while it is read.
        config: options of the job.
        needs: what the algorithm reads of a row.
        stop_ids: tokens that end a response.
        context_length: longest row that the student can read, tokens.
        online: the store is that of this online run, which fills it while the student trains.

    Raises:
        ConfigError: the store does not fit the options.
        DataError: a row is longer than the student's context.
        StoreError: the store is damaged, or unfinished and not this run's own.
    """

    def __init__(
        self,
        path: str,
        config: Config,
        *,
        needs: Needs,
        stop_ids: Sequence[int],
        context_length: int,
        online: bool = False,
    ) -> None:
        recorded = online or config.train.row_order == "recorded"
        # Rows that name their step are read once: what was decoded for a step is of no use to a later one.
        cache = {"cache_bytes": 0} if recorded else {}
        self.reader = StoreReader(path, require_complete=not online, **cache)
        self.cut = plan_cut(self.reader.manifest, needs, config.algo.distill, stop_ids, store=path)
        self._path, self._context_length = path, context_length
        self._timeout_s = config.cluster.step_timeout_s
        self._order: RowOrder | RecordedOrder | None = None
        if not online:
            self._order = row_order(self.reader, config, path=path)
            require_fit(self.lengths(slice(None)), context_length, path)

    @property
    def is_shuffled(self) -> bool:
        """Whether any of the rows may come in any step."""
        return isinstance(self._order, RowOrder)

    def rows(self, step: int) -> NDArray[np.int64]:
        """Numbers of a step's rows; in a growing store it waits for them.

        Raises:
            DataError: a new row is longer than the student's context.
            ClusterError: rows that were sealed do not appear.
        """
        if self._order is not None:
            return self._order.rows(step)
        rows = self._rows_made_for(step)
        require_fit(self.lengths(rows), self._context_length, self._path)
        return rows

    def lengths(self, rows: NDArray[np.int64] | slice) -> NDArray[np.int64]:
        """Prompt and response tokens of rows."""
        return self.reader.prompt_lengths[rows].astype(np.int64) + self.reader.response_lengths[rows]

    def _rows_made_for(self, step: int) -> NDArray[np.int64]:
        # A step's rows are one shard: they appear together. On a shared file system that may take a moment.
        deadline = time.monotonic() + self._timeout_s
        while not len(rows := np.flatnonzero(self.reader.steps == step)):
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"{self._path}: the rows of step {step} were sealed, and this rank has not seen them within "
                    f"{self._timeout_s:.0f} s; expected a folder that all nodes share (--ckpt.output_dir)"
                )
            self.reader.refresh()
            if self.reader.steps.max(initial=0) < step:
                time.sleep(_POLL_S)
        return rows


def row_order(reader: StoreReader, config: Config, *, path: str) -> RowOrder | RecordedOrder:
    """The order of a finished store's rows.

    Raises:
        ConfigError: the rows have no order of their own, but --train.row_order asks for it.
    """
    train = config.train
    if train.row_order == "shuffled":
        return RowOrder(len(reader), train.batch_size, train.seed)
    if not reader.manifest.online:
        raise ConfigError(
            f"--train.row_order recorded: {path} was not made by an online run, so its rows name no steps; use "
            "--train.row_order shuffled"
        )
    return RecordedOrder(reader.steps, int(reader.steps.min()))


def require_fit(lengths: NDArray[np.integer], context_length: int, path: str) -> None:
    """Refuse rows that the student cannot read.

    Raises:
        DataError: one is longer than the context.
    """
    if lengths.max(initial=0) > context_length:
        raise DataError(
            f"{path}: the longest row has {lengths.max()} tokens, more than the student's context of "
            f"{context_length}; lower --data.max_len and generate the data again"
        )


@dataclass(frozen=True, slots=True)
class RowStores:
    """Where a training stage finds its rows.

    Attributes:
        finished: complete store, or None.
        online: store that is filled while the student trains, or None.
        offline_steps: optimizer steps that read the finished store, where there are both.
    """

    finished: str | None
    online: str | None = None
    offline_steps: int = 0


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
        self._needs, self._rank, self._num_ranks, self._vocab_size = needs, rank, num_ranks, vocab_size
        source = partial(RowSource, config=config, needs=needs, stop_ids=stop_ids, context_length=context_length)
        self._finished = None if stores.finished is None else source(stores.finished)
        self._online = None
        if stores.online is not None:
            self._online = source(stores.online, online=True)
        self._offline_steps = stores.offline_steps
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

    def _micro_batches(
        self,
        source: RowSource,
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
            self._collate(
                [next(rollouts) for _ in items], blocks[block_items], cut=source.cut, weight=float(part.counts)
            )
            for part, (items, block_items) in zip(assignments, split, strict=True)
        ]

    def _collate(
        self, rollouts: Sequence[Rollout], blocks: NDArray[np.int64], *, cut: SetCut | None, weight: float
    ) -> MicroBatch:
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
