"""What a row must satisfy before a student computes with it; refusals name the row and the place in it.

Rows of a store are as they were sealed: pages and token ids carry checksums. These checks are about what a checksum
cannot see, rows of another tokenizer and sets that were recorded for other tokens. NumPy over a whole micro-batch.
"""

# T response tokens of all rows together, S states, M candidates of all states

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from openrlhf_bd.errors import DataError
from openrlhf_bd.records import Rollout

# A store keeps candidates' log-probabilities and masses in float16, with a relative error of 2^-11.
_RELATIVE = 2.0**-10
_ABSOLUTE = 1e-3
_REMEDY = "restore the store from a copy, or generate the data again"


def check_vocabulary(
    rollouts: Sequence[Rollout], blocks: Mapping[str, NDArray[np.integer]], *, vocab_size: int
) -> None:
    """Refuse token ids that the student has no logit for.

    Args:
        rollouts: rows of a micro-batch.
        blocks: name -> token ids of blocks of pre-training text.
        vocab_size: logits of the student.

    Raises:
        DataError: an id is negative or at least vocab_size; the message names the row, the place and the id.
    """
    named = {f"row {rollout.row_id}": rollout for rollout in rollouts}
    _refuse_ids({f"{name}, prompt": row.prompt_ids for name, row in named.items()}, vocab_size)
    _refuse_ids({f"{name}, response": row.response_ids for name, row in named.items()}, vocab_size)
    _refuse_ids({name: np.asarray(ids) for name, ids in blocks.items()}, vocab_size)
    with_sets = {name: row.sets for name, row in named.items() if row.sets is not None}
    found = _outside({name: sets.ids_M for name, sets in with_sets.items()}, vocab_size)
    if found is not None:
        name, place, token_id = found
        state = int(np.searchsorted(with_sets[name].offsets, place, side="right")) - 1
        raise DataError(_outside_message(f"{name}, candidate set of response token {state}", token_id, vocab_size))


def check_sets_belong(rollouts: Sequence[Rollout]) -> None:
    """Refuse candidate sets that were recorded for other tokens than those of their row.

    Each response token's log-probability was recorded beside the sets, from the same logits. So a token in its set has
    the log-probability of that candidate, and at most that of the whole set; a token outside it has at most what the
    set leaves, log(1 - P).

    Args:
        rollouts: rows of a micro-batch. Rows without sets or without log-probabilities pass, and so do sets of p = 1.

    Raises:
        DataError: the message names the row and the first token that does not fit.
    """
    checked = [row for row in rollouts if row.sets is not None and row.logprobs_T is not None and len(row.sets.ids_M)]
    if not checked:
        return
    taken_T = np.concatenate([row.response_ids for row in checked])
    logprob_T = _concatenate([row.logprobs_T for row in checked])
    sizes_T, neg_log_mass_T, ids_M, logprobs_M = _of_actions(checked)
    token_M = np.repeat(np.arange(len(taken_T)), sizes_T)
    hit_M = ids_M == taken_T[token_M]
    inside_T = np.zeros(len(taken_T), dtype=bool)
    inside_T[token_M[hit_M]] = True

    slack_T = _ABSOLUTE + _RELATIVE * np.abs(logprob_T)
    outside_mass_T = -np.expm1(-neg_log_mass_T * (1 + _RELATIVE)) * (1 + _ABSOLUTE) + 1e-6
    fits_T = np.where(
        inside_T, logprob_T <= -neg_log_mass_T * (1 - _RELATIVE) + slack_T, np.exp(logprob_T) <= outside_mass_T
    )
    if logprobs_M is not None:
        difference_M = np.abs(logprobs_M[hit_M] - logprob_T[token_M[hit_M]])
        # Beyond float16's range a store has -inf, which says no more than "improbable".
        fits_T[token_M[hit_M]] &= (difference_M <= slack_T[token_M[hit_M]]) | np.isneginf(logprobs_M[hit_M])
    if not fits_T.all():
        _raise_not_belonging(checked, int(np.argmin(fits_T)), inside_T, logprob_T, neg_log_mass_T)


