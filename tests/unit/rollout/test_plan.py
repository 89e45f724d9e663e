"""The plan of an online run's rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from openrlhf_bd.config import Config
from openrlhf_bd.errors import ConfigError
from openrlhf_bd.records import Prompt
from openrlhf_bd.rollout.plan import RowPlan


def plan(
    num_prompts: int, *, samples: int = 1, batch: int = 4, epochs: int = 1, offline: int = 0, **options: Any
) -> RowPlan:
    prompts = [Prompt(f"q{index}", np.array([1], np.int32), {}) for index in range(num_prompts)]
    train = {"batch_size": batch, "max_epochs": epochs, "max_steps": options.pop("max_steps", None)}
    config = Config.model_validate(
        {
            "rollout": {"n_samples_per_prompt": samples},
            "train": train,
            "algo": {"distill": {"mode": "online", **options}},
        }
    )
    return RowPlan(prompts, config, rollout=config.algo.distill.rollout or "mixed", offline_steps=offline)


def test_every_epoch_has_new_samples_of_every_prompt() -> None:
    """Two epochs over 5 prompts with 2 samples: samples 0 and 1 of each, then 2 and 3 of each."""
    rows = plan(5, samples=2, batch=4, epochs=2)
    # 10 rows an epoch: batches of 4, 4 and 2.
    assert (rows.first_step, rows.last_step, rows.steps_per_epoch, rows.num_rows) == (1, 6, 3, 20)
    steps = [rows.rows(step) for step in range(1, 7)]
    assert [len(step) for step in steps] == [4, 4, 2, 4, 4, 2]
    first = {row.row_id for step in steps[:3] for row in step}
    second = {row.row_id for step in steps[3:] for row in step}
    assert first == {f"q{prompt}:{sample}" for prompt in range(5) for sample in (0, 1)}
    assert second == {f"q{prompt}:{sample}" for prompt in range(5) for sample in (2, 3)}
    for step in steps:
        assert [row.prompt for row in step] == [int(row.row_id[1 : row.row_id.index(":")]) for row in step]


def test_rows_depend_on_the_seed_alone() -> None:
    """Asking again, or for steps in another order, gives the same rows and sources."""
    first, again = plan(50, batch=8), plan(50, batch=8)
    assert [first.rows(step) for step in (3, 1, 2)] == [again.rows(step) for step in (3, 1, 2)]


def test_share_of_student_rows() -> None:
    """A quarter of 4,000 rows within 5 standard errors; all or none with rollout student or teacher."""
    rows = plan(4000, batch=4000, student_fraction=0.25).rows(1)
    share = sum(row.source == "student" for row in rows) / len(rows)
    # sqrt(.25 * .75 / 4000) = .0068
    assert abs(share - 0.25) < 5 * 0.0068
    assert {row.source for row in plan(40, batch=40, rollout="student").rows(1)} == {"student"}
    assert {row.source for row in plan(40, batch=40, rollout="teacher").rows(1)} == {"teacher"}


def test_share_grows_linearly_over_the_warm_up() -> None:
    """Half of all rows after 4 steps of warm-up: 1/8, 2/8, 3/8, 4/8, 4/8."""
    rows = plan(100, batch=10, student_fraction=0.5, student_warmup_steps=4, offline=2)
    assert [rows.student_fraction(step) for step in range(3, 8)] == [0.125, 0.25, 0.375, 0.5, 0.5]


def test_online_steps_follow_offline_ones() -> None:
    """After 3 offline steps the first online step is 4, max_steps counts both, and a step before is refused."""
    rows = plan(8, batch=4, epochs=3, offline=3, max_steps=7)
    assert (rows.first_step, rows.last_step, rows.num_rows) == (4, 7, 16)
    assert {row.step for row in rows.rows(4)} == {4}
    with pytest.raises(ValueError, match="found step 3, expected 4 to 7"):
        rows.rows(3)


def test_plan_without_an_online_step_is_refused() -> None:
    """With max_steps 3 three offline steps leave nothing to do online."""
    assert plan(8, batch=4, offline=2, max_steps=3).num_rows == 4
    with pytest.raises(ConfigError, match=r"max_steps 3: the 3 offline steps .* leave no online one"):
        plan(8, batch=4, offline=3, max_steps=3)
