"""Candidate sets that were cut at K tokens: which of them hold less mass than they should."""

# S states

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from openrlhf_bd.records import RecordedSets, Rollout
from openrlhf_bd.store.manifest import StoreManifest
from openrlhf_bd.store.reader import StoreReader

# A store keeps -log P in float16, with a relative error of at most 2^-11.
_RELATIVE = 2.0**-10


def incomplete_S(sets: RecordedSets, *, top_p: float, max_candidates: int) -> NDArray[np.bool_]:
    """Which sets K did not suffice for: at least K ids, and a mass P < p.

    Args:
        sets: of a row.
        top_p: p.
        max_candidates: K, where the sets were cut.
    """
    short_S = sets.neg_log_mass_S.astype(np.float64) * (1 - _RELATIVE) > -np.log(top_p)
    return short_S & (sets.sizes_S >= max_candidates)


def count_incomplete(rollouts: Iterable[Rollout], manifest: StoreManifest, top_p: float | None = None) -> int:
    """States of a store's rows whose set is incomplete at p; p None: that of the store."""
    top_p = manifest.top_p if top_p is None else top_p
    if manifest.max_candidates is None or top_p is None:
        return 0
    return sum(
        int(incomplete_S(rollout.sets, top_p=top_p, max_candidates=manifest.max_candidates).sum())
        for rollout in rollouts
        if rollout.sets is not None
    )


def incomplete_share(reader: StoreReader, *, top_p: float) -> float | None:
    """Share of the states whose set is incomplete at p; None where the store's sets are not cut, or it has no rows.

    Args:
        reader: of the store.
        top_p: p of the run, at most that of the store.

    Raises:
        StoreError: a row is damaged.
    """
    num_states = int(reader.num_states.sum(dtype=np.int64))
    if reader.manifest.max_candidates is None or not num_states:
        return None
    return sum(count_incomplete(rollouts, reader.manifest, top_p) for rollouts in reader.scan()) / num_states
