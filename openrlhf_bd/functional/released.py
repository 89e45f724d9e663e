"""What the authors' published code computes in the place of Eq. 17, for comparison: preset `released`.

With A_t the candidate set, Q and V as in functional.values, and a row of T response tokens:

    L     = mean over rows of (1/(T-1)) sum_{t=0}^{T-2} { linear_t + penalty_t }
    linear_t  = V_t - (1/|V|) sum_{a in A_t} Q_t(a)
    penalty_t = (1/(4 alpha |V|)) { sum_{a in A_t} (Q_t(a) - gamma V'_t)^2 + (|V| - |A_t|) (gamma V'_t)^2 }

It differs from Eq. 17 in this:

- Q is not taken at the action: a mask puts 0 where a token is no candidate, and a mean over the vocabulary follows. No
  term depends on the response's tokens, only on the states that they lead to.
- In the penalty too the mask leaves Q = 0 at nearly all of the vocabulary, so it is chi-squared on gamma V'.
- The last position is dropped. Padding is the end-of-sequence token there, so the mask of the padding also takes out
  the end of sequence: V'_t = 0 at the state before the one in which the response ends, and nothing is learnt there.

The code divides by the tokens of a micro-batch on one GPU, which makes the loss depend on how rows are dealt out; here
each row has its own mean, as there with one row in a micro-batch. It adds a small constant to every probability of the
projected policy, which is left out here.
"""

# S states, M candidates of all states, B rows

from __future__ import annotations

import torch
from torch import Tensor

from openrlhf_bd.functional.candidates import CandidateSets
from openrlhf_bd.functional.segments import segment_sum
from openrlhf_bd.functional.trajectories import Trajectories
from openrlhf_bd.functional.values import ActionValues, discounted


def released_terms(
    values: ActionValues,
    sets: CandidateSets,
    trajectories: Trajectories,
    *,
    alpha: float,
    gamma: float,
    vocab_size: int,
) -> tuple[Tensor, Tensor]:
    """Terms of each state of the formula at the top of this module.

    Args:
        values: Q and V over the candidate sets. Gradient flows.
        sets: candidate sets.
        trajectories: what follows what; the taken tokens are not read.
        alpha: chi-squared coefficient (0.1 there).
        gamma: discount factor.
        vocab_size: |V|, logits of a state.

    Returns:
        (linear_S, penalty_S), [S], nats; 0 at the states that don't count.
    """
    counted_S = _counted(trajectories)
    next_S = trajectories.next_S.clamp(min=0)
    next_value_S = torch.where(counted_S & ~trajectories.terminal_S[next_S], values.value_S[next_S], 0.0)
    discounted_S = discounted(next_value_S, gamma)

    q_sum_S = segment_sum(values.q_M, sets.state_M, sets.num_states)
    squares_M = (values.q_M - discounted_S[sets.state_M]).square()
    outside_S = (vocab_size - sets.sizes_S) * discounted_S.square()
    penalty_S = (segment_sum(squares_M, sets.state_M, sets.num_states) + outside_S) / (4.0 * alpha * vocab_size)
    linear_S = values.value_S - q_sum_S / vocab_size

    return torch.where(counted_S, linear_S, 0.0), torch.where(counted_S, penalty_S, 0.0)


def released_weights(trajectories: Trajectories) -> Tensor:
    """1/(T - 1) at the states that count, to be divided by the number of rows; 0 elsewhere, [S] float64."""
    counted_S = _counted(trajectories).double()
    length_S = torch.zeros_like(counted_S).index_add(0, trajectories.row_S, counted_S)
    return counted_S / length_S[trajectories.row_S].clamp(min=1.0)


def _counted(trajectories: Trajectories) -> Tensor:
    """States that are not the last of their row's response."""
    next_S = trajectories.next_S
    return trajectories.has_action_S & (next_S >= 0) & trajectories.has_action_S[next_S.clamp(min=0)]
