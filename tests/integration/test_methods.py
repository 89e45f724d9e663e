"""Every method through the same path: real ranks, their data, packing and steps, beside the same training in torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from student_runs import Material, assert_same_training, job, plain_loop, start, train

from openrlhf_bd.algorithms.registry import BUILT_IN, resolve_algorithm
from openrlhf_bd.config import PRESETS, DistillConfig
from openrlhf_bd.upstream import RayActorGroup

pytestmark = pytest.mark.integration

# The sets of the store as they are, whatever the preset would cut them to.
SETS = {"top_p": 0.95, "include_eos": True}
METHODS: dict[str, dict[str, Any]] = {
    **{f"bd:{preset}": {"name": "bd", "preset": preset, **SETS} for preset in PRESETS},
    "sft": {"name": "sft"},
    "seqkd": {"name": "seqkd"},
    "kd": {"name": "kd"},
    "kd, gold responses": {"name": "kd", "responses": "gold"},
    "gkd": {"name": "gkd"},
    "rkl": {"name": "rkl"},
    "minillm": {"name": "minillm"},
}


@pytest.mark.parametrize("method", METHODS)
def test_steps_are_those_of_a_plain_loop(method: str, two_ranks: RayActorGroup, material: Material) -> None:
    """Two ranks with packed rows train as plain torch does; on rows of an online run where the student's are needed."""
    distill = METHODS[method]
    needs = resolve_algorithm(distill["name"]).needs_of(DistillConfig.model_validate(distill))
    store = material.store
    if needs.student_rollouts == "required":
        store = material.online
    elif not needs.rows_by_teacher:
        store = material.validation
    own = replace(material, store=store)
    ds = {"zero_stage": 2, "packing_samples": True}
    config = job(own, f"method-{method.replace(':', '-')}", ds=ds, algo={"distill": distill})
    start(two_ranks, config, own)
    assert_same_training(train(two_ranks, [1, 2]), plain_loop(config, own)[0][:2])


def test_no_method_is_left_out() -> None:
    """Each built-in algorithm has its case, and bd one for each preset."""
    assert {distill["name"] for distill in METHODS.values()} == set(BUILT_IN)
