import math

import pytest
import torch

from openrlhf_bd.functional.candidates import CandidateSets
from openrlhf_bd.functional.head import DenseHead
from openrlhf_bd.functional.negatives import shared_negatives

# State 0: tokens 2 and 0; state 1: token 5. Vocabulary of 10: 7 ids are no candidate anywhere.
SETS = CandidateSets(torch.tensor([2, 0, 5]), torch.tensor([0, 2, 3]), torch.full((2,), 0.1), None)
V = 10


def test_candidates_have_weight_one_and_the_rest_share_theirs() -> None:
    """3 of the 7 others are drawn, each stands for 7/3; ids are distinct and ascending."""
    negatives = shared_negatives(SETS, V, num_samples=3, generator=torch.Generator().manual_seed(0))
    assert len(negatives.ids_K) == 6
    assert (negatives.ids_K.diff() > 0).all()
    for token, log_weight in zip(negatives.ids_K.tolist(), negatives.log_weight_K.tolist(), strict=True):
        assert log_weight == pytest.approx(0.0 if token in (0, 2, 5) else math.log(7 / 3))
    assert {0, 2, 5} <= set(negatives.ids_K.tolist())


@pytest.mark.parametrize(("num_samples", "expected"), [(0, [0, 2, 5]), (7, list(range(V))), (99, list(range(V)))])
def test_no_sample_and_all_of_them(num_samples: int, expected: list[int]) -> None:
    """Without samples the candidates alone; where they cover the rest every id once, with weight 1."""
    negatives = shared_negatives(SETS, V, num_samples=num_samples)
    assert negatives.ids_K.tolist() == expected
    assert (negatives.log_weight_K == 0).all()


def test_the_generator_decides() -> None:
    """The same state of the generator draws the same ids."""
    draws = [shared_negatives(SETS, 1000, num_samples=5, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0].ids_K, draws[1].ids_K)
    assert not torch.equal(draws[0].ids_K, draws[2].ids_K)


def test_a_sample_of_everything_is_the_exact_tail() -> None:
    """num_samples at the size of the vocabulary: the same tail and gradient to the last bits."""
    z = 2 * torch.randn(2, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    results = []
    for estimator in ("exact", "sampled"):
        z_SV = z.clone().requires_grad_()
        inside_S = torch.stack([z_SV[0, [2, 0]].logsumexp(0), z_SV[1, 5]])
        term = DenseHead(z_SV).tail(SETS, inside_S, torch.ones(2), estimator=estimator, num_samples=V)
        term.sum.backward()
        results.append((term.value_S, z_SV.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-14, atol=1e-15)


def test_sums_are_unbiased() -> None:
    """The mean of many estimates of sum exp z outside each set lies within 4 standard errors of the sum."""
    generator = torch.Generator().manual_seed(2)
    z_SV = torch.randn(2, V, generator=generator, dtype=torch.float64)
    exact_S = DenseHead(z_SV).logsumexp_outside(SETS).exp()
    is_candidate_SV = torch.zeros(2, V, dtype=torch.bool)
    is_candidate_SV[SETS.state_M, SETS.ids_M] = True
    draws = []
    for _ in range(4000):
        negatives = shared_negatives(SETS, V, num_samples=2, generator=generator)
        term_SK = torch.exp(z_SV[:, negatives.ids_K] + negatives.log_weight_K)
        draws.append(torch.where(is_candidate_SV[:, negatives.ids_K], 0.0, term_SK).sum(dim=1))
    estimates = torch.stack(draws)
    error_S = estimates.std(dim=0) / len(draws) ** 0.5
    assert (error_S < 0.02 * exact_S).all()
    assert ((estimates.mean(dim=0) - exact_S).abs() < 4 * error_S).all()
