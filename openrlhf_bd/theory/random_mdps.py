"""Random MDPs: cyclic or ending, stochastic or deterministic, and the tree of a tiny language model's prefixes."""

# S states, A actions

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np

from openrlhf_bd.theory.mdp import Array, TabularMDP

# Standard deviation of rewards, nats: teachers from nearly uniform to nearly deterministic.
SPREADS = (0.5, 1.0, 2.0, 4.0)


def random_mdps(
    count: int,
    *,
    seed: int,
    gamma: float,
    num_states: int = 6,
    num_actions: int = 5,
    terminating: bool | None = None,
    deterministic: bool | None = None,
) -> Iterator[TabularMDP]:
    """MDPs of all kinds in turn; number i depends on `seed` and i alone, whatever gamma and count are.

    Args:
        count: how many.
        seed: of all of them.
        gamma: discount.
        num_states: S.
        num_actions: A.
        terminating: only MDPs where every policy ends, or only those without an end; None: both.
        deterministic: only deterministic transitions, or only stochastic ones; None: both.
    """
    kinds = [
        kind
        for kind in product((False, True), (False, True))
        if terminating in (None, kind[0]) and deterministic in (None, kind[1])
    ]
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        ends, fixed = kinds[index % len(kinds)]
        transition_SAS = _TRANSITIONS[fixed](rng, num_states, num_actions, ends)
        spread = SPREADS[index // len(kinds) % len(SPREADS)]
        yield TabularMDP(
            transition_SAS=transition_SAS,
            reward_SA=rng.normal(size=(num_states, num_actions)) * spread,
            gamma=gamma,
            start_S=rng.dirichlet(np.ones(num_states)),
            available_SA=np.ones((num_states, num_actions), dtype=np.bool_),
        )


@dataclass(frozen=True)
class PrefixTree:
    """A language model of few tokens as an MDP.

    Attributes:
        mdp: states are prefixes, actions tokens, transitions concatenate; token 0 ends, and so does every token at the
            longest prefixes.
        prefixes: tokens of each state; state 0 is the empty prefix.
    """

    mdp: TabularMDP
    prefixes: tuple[tuple[int, ...], ...]


def random_prefix_tree(rng: np.random.Generator, *, num_tokens: int, depth: int, gamma: float) -> PrefixTree:
    """All responses of at most `depth` tokens over `num_tokens`, with normal rewards of 1.5 nats.

    S = sum_{t < depth} (num_tokens - 1)^t, since nothing follows the stop token 0.
    """
    prefixes = tuple(prefix for length in range(depth) for prefix in product(range(1, num_tokens), repeat=length))
    index_of = {prefix: index for index, prefix in enumerate(prefixes)}
    transition_SAS = np.zeros((len(prefixes), num_tokens, len(prefixes)))
    for prefix, index in index_of.items():
        for token in range(1, num_tokens):
            if (*prefix, token) in index_of:
                transition_SAS[index, token, index_of[*prefix, token]] = 1.0
    shape = (len(prefixes), num_tokens)
    start_S = np.eye(len(prefixes))[0]
    rewards_SA = rng.normal(size=shape) * 1.5
    return PrefixTree(TabularMDP(transition_SAS, rewards_SA, gamma, start_S, np.ones(shape, dtype=np.bool_)), prefixes)


def _stochastic(rng: np.random.Generator, num_states: int, num_actions: int, ends: bool) -> Array:
    transition_SAS = rng.dirichlet(np.full(num_states, 0.5), size=(num_states, num_actions))
    goes_on_SA = rng.uniform(0.3, 0.95, size=(num_states, num_actions)) if ends else 1.0
    return transition_SAS * np.broadcast_to(goes_on_SA, (num_states, num_actions))[:, :, None]


def _deterministic(rng: np.random.Generator, num_states: int, num_actions: int, ends: bool) -> Array:
    # With an end, states are in order and an action leads to a later one, or (index S) to the end.
    first_S1 = np.arange(1, num_states + 1)[:, None] if ends else np.zeros((num_states, 1), dtype=np.int64)
    next_SA = rng.integers(first_S1, num_states + 1 if ends else num_states, size=(num_states, num_actions))
    return np.eye(num_states + 1)[next_SA][:, :, :num_states]


_TRANSITIONS = {False: _stochastic, True: _deterministic}
