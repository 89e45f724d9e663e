import math

import pytest
import torch

from openrlhf_bd.functional.cross_entropy import token_cross_entropy_from_logits
from openrlhf_bd.functional.metrics import mean_metrics

# As exp: 1 2 5 and 3 1 4, each a sum of 8.
LOGITS = torch.log(torch.tensor([[1.0, 2.0, 5.0], [3.0, 1.0, 4.0], [1.0, 1.0, 1.0]], dtype=torch.float64))


def test_cross_entropy_of_known_numbers() -> None:
    """-log 5/8 - log 3/8 over a global count of 4; a masked state counts nowhere, whatever its target."""
    loss, metrics = token_cross_entropy_from_logits(
        LOGITS, torch.tensor([2, 0, -1]), torch.tensor([True, True, False]), denominator=4
    )
    total = -math.log(5 / 8) - math.log(3 / 8)
    assert float(loss) == pytest.approx(total / 4, abs=1e-15)
    values = mean_metrics(metrics)
    assert values["gpt_loss"] == values["nll"] == pytest.approx(total / 2)
    assert values["accuracy"] == 0.5
    assert values["logsumexp"] == pytest.approx(math.log(8))
    assert values["logsumexp_spread"] == pytest.approx(0.0, abs=1e-7)


def test_z_loss_of_known_numbers() -> None:
    """z-loss adds lambda (log 8)^2 at each counted state, to gpt_loss and not to nll."""
    loss, metrics = token_cross_entropy_from_logits(
        LOGITS, torch.tensor([2, 0, 1]), torch.tensor([1.0, 1.0, 0.0]), denominator=2, z_loss_coef=0.1
    )
    nll = (-math.log(5 / 8) - math.log(3 / 8)) / 2
    assert float(loss) == pytest.approx(nll + 0.1 * math.log(8) ** 2, abs=1e-15)
    assert mean_metrics(metrics)["gpt_loss"] == pytest.approx(float(loss))
    assert mean_metrics(metrics)["nll"] == pytest.approx(nll)


def test_weights_make_per_row_means() -> None:
    """Weights 1/2 1/2 1 over two rows: the mean of a row of two and a row of one."""
    loss, metrics = token_cross_entropy_from_logits(
        LOGITS, torch.tensor([2, 0, 1]), torch.tensor([0.5, 0.5, 1.0]), denominator=2
    )
    expected = ((-math.log(5 / 8) - math.log(3 / 8)) / 2 + math.log(3)) / 2
    assert float(loss) == pytest.approx(expected, abs=1e-15)
    assert mean_metrics(metrics)["gpt_loss"] == pytest.approx(expected)


def test_gradient_with_minus_infinity_logits() -> None:
    """The gradient passes gradcheck, and -inf logits and masked states give no NaN."""
    z = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    target, mask = torch.tensor([1, 3, -1]), torch.tensor([True, True, False])

    def loss(v: torch.Tensor) -> torch.Tensor:
        return token_cross_entropy_from_logits(v, target, mask, denominator=2, z_loss_coef=0.3)[0]

    assert torch.autograd.gradcheck(loss, (z,))
    hard = z.detach().clone()
    hard[0, 0], hard[2] = -float("inf"), -float("inf")
    hard.requires_grad_()
    value = loss(hard)
    value.backward()
    assert torch.isfinite(value)
    assert hard.grad is not None
    assert torch.isfinite(hard.grad).all()


def test_mismatched_inputs_are_refused() -> None:
    """Lengths that differ and a count of 0 are errors."""
    with pytest.raises(ValueError, match="all must agree"):
        token_cross_entropy_from_logits(LOGITS, torch.tensor([0]), torch.tensor([True]), denominator=1)
    with pytest.raises(ValueError, match="must be positive"):
        token_cross_entropy_from_logits(LOGITS, torch.zeros(3).long(), torch.ones(3), denominator=0)
