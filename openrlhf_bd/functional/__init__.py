"""Pure tensor functions: candidate sets, the Bellman Distill objective and other losses. Torch and NumPy only.

A loss and its gradient from logits, without Ray, vLLM or a configuration file:

    import torch
    from openrlhf_bd.config import BellmanOptions
    from openrlhf_bd.functional import Trajectories, bellman_loss_from_logits, top_p_candidates

    teacher_SV, student_SV = torch.randn(4, 50), torch.randn(4, 50, requires_grad=True)  # one state a response token
    sets = top_p_candidates(teacher_SV, top_p=0.95, always_include=[0])
    response = Trajectories(
        taken_S=torch.tensor([7, 31, 2, 0]),
        next_S=torch.tensor([1, 2, 3, -1]),
        terminal_S=torch.tensor([False, False, False, True]),  # token 0 is the stop token
        row_S=torch.zeros(4, dtype=torch.int64),
    )
    shift = float(student_SV.detach().logsumexp(1).mean())  # options.q_shift constant: of the student before training
    terms = bellman_loss_from_logits(
        student_SV, sets, response, BellmanOptions(), num_tokens=4, num_rows=1, shift_constant=shift
    )
    terms.loss.backward()

`bellman_loss` takes a head in the place of the logits: `SparseHead(hidden_SH, weight_VH, bias_V)` computes only what
the options ask for and never holds a tensor of all logits. Options are read by attribute: config.BellmanOptions checks
them, and any object with the same attributes serves.

Shape suffixes: S states of a micro-batch (response positions of its rows, one after another), M candidates of all
states (ragged, CSR), V vocabulary, B rows, S1 = S + 1. Half-precision inputs are raised to float32, float64 is kept.
"""

from openrlhf_bd.functional.bellman import BellmanTerms, bellman_loss, bellman_loss_from_logits
from openrlhf_bd.functional.candidates import CandidateSets, restrict_top_p, top_p_candidates
from openrlhf_bd.functional.cross_entropy import token_cross_entropy
from openrlhf_bd.functional.divergence_loss import divergence_loss
from openrlhf_bd.functional.head import DenseHead, StudentHead
from openrlhf_bd.functional.options import validate_options
from openrlhf_bd.functional.policy_gradient import policy_gradient_loss
from openrlhf_bd.functional.sparse_head import SparseHead
from openrlhf_bd.functional.trajectories import Behaviour, Trajectories

__all__ = [
    "Behaviour",
    "BellmanTerms",
    "CandidateSets",
    "DenseHead",
    "SparseHead",
    "StudentHead",
    "Trajectories",
    "bellman_loss",
    "bellman_loss_from_logits",
    "divergence_loss",
    "policy_gradient_loss",
    "restrict_top_p",
    "token_cross_entropy",
    "top_p_candidates",
    "validate_options",
]
