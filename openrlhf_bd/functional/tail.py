"""The tail: cross-entropy between the teacher's and the student's probability inside and outside a candidate set."""

# S states

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from openrlhf_bd.functional.candidates import CandidateSets


def tail_cross_entropy(inside_S: Tensor, outside_S: Tensor, sets: CandidateSets, *, tolerance: float) -> Tensor:
    """Cross-entropy of the two masses.

    -P log P_theta - (1 - P) log(1 - P_theta),   P_theta = sum_{a in A_p(s)} softmax(z)(a)

    P_theta is the sigmoid of log sum exp inside minus log sum exp outside. 1 - P_theta taken from the whole partition
    function would vanish in float32 for a confident student, and its gradient with it.

    Args:
        inside_S: log sum exp of the logits over each set. Gradient flows: P_theta - P.
        outside_S: log sum exp over the rest, -inf where there is none. Gradient flows: P - P_theta.
        sets: candidate sets, for the teacher's mass P.
        tolerance: states with |P_theta - P| below it get no gradient; 0: every state gets its own.

    Returns:
        [S], nats; 0 where the set is the whole vocabulary.
    """
    everything_S = outside_S == float("-inf")
    logit_S = torch.where(everything_S, 0.0, inside_S - outside_S)
    neg_log_mass_S = sets.neg_log_mass_S.to(logit_S.dtype)
    mass_S, rest_S = torch.exp(-neg_log_mass_S), -torch.expm1(-neg_log_mass_S)
    if tolerance > 0:
        negligible_S = (torch.sigmoid(logit_S.detach()) - mass_S).abs() < tolerance
        logit_S = torch.where(negligible_S, logit_S.detach(), logit_S)
    tail_S = -mass_S * logsigmoid(logit_S) - rest_S * logsigmoid(-logit_S)
    return torch.where(everything_S, 0.0, tail_S)
