"""Candidate sets from the K likeliest tokens of each state, as a server reports them. NumPy only.

Shapes: T response tokens, S states, K tokens reported of a state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from openrlhf_bd.engines.arguments import RecordOptions
from openrlhf_bd.records import RecordedSets
from openrlhf_bd.teacher.states import NO_TOKEN, RecordedStates

# A state's K likeliest tokens and the taken one, which may be a token more: id -> log-probability, nats.
TopLogprobs = Mapping[int, float]


def record_top(
    taken: Sequence[int], top_S: Sequence[TopLogprobs], options: RecordOptions, *, max_candidates: int
) -> RecordedStates:
    """What an engine records at the states, of so much as the K likeliest tokens tell.

    Args:
        taken: token taken at each of the S states; NO_TOKEN where there is none.
        top_S: tokens of each state with their log-probabilities at temperature 1, the taken one among them.
        options: what to record.
        max_candidates: K.

    Returns:
        Sets that equal those of `top_p_candidates` wherever the K tokens hold at least p, the always-included ids
        apart: of these, a set has those whose log-probability is known.
    """
    sets = None
    if options.top_p is not None:
        sets = RecordedSets.whole(len(taken)) if options.top_p == 1 else _sets(taken, top_S, options, max_candidates)
    return RecordedStates(
        taken_S=np.array(taken, dtype=np.int32),
        taken_logprob_S=np.array(
            [0.0 if token == NO_TOKEN else top[token] for token, top in zip(taken, top_S, strict=True)],
            dtype=np.float32,
        ),
        sets=sets,
    )


def top_set(
    top: TopLogprobs, taken: int, *, top_p: float, always_include: Sequence[int], max_candidates: int
) -> list[tuple[int, float]]:
    """The candidate set of one state: the smallest prefix of the K likeliest tokens whose mass reaches p.

    Where all K hold less than p the set is all of them. Always-included ids follow where they are known: among the K,
    or taken.

    Args:
        top: the K likeliest tokens, and the taken one, with their log-probabilities.
        taken: token taken at this state, or NO_TOKEN.
        top_p: p, less than 1.
        always_include: ids that belong to every set.
        max_candidates: K.

    Returns:
        Ids and log-probabilities, by descending probability, ties by lower id.
    """
    ranked = sorted(top.items(), key=lambda item: (-item[1], item[0]))
    # One token more than K: the taken one is none of the likeliest, and others that are not known lie before it.
    likeliest = [item for item in ranked if item[0] != taken] if len(ranked) > max_candidates else ranked
    mass_K = np.cumsum(np.exp([logprob for _, logprob in likeliest]))
    size = 1 + int((mass_K < top_p).sum())
    inside = likeliest[:size]
    ids = {token for token, _ in inside}
    return inside + [item for item in ranked if item[0] in always_include and item[0] not in ids]


def _sets(
    taken: Sequence[int], top_S: Sequence[TopLogprobs], options: RecordOptions, max_candidates: int
) -> RecordedSets:
    assert options.top_p is not None
    sets = [
        top_set(top, token, top_p=options.top_p, always_include=options.always_include, max_candidates=max_candidates)
        for token, top in zip(taken, top_S, strict=True)
    ]
    logprobs_M = np.array([logprob for each in sets for _, logprob in each], dtype=np.float32)
    offsets = np.concatenate([[0], np.cumsum([len(each) for each in sets])]).astype(np.int64)
    mass_S = np.add.reduceat(np.exp(logprobs_M.astype(np.float64)), offsets[:-1]) if sets else np.empty(0)
    return RecordedSets(
        ids_M=np.array([token for each in sets for token, _ in each], dtype=np.int32),
        offsets=offsets,
        # Rounding can leave the sum above 1.
        neg_log_mass_S=np.maximum(-np.log(mass_S), 0.0).astype(np.float32),
        logprobs_M=logprobs_M if options.logprobs else None,
    )
