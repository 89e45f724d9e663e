import math

import pytest
import torch

from openrlhf_bd.functional import head as head_module
from openrlhf_bd.functional.candidates import CandidateSets
from openrlhf_bd.functional.head import DenseHead, end_log_prob, mean_log_sum_exp

INF = float("inf")
# State 0: tokens 2 and 0; state 1: token 1.
SETS = CandidateSets(torch.tensor([2, 0, 1]), torch.tensor([0, 2, 3]), torch.zeros(2), None)
LOGITS = torch.log(torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 1.0, 1.0, 1.0]], dtype=torch.float64))


def test_answers_for_known_logits() -> None:
    """Logits log 1..4 and log 5 1 1 1: every question has an answer by hand."""
    head = DenseHead(LOGITS)
    torch.testing.assert_close(head.at_candidates(SETS).exp(), torch.tensor([3.0, 1.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(head.at(torch.tensor([3, -1])), torch.tensor([math.log(4), 0.0], dtype=torch.float64))
    torch.testing.assert_close(head.logsumexp().exp(), torch.tensor([10.0, 8.0], dtype=torch.float64))
    # Outside {2, 0}: 2 + 4; outside {1}: 5 + 1 + 1.
    torch.testing.assert_close(head.logsumexp_outside(SETS).exp(), torch.tensor([6.0, 7.0], dtype=torch.float64))
    torch.testing.assert_close(head.maximum().exp(), torch.tensor([4.0, 5.0], dtype=torch.float64))
    torch.testing.assert_close(
        head.log_prob(torch.tensor([1, 0])).exp(), torch.tensor([0.2, 0.625], dtype=torch.float64)
    )
    # Probabilities 5/8 and three of 1/8: entropy 5/8 log(8/5) + 3/8 log 8.
    statistics = head.statistics()
    torch.testing.assert_close(
        statistics.entropy_S[1], torch.tensor(5 / 8 * math.log(1.6) + 3 / 8 * math.log(8)).double()
    )
    assert statistics.argmax_S.tolist() == [3, 0]
    torch.testing.assert_close(statistics.logsumexp_S, head.logsumexp())
    # tau 1/2 squares the probabilities' ratios: 1 + 4 + 9 + 16 and 25 + 3.
    torch.testing.assert_close(head.tempered(0.5).logsumexp().exp(), torch.tensor([30.0, 28.0], dtype=torch.float64))
    # P(stop) with stop tokens 1 and 3: 6/10, 2/8.
    torch.testing.assert_close(
        end_log_prob(head, statistics, [1, 3]).exp(), torch.tensor([0.6, 0.25], dtype=torch.float64)
    )


def test_statistics_do_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """One state at a time gives what all at once give."""
    logits = torch.randn(7, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = DenseHead(logits).statistics()
    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", 1)
    chunked = DenseHead(logits).statistics()
    torch.testing.assert_close(chunked.entropy_S, whole.entropy_S)
    assert torch.equal(chunked.argmax_S, whole.argmax_S)


def test_gradients_agree_with_finite_differences() -> None:
    """Every differentiable answer passes gradcheck."""
    z = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    for answer in (
        lambda v: DenseHead(v).logsumexp(),
        lambda v: DenseHead(v).logsumexp_outside(SETS),
        lambda v: DenseHead(v).at_candidates(SETS),
        lambda v: DenseHead(v).maximum(),
        lambda v: DenseHead(v.T.reshape(2, 4)).logsumexp_outside(SETS),
        lambda v: DenseHead(v).tempered(0.7).log_prob(torch.tensor([1, -1])),
    ):
        assert torch.autograd.gradcheck(answer, (z,))


def test_minus_infinity_gives_no_nan() -> None:
    """-inf logits, and sets that leave nothing outside, give -inf or finite values and finite gradients."""
    z = torch.tensor([[0.0, -INF, 1.0, -INF], [-INF, 0.0, -INF, -INF]], dtype=torch.float64, requires_grad=True)
    head = DenseHead(z)
    assert head.logsumexp_outside(SETS).tolist() == [-INF, -INF]
    total = head.logsumexp().sum() + torch.where(head.logsumexp_outside(SETS) == -INF, 0.0, 1.0).sum()
    (total + head.logsumexp_outside(SETS).sum() * 0.0).backward()
    assert z.grad is not None
    assert torch.isfinite(z.grad).all()
    statistics = head.statistics()
    # State 0: softmax(0, 1); state 1: certain.
    p = 1 / (1 + math.e)
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    torch.testing.assert_close(statistics.entropy_S, torch.tensor([entropy, 0.0], dtype=torch.float64))


def test_half_precision_is_raised() -> None:
    """bfloat16 logits give float32 answers, and bfloat16 gradients."""
    z = LOGITS.bfloat16().requires_grad_()
    head = DenseHead(z)
    assert head.logsumexp().dtype == head.at_candidates(SETS).dtype == torch.float32
    head.logsumexp().sum().backward()
    assert z.grad is not None
    assert z.grad.dtype == torch.bfloat16


def test_mean_log_sum_exp_counts_masked_states_only() -> None:
    """log 10 and log 8 with the second state masked out: (log 10, 1); at tau 1/2: log 30."""
    total, count = mean_log_sum_exp(DenseHead(LOGITS), torch.tensor([True, False]))
    assert (float(total), float(count)) == (pytest.approx(math.log(10)), 1.0)
    total, _ = mean_log_sum_exp(DenseHead(LOGITS), torch.tensor([True, False]), tau=0.5)
    assert float(total) == pytest.approx(math.log(30))
