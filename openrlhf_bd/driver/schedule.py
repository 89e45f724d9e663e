"""How many optimizer steps a training stage has."""

from __future__ import annotations

import math
from dataclasses import dataclass

from openrlhf_bd.config import Config
from openrlhf_bd.rollout.plan import RowPlan
from openrlhf_bd.store import StoreReader


@dataclass(frozen=True, slots=True)
class Schedule:
    """Optimizer steps of a stage.

    Attributes:
        total: all of them.
        per_epoch: of one pass over the rows, or online over the prompts.
        offline: of `total`, those before the first online one; None where none is online.
    """

    total: int
    per_epoch: int
    offline: int | None = None


def shuffled_schedule(config: Config, num_rows: int) -> Schedule:
    """Steps over a finished store whose rows come in any order."""
    return _cut(config, math.ceil(num_rows / config.train.batch_size))


def offline_schedule(config: Config, reader: StoreReader) -> Schedule:
    """Steps over a finished store."""
    if config.train.row_order == "recorded" and reader.manifest.online:
        return _cut(config, int(reader.steps.max()) - int(reader.steps.min()) + 1)
    return shuffled_schedule(config, len(reader))


def online_schedule(plan: RowPlan) -> Schedule:
    """Steps of an online run, with those before the first online one."""
    return Schedule(plan.last_step, plan.steps_per_epoch, offline=plan.first_step - 1)


def _cut(config: Config, per_epoch: int) -> Schedule:
    total = config.train.max_epochs * per_epoch
    return Schedule(min(total, config.train.max_steps or total), per_epoch)
