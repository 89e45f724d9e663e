"""The stores that a training stage reads: which rows a step has, and how recorded sets are cut to the run's options."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from openrlhf_bd.algorithms.base import Needs
from openrlhf_bd.config import Config, DistillConfig
from openrlhf_bd.data.order import RecordedOrder, RowOrder
from openrlhf_bd.errors import ClusterError, ConfigError, DataError
from openrlhf_bd.store import StoreManifest, StoreReader

_POLL_S = 0.02


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
        self.with_sets = needs.candidate_sets
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
        return row_lengths(self.reader, rows)

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


class ValidationRows:
    """The validation set's own responses, without sets: every row, in order.

    Args:
        path: of the store.
        context_length: longest row that the student can read, tokens.

    Raises:
        DataError: a row is longer than the student's context.
        StoreError: the store is damaged or unfinished.
    """

    cut: SetCut | None = None
    with_sets = False

    def __init__(self, path: str, context_length: int) -> None:
        self.reader = StoreReader(path)
        require_fit(self.lengths(slice(None)), context_length, path)

    def lengths(self, rows: NDArray[np.int64] | slice) -> NDArray[np.int64]:
        """Prompt and response tokens of rows."""
        return row_lengths(self.reader, rows)

    def batches(self, num_rows: int) -> list[NDArray[np.int64]]:
        """Numbers of all rows, so many at a time."""
        starts = range(0, len(self.reader), num_rows)
        return [np.arange(start, min(start + num_rows, len(self.reader))) for start in starts]


def row_lengths(reader: StoreReader, rows: NDArray[np.int64] | slice) -> NDArray[np.int64]:
    """Prompt and response tokens of rows."""
    return reader.prompt_lengths[rows].astype(np.int64) + reader.response_lengths[rows]


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
        validation: complete store of the validation set's own responses, or None.
    """

    finished: str | None
    online: str | None = None
    offline_steps: int = 0
    validation: str | None = None
