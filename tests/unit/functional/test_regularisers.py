import math
from typing import Literal

import pytest
import torch

from openrlhf_bd.functional.regularisers import MAX_SLOPE, reward_penalty

Name = Literal["chi2", "none", "kl_fix", "hellinger", "js"]


def penalty(name: Name, reward: float, alpha: float = 0.1) -> float:
    return float(reward_penalty(torch.tensor([reward], dtype=torch.float64), name=name, alpha=alpha))


def test_known_values() -> None:
    """r - phi(r) at r = 1 by hand."""
    assert penalty("chi2", 3.0, alpha=0.5) == pytest.approx(4.5)  # 9 / (4 * .5)
    assert penalty("none", 3.0) == 0.0
    assert penalty("kl_fix", 1.0) == pytest.approx(math.exp(-1))  # 1 - (1 - 1/e)
    assert penalty("hellinger", 1.0) == pytest.approx(0.5)  # 1 - 1/2
    assert penalty("js", 1.0) == pytest.approx(1 - math.log(2 - math.exp(-1)))


@pytest.mark.parametrize("name", ["chi2", "kl_fix", "hellinger", "js"])
def test_penalty_is_convex_with_its_minimum_at_zero(name: Name) -> None:
    """penalty(0) = penalty'(0) = 0, and the slope rises everywhere, also across the tangent's start."""
    r = torch.linspace(-20, 20, 4001, dtype=torch.float64, requires_grad=True)
    values = reward_penalty(r, name=name, alpha=0.1)
    values.sum().backward()
    values = values.detach()
    assert torch.isfinite(values).all()
    assert float(values[2000]) == pytest.approx(0.0, abs=1e-12)
    assert r.grad is not None
    assert float(r.grad[2000]) == pytest.approx(0.0, abs=1e-12)
    assert (r.grad.diff() >= -1e-12).all()
    if name != "chi2":
        assert float(r.grad[0]) == pytest.approx(1 - MAX_SLOPE)


@pytest.mark.parametrize("name", ["chi2", "kl_fix", "hellinger", "js"])
def test_gradient_is_one_minus_phi_prime(name: Name) -> None:
    """The slope is 1 - phi'(r), where phi' is the IQ-Learn weight of the named divergence."""
    r = torch.tensor([-0.3, 0.4, 2.0], dtype=torch.float64, requires_grad=True)
    reward_penalty(r, name=name, alpha=0.25).sum().backward()
    phi_prime = {
        "chi2": 1 - 2 * r,  # 1 - r / (2 * .25)
        "kl_fix": torch.exp(-r),
        "hellinger": 1 / (1 + r) ** 2,
        "js": torch.exp(-r) / (2 - torch.exp(-r)),
    }[name]
    torch.testing.assert_close(r.grad, (1 - phi_prime).detach())
