"""What responses that the student sampled itself add to the Bellman Distill objective (online runs).

With rho_E and rho_S the visits of the teacher's and of the student's responses, and beta the share of the student's
tokens in the global batch, the mean over all response tokens is

    L = (1 - beta) E_{rho_E}[ -log pibar(a) + r^2/(4 alpha) ]  +  beta E_{rho_S}[ target + r^2/(4 alpha) ]

Nothing else weighs the two parts: rows of both kinds in one batch, one denominator, and beta follows from the batch.
Chi-squared on both is the mixture of LS-IQ (Al-Hafez et al. 2023), under which the implied reward is bounded: without a
target at the student's states the optimum has

    r = 2 alpha' (rho_E - rho_pi) / ((1 - beta) rho_E + beta rho_S),   alpha' = (1 - beta) alpha

(alpha' in the place of LS-IQ's alpha because the teacher's linear term has the weight 1 - beta too). Where rho_S =
rho_pi it lies between -2 alpha (1 - beta) / beta and 2 alpha: at beta = 1/2, within 2 alpha of 0.

The linear term of the student's own visits, E_pi[r] + H(pi), has no place in the sum: on a response each step gives
V(s_t) - gamma V(s_{t+1}), and with weights gamma^t these add up to V(s_0) - gamma^T V(s_T), whatever was sampled. What
is there instead is white-box: the teacher's distribution at the student's states (`student_target`).
"""

# S states, M candidates of all states

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from openrlhf_bd.functional.candidates import CandidateSets
from openrlhf_bd.functional.divergences import jensen_shannon, projected_pair
from openrlhf_bd.functional.trajectories import Trajectories
from openrlhf_bd.functional.values import (
    ActionValues,
    Transitions,
    negative_log_policy_expected,
    projected_log_teacher,
)

if TYPE_CHECKING:
    from openrlhf_bd.config import BellmanOptions


def pulled_actions(trajectories: Trajectories, options: BellmanOptions) -> Tensor | None:
    """States whose sampled action's reward is pulled down should it lie outside its set, [S]; None: nowhere."""
    if trajectories.student_S is None or not options.student_td or options.student_out_of_set == "drop":
        return None
    return trajectories.student_S


def student_target(values: ActionValues, sets: CandidateSets, options: BellmanOptions) -> Tensor:
    """The linear term at the student's states, by options.student_target.

    none:     0
    forward:  P sum_{a in A} proj_p pi*(a) [-log pibar(a)],  as the expected term at the teacher's states
    reverse:  KL(pibar || proj_p pi*) = sum_{a in A} pibar(a) [log pibar(a) - log proj_p pi*(a)]

    Args:
        values: Q and V over the candidates. Gradient flows.
        sets: candidate sets, with log-probabilities unless the target is none.
        options: student_target.

    Returns:
        [S], nats; +inf where the student rules out a candidate (forward).

    Raises:
        ConfigError: the sets have no log-probabilities.
    """
    if options.student_target == "none":
        return torch.zeros_like(values.value_S)
    wanted_by = f"--algo.distill.student_target {options.student_target}"
    if options.student_target == "reverse":
        return jensen_shannon(projected_pair(values.q_M, sets, wanted_by=wanted_by), 1.0)
    log_teacher_M = projected_log_teacher(sets, dtype=values.q_M.dtype, wanted_by=wanted_by)
    return negative_log_policy_expected(values.q_M, values.value_S, sets, log_teacher_M)


def student_penalty(penalty_S: Tensor, values: ActionValues, steps: Transitions, options: BellmanOptions) -> Tensor:
    """The regulariser at the student's states.

    penalty(r) of actions in their set; of others, where they are pulled, r + r^2/(4 alpha) = (r + 2 alpha)^2/(4 alpha)
    - alpha: chi-squared and the linear term of an action that the student alone takes, least at r = -2 alpha, which is
    the bounded reward of such an action at beta = 1/2.

    Args:
        penalty_S: the regulariser of every reward. Gradient flows.
        values: which actions are pulled.
        steps: rewards. Gradient flows.
        options: student_td.

    Returns:
        [S], nats.
    """
    if not options.student_td:
        return torch.zeros_like(penalty_S)
    return torch.where(values.pulled_S & steps.has_next_S, penalty_S + steps.reward_S, penalty_S)
