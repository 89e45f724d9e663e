"""Losses, gradients and metrics of the presets on a fixed micro-batch, at full precision.

The inputs come from NumPy's PCG64 and are exact in float64. Sums are ordered by the library that adds them (vector
width, blocks), so float64 results are compared to 1e-12 and float32 results to 2e-6, relative or absolute; any
change of the mathematics is far larger. After a deliberate change, `python tests/golden/test_losses.py` writes the
file again.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from openrlhf_bd.config import DistillConfig
from openrlhf_bd.functional.bellman import bellman_loss
from openrlhf_bd.functional.candidates import top_p_candidates
from openrlhf_bd.functional.head import DenseHead, StudentHead
from openrlhf_bd.functional.metrics import mean_metrics
from openrlhf_bd.functional.sparse_head import SparseHead
from openrlhf_bd.functional.trajectories import Trajectories

GOLDEN = Path(__file__).with_name("losses.json")
PRESETS = ["robust", "paper", "released"]
HEADS: dict[str, Callable[[Tensor], StudentHead]] = {
    "dense": DenseHead,
    # Hidden states times the identity: the same logits, without rounding.
    "sparse": lambda z_SV: SparseHead(z_SV, torch.eye(z_SV.shape[1], dtype=z_SV.dtype)),
}
DTYPES = {"float64": (torch.float64, 1e-12), "float32": (torch.float32, 2e-6)}
VOCAB_SIZE, STOP_ID, SHIFT = 50, 3, 1.75


def micro_batch() -> tuple[np.ndarray, np.ndarray, Trajectories]:
    """A stopped row of 9 tokens, a cut row of 6 with a state to bootstrap from, a stopped row of one token."""
    rng = np.random.default_rng(20240917)
    teacher_SV = rng.normal(size=(17, VOCAB_SIZE)) * 2.5
    student_SV = teacher_SV + rng.normal(size=(17, VOCAB_SIZE)) * 3.5
    taken = [int(np.argmax(z + rng.gumbel(size=VOCAB_SIZE))) for z in teacher_SV]
    taken[4] = int(teacher_SV[4].argmin())  # outside every set
    taken[8], taken[15], taken[16] = STOP_ID, -1, STOP_ID
    row = torch.tensor([0] * 9 + [1] * 7 + [2])
    following = torch.arange(1, 18)
    following[[8, 15, 16]] = -1
    terminal = torch.zeros(17, dtype=torch.bool)
    terminal[[8, 16]] = True
    return teacher_SV, student_SV, Trajectories(torch.tensor(taken), following, terminal, row)


def compute(preset: str, dtype: torch.dtype, head: str = "dense") -> dict[str, object]:
    """Loss, norm and weighted sum of the gradient, and every metric."""
    teacher_SV, student_SV, trajectories = micro_batch()
    options = DistillConfig.model_validate({"preset": preset})
    sets = top_p_candidates(
        torch.from_numpy(teacher_SV),
        top_p=options.top_p,
        always_include=[STOP_ID] if options.include_eos else [],
    )
    z_SV = torch.from_numpy(student_SV).to(dtype).requires_grad_()
    terms = bellman_loss(
        HEADS[head](z_SV),
        sets,
        trajectories,
        options,
        num_tokens=float(trajectories.has_action_S.sum()),
        num_rows=3.0,
        shift_constant=SHIFT,
        stop_ids=[STOP_ID],
    )
    terms.loss.backward()
    assert z_SV.grad is not None
    grad_SV = z_SV.grad.double()
    weight_SV = torch.linspace(-1, 2, grad_SV.numel(), dtype=torch.float64).view_as(grad_SV)
    return {
        "loss": float(terms.loss.detach()),
        "gradient_norm": float(grad_SV.norm()),
        "gradient_probe": float((weight_SV * grad_SV).sum()),
        "metrics": dict(sorted(mean_metrics(terms.metrics).items())),
    }


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("preset", PRESETS)
def test_losses_are_the_recorded_ones(preset: str, dtype: str, head: str) -> None:
    """Loss, gradient and metrics of a preset stay what they were, through every head."""
    torch_dtype, tolerance = DTYPES[dtype]
    expected = json.loads(GOLDEN.read_text(encoding="utf-8"))[preset][dtype]
    found = compute(preset, torch_dtype, head)
    assert found.pop("metrics") == pytest.approx(expected.pop("metrics"), rel=tolerance, abs=tolerance)
    assert found == pytest.approx(expected, rel=tolerance, abs=tolerance)


if __name__ == "__main__":
    values = {preset: {name: compute(preset, dtype) for name, (dtype, _) in DTYPES.items()} for preset in PRESETS}
    GOLDEN.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
