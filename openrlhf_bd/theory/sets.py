"""Top-p candidate sets, and what they do to policies and Q (Definitions 1, 3, 5 and 7)."""

# S states, A actions

from __future__ import annotations

import numpy as np

from openrlhf_bd.theory.mdp import Array, Mask


def top_p_sets(policy_SA: Array, top_p: float, *, inclusive: bool = True) -> Mask:
    """Top-p candidate sets (Def. 1), ties by lower index, at least one action a state.

    inclusive:  A_p(s) = { k-th action : mass strictly before it < p }     P(s) >= p
    exclusive:  A_p(s) = { k-th action : mass up to and with it <= p }     P(s) <= p, unless one action holds more

    Args:
        policy_SA: pi*(a | s).
        top_p: p in (0, 1]; 1 keeps every action.
        inclusive: whether the action that crosses p belongs to the set. The bounds ask for it.

    Returns:
        [S, A], True where a is in A_p(s).

    Raises:
        ValueError: top_p is outside (0, 1].
    """
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must be in (0, 1]")
    if top_p == 1:
        return np.ones_like(policy_SA, dtype=np.bool_)
    order_SA = np.argsort(-policy_SA, axis=1, kind="stable")
    sorted_SA = np.take_along_axis(policy_SA, order_SA, axis=1)
    upto_SA = np.cumsum(sorted_SA, axis=1)
    keep_SA = upto_SA - sorted_SA < top_p if inclusive else upto_SA <= top_p
    keep_SA[:, 0] = True
    sets_SA = np.empty_like(keep_SA)
    np.put_along_axis(sets_SA, order_SA, keep_SA, axis=1)
    return sets_SA


def set_mass(policy_SA: Array, sets_SA: Mask) -> Array:
    """P(s) = sum_{a in A_p(s)} pi(a | s), [S]."""
    mass_S: Array = np.where(sets_SA, policy_SA, 0.0).sum(axis=1)
    return mass_S


def project(policy_SA: Array, sets_SA: Mask) -> Array:
    """proj_p pi (Def. 3, Eq. 8): pi(a | s) / P(s) on the set, 0 outside.

    Args:
        policy_SA: pi, with some mass on every set.
        sets_SA: the candidate sets.
    """
    return np.where(sets_SA, policy_SA, 0.0) / set_mass(policy_SA, sets_SA)[:, None]


def mask(q_SA: Array, sets_SA: Mask) -> Array:
    """F_p Q (Def. 7, Eq. 15): Q(s, a) on the set, -inf outside."""
    return np.where(sets_SA, q_SA, -np.inf)


def supported_norm(x_SA: Array, sets_SA: Mask) -> float:
    """max_s max_{a in A_p(s)} |x(s, a)|, the supported infinity-norm (Def. 5, Eq. 11)."""
    return float(np.abs(x_SA[sets_SA]).max())
