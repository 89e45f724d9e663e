"""Reward regularisers phi of the IQ-Learn family (Garg et al. 2021), as penalties on the implied reward.

The objective that is maximised holds E[phi(r)] where imitation without a regulariser holds E[r]; so the loss holds

    penalty(r) = r - phi(r) >= 0,   penalty(0) = penalty'(0) = 0

name        phi(x)             domain of phi    penalty(x)
chi2        x - x^2/(4 alpha)  all              x^2/(4 alpha)
none        x                  all              0
kl_fix      1 - exp(-x)        all              x + exp(-x) - 1
hellinger   x / (1 + x)        x > -1           x^2 / (1 + x)
js          log(2 - exp(-x))   x > -log 2       x - log(2 - exp(-x))

alpha belongs to chi2 alone. The last three grow without bound to the left within a few nats, or end there, while the
rewards of a student that has not learnt yet are more negative than that: left of the point where phi' = MAX_SLOPE,
phi continues as its tangent (still concave, once differentiable).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

MAX_SLOPE = 10.0


def reward_penalty(
    reward_S: Tensor, *, name: Literal["chi2", "none", "kl_fix", "hellinger", "js"], alpha: float
) -> Tensor:
    """penalty(r) = r - phi(r) of the named regulariser.

    Args:
        reward_S: implied reward, nats. Gradient flows.
        name: regulariser, see the table of this module.
        alpha: coefficient of chi2, > 0.

    Returns:
        [S], nats, >= 0.
    """
    if name == "chi2":
        return reward_S.square() / (4.0 * alpha)
    if name == "none":
        return torch.zeros_like(reward_S)
    edge = {
        "kl_fix": -math.log(MAX_SLOPE),  # phi' = exp(-x)
        "hellinger": MAX_SLOPE**-0.5 - 1.0,  # phi' = 1 / (1 + x)^2
        "js": -math.log(2.0 * MAX_SLOPE / (1.0 + MAX_SLOPE)),  # phi' = exp(-x) / (2 - exp(-x))
    }[name]
    inner_S = reward_S.clamp(min=edge)
    if name == "kl_fix":
        penalty_S = inner_S + torch.expm1(-inner_S)
    elif name == "hellinger":
        penalty_S = inner_S.square() / (1.0 + inner_S)
    else:
        penalty_S = inner_S - torch.log1p(-torch.expm1(-inner_S))
    # The clamp stops the gradient left of the edge; this adds the tangent: penalty' = 1 - phi' = 1 - MAX_SLOPE.
    return penalty_S + (1.0 - MAX_SLOPE) * (reward_S.clamp(max=edge) - edge)