def check_always_included(rollouts: Sequence[Rollout], always_include: Sequence[int]) -> None:
    """Refuse rows whose sets lack an id that the store's manifest promises in every set.

    Args:
        rollouts: rows of a micro-batch, with sets.
        always_include: the ids.

    Raises:
        DataError: the message names the row, the state and the id.
    """
    for row in rollouts:
        if row.sets is None:
            continue
        state_M = np.repeat(np.arange(row.sets.num_states), row.sets.sizes_S)
        for token_id in always_include:
            count_S = np.bincount(state_M[row.sets.ids_M == token_id], minlength=row.sets.num_states)
            if not count_S.all():
                raise DataError(
                    f"row {row.row_id}: the candidate set of response token {int(np.argmin(count_S))} lacks id "
                    f"{token_id}, which the store's manifest promises in every set (always_include); {_REMEDY}"
                )


def _refuse_ids(named_ids: Mapping[str, NDArray[np.integer]], vocab_size: int) -> None:
    found = _outside(named_ids, vocab_size)
    if found is not None:
        name, place, token_id = found
        raise DataError(_outside_message(f"{name} token {place}", token_id, vocab_size))


def _outside(named_ids: Mapping[str, NDArray[np.integer]], vocab_size: int) -> tuple[str, int, int] | None:
    """Name, position and id of the first id outside the vocabulary."""
    for name, ids in named_ids.items():
        if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
            place = int(np.argmax((ids < 0) | (ids >= vocab_size)))
            return name, place, int(ids[place])
    return None


def _outside_message(where: str, token_id: int, vocab_size: int) -> str:
    return (
        f"{where}: id {token_id} is outside the student's vocabulary, expected 0 to {vocab_size - 1}; teacher and "
        "student need the same tokenizer"
    )


def _of_actions(
    rows: Sequence[Rollout],
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.integer], NDArray[np.float64] | None]:
    """Sizes, masses, ids and log-probabilities of the sets of the states that have an action, over all rows."""
    sets = [row.sets for row in rows if row.sets is not None]
    lengths = [len(row.response_ids) for row in rows]
    ends = [int(recorded.offsets[length]) for recorded, length in zip(sets, lengths, strict=True)]
    logprobs = [recorded.logprobs_M for recorded in sets]
    return (
        np.concatenate([recorded.sizes_S[:length] for recorded, length in zip(sets, lengths, strict=True)]),
        _concatenate([recorded.neg_log_mass_S[:length] for recorded, length in zip(sets, lengths, strict=True)]),
        np.concatenate([recorded.ids_M[:end] for recorded, end in zip(sets, ends, strict=True)]),
        None
        if any(values is None for values in logprobs)
        else _concatenate([values[:end] for values, end in zip(logprobs, ends, strict=True) if values is not None]),
    )


def _concatenate(parts: Sequence[NDArray[np.floating] | None]) -> NDArray[np.float64]:
    return np.concatenate([part for part in parts if part is not None]).astype(np.float64)


def _raise_not_belonging(
    rows: Sequence[Rollout],
    token: int,
    inside_T: NDArray[np.bool_],
    logprob_T: NDArray[np.float64],
    neg_log_mass_T: NDArray[np.float64],
) -> None:
    ends = np.cumsum([len(row.response_ids) for row in rows])
    index = int(np.searchsorted(ends, token, side="right"))
    row, place = rows[index], token - int(ends[index]) + len(rows[index].response_ids)
    where = "in its candidate set with another one" if inside_T[token] else "not in its candidate set"
    raise DataError(
        f"row {row.row_id}: its candidate sets do not belong to its tokens: response token {place} (id "
        f"{row.response_ids[place]}) has log-probability {logprob_T[token]:.4g} and is {where}, of mass "
        f"{np.exp(-neg_log_mass_T[token]):.4g}; {_REMEDY}"
    )
