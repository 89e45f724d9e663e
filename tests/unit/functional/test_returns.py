import pytest
import torch

from openrlhf_bd.functional.returns import earlier_sums, later_sums

# Rows 0 -> 1 -> 2 and 3 -> 4, and a row of one state.
NEXT = torch.tensor([1, 2, -1, 4, -1, -1])
X = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0], dtype=torch.float64)


def test_later_sums() -> None:
    """With factors of 1 the sum of what follows; with others y_t = c_{t+1} (x_{t+1} + y_{t+1})."""
    assert later_sums(X, torch.ones(6).double(), NEXT).tolist() == [6, 4, 0, 16, 0, 0]
    factors = torch.tensor([9.0, 0.5, 3.0, 9.0, 0.25, 9.0], dtype=torch.float64)
    assert later_sums(X, factors, NEXT).tolist() == [0.5 * (2 + 3 * 4), 3 * 4, 0, 0.25 * 16, 0, 0]


def test_earlier_sums() -> None:
    """The sum of what came before, 0 at a first state."""
    assert earlier_sums(X, NEXT).tolist() == [0, 1, 3, 0, 8, 0]


@pytest.mark.parametrize("num_states", [1, 2, 3, 31, 32, 33, 1000])
def test_long_rows(num_states: int) -> None:
    """Every length, and rows that lie in memory in any order, equal the loop."""
    generator = torch.Generator().manual_seed(num_states)
    order = torch.randperm(num_states, generator=generator)
    x_S = torch.randn(num_states, generator=generator, dtype=torch.float64)
    factor_S = 0.9 + 0.2 * torch.rand(num_states, generator=generator, dtype=torch.float64)
    next_S = torch.full((num_states,), -1)
    next_S[order[:-1]] = order[1:]
    expected_S, before = torch.zeros_like(x_S), 0.0
    for here, after in reversed(list(zip(order[:-1].tolist(), order[1:].tolist(), strict=True))):
        before = float(factor_S[after]) * (float(x_S[after]) + before)
        expected_S[here] = before
    torch.testing.assert_close(later_sums(x_S, factor_S, next_S), expected_S, rtol=1e-11, atol=1e-11)


def test_no_state() -> None:
    """A micro-batch without rollouts."""
    nothing = torch.zeros(0, dtype=torch.float64)
    assert later_sums(nothing, nothing, nothing.long()).tolist() == []
    assert earlier_sums(nothing, nothing.long()).tolist() == []
