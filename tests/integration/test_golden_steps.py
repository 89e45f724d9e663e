"""Losses of whole training runs, step by step, as they were recorded.

Real ranks train a tiny Qwen2 for five steps in fp32; batches, weights and order come from seeds. The values were
recorded with logits of the whole vocabulary in one tensor. The sparse head adds up the same terms in tiles, which
moves float32 results by rounding alone: by 4e-7 at most, relative, over these runs. They are compared to 5e-6, since
other processors round differently too; a change of the mathematics moves them far more, and each step inherits the
difference of the steps before it. After a deliberate change run `python tests/integration/test_golden_steps.py`,
which writes the file again.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import ray
from student_runs import Material, job, start, train, write_material

from openrlhf_bd.student.actor import StudentRank
from openrlhf_bd.upstream import RayActorGroup

pytestmark = pytest.mark.integration

GOLDEN = Path(__file__).parents[1] / "golden" / "steps.json"
RUNS: dict[str, dict[str, Any]] = {
    "robust": {"name": "bd", "preset": "robust"},
    "paper": {"name": "bd", "preset": "paper"},
    "sft": {"name": "sft", "z_loss_coef": 0.01},
}
STEPS = range(1, 6)
TOLERANCE = 5e-6
NAMES = ("loss", "policy_loss", "ptx_loss", "actor_grad_norm")


def compute(run: str, ranks: RayActorGroup, material: Material) -> list[dict[str, float]]:
    """Losses and gradient norms of each step of a run."""
    start(ranks, job(material, f"golden-{run}", algo={"distill": RUNS[run]}), material)
    return [{name: metrics[name] for name in NAMES} for metrics in train(ranks, STEPS)]


@pytest.mark.parametrize("run", RUNS)
def test_steps_are_the_recorded_ones(run: str, one_rank: RayActorGroup, material: Material) -> None:
    """Losses and gradient norms of training without logits are those that were recorded with them."""
    expected = json.loads(GOLDEN.read_text(encoding="utf-8"))[run]
    for step, here, there in zip(STEPS, compute(run, one_rank, material), expected, strict=True):
        assert here == pytest.approx(there, rel=TOLERANCE, abs=TOLERANCE), f"step {step}"


def _record() -> None:
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        material = write_material(Path(folder) / "material")
        ray.init(address="local", num_cpus=4, num_gpus=1, include_dashboard=False, _temp_dir=folder)
        ranks = RayActorGroup(1, 1, StudentRank)
        values = {run: compute(run, ranks, material) for run in RUNS}
        ray.shutdown()
    GOLDEN.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    _record()
