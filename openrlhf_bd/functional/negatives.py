"""Ids that all states of a micro-batch share to estimate sums over the vocabulary."""

# K shared ids, M candidates of all states, V vocabulary

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from openrlhf_bd.functional.candidates import CandidateSets


@dataclass(frozen=True)
class SharedNegatives:
    """A weighted sample of the vocabulary: sum_a f(a) is estimated by sum_k exp(log_weight_k) f(id_k).

    Attributes:
        ids_K: distinct ids in ascending order, every candidate of the micro-batch among them.
        log_weight_K: log of the importance weights, float64.
    """

    ids_K: Tensor
    log_weight_K: Tensor


@torch.no_grad()
def shared_negatives(
    sets: CandidateSets, vocab_size: int, *, num_samples: int, generator: torch.Generator | None = None
) -> SharedNegatives:
    """Every id that is a candidate anywhere, with weight 1, and some of the rest, drawn without replacement.

    A drawn id has weight (number of the rest) / (number drawn), so that sums are unbiased; their logarithm is biased
    downwards by about half the relative variance. Where `num_samples` covers the rest the sums are exact.

    Args:
        sets: candidate sets of the micro-batch.
        vocab_size: V.
        num_samples: ids to draw, >= 0.
        generator: source of randomness, on any device; None: PyTorch's own.

    Returns:
        SharedNegatives on the device of the sets.
    """
    device = sets.ids_M.device
    is_candidate_V = torch.zeros(vocab_size, dtype=torch.bool, device=device)
    is_candidate_V[sets.ids_M] = True
    rest = torch.nonzero(~is_candidate_V)[:, 0]
    order = torch.randperm(len(rest), generator=generator, device=generator.device if generator else device)
    drawn = rest[order[:num_samples].to(device)]
    ids_K = torch.cat([torch.nonzero(is_candidate_V)[:, 0], drawn]).sort().values
    log_weight = math.log(len(rest) / len(drawn)) if len(drawn) else 0.0
    return SharedNegatives(ids_K, torch.where(is_candidate_V[ids_K], 0.0, log_weight).double())
