"""Who makes which row for which optimizer step of an online run: decided in advance, from the seed alone.

Rows that are named before they are made are made exactly once, whatever is killed when, and short responses do not
overtake long ones: a step's batch is what the plan says, not what came back first.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from openrlhf_bd.algorithms.base import Rollouts
from openrlhf_bd.config import Config
from openrlhf_bd.data.order import RowOrder
from openrlhf_bd.errors import ConfigError
from openrlhf_bd.records import Prompt, Source
from openrlhf_bd.store.order import natural_key


@dataclass(frozen=True, slots=True)
class PlannedRow:
    """One row that a step needs.

    Attributes:
        row_id: "<prompt_id>:<sample>"; the sample number goes on from epoch to epoch.
        prompt: index of its prompt.
        step: optimizer step that it is for, counted from 1.
        source: whose engines sample it.
    """

    row_id: str
    prompt: int
    step: int
    source: Source


class RowPlan:
    """The rows of every step of an online run.

    Each epoch is a permutation of the prompts, each as often as it has samples, cut into batches.

    Args:
        prompts: prompts of the run.
        config: `rollout.n_samples_per_prompt`, `train.batch_size`, `train.seed`, `train.max_epochs`, `train.max_steps`,
            `algo.distill`.
        rollout: whose responses, see `Needs.rollout_of`.
        offline_steps: optimizer steps before the first online one.

    Attributes:
        rollout: whose responses.
        first_step: first online step.
        last_step: last one.

    Raises:
        ConfigError: the offline steps leave no online one.
    """

    def __init__(self, prompts: Sequence[Prompt], config: Config, *, rollout: Rollouts, offline_steps: int = 0) -> None:
        self._prompt_ids = [prompt.prompt_id for prompt in prompts]
        self._num_samples = config.rollout.n_samples_per_prompt
        self._options, self.rollout, self._seed = config.algo.distill, rollout, config.train.seed
        self._order = RowOrder(len(prompts) * self._num_samples, config.train.batch_size, config.train.seed)
        self.first_step = offline_steps + 1
        self.last_step = offline_steps + config.train.max_epochs * self._order.steps_per_epoch
        if config.train.max_steps is not None:
            self.last_step = min(self.last_step, config.train.max_steps)
        if self.last_step < self.first_step:
            raise ConfigError(
                f"--train.max_steps {config.train.max_steps}: the {offline_steps} offline steps (--algo.distill."
                "offline_steps; none: one pass over the rows) leave no online one; raise it, or use "
                "--algo.distill.mode offline"
            )

    @property
    def steps_per_epoch(self) -> int:
        return self._order.steps_per_epoch

    @property
    def num_rows(self) -> int:
        """Rows of all steps."""
        epochs, rest = divmod(self.last_step - self.first_step + 1, self.steps_per_epoch)
        return epochs * self._order.num_rows + min(rest * self._order.batch_size, self._order.num_rows)

    def rows(self, step: int) -> list[PlannedRow]:
        """Rows of a step's global batch, in natural order of their ids.

        Raises:
            ValueError: the step is not one of the plan's.
        """
        if not self.first_step <= step <= self.last_step:
            raise ValueError(f"found step {step}, expected {self.first_step} to {self.last_step}")
        online_step = step - self.first_step + 1
        epoch = (online_step - 1) // self.steps_per_epoch
        fraction = self.student_fraction(step)
        rows = []
        for slot in self._order.rows(online_step).tolist():
            prompt, sample = divmod(slot, self._num_samples)
            row_id = f"{self._prompt_ids[prompt]}:{epoch * self._num_samples + sample}"
            source: Source = "student" if _draw(self._seed, row_id) < fraction else "teacher"
            rows.append(PlannedRow(row_id, prompt, step, source))
        return sorted(rows, key=lambda row: natural_key(row.row_id))

    def student_fraction(self, step: int) -> float:
        """Expected share of a step's rows that the student samples."""
        if self.rollout != "mixed":
            return float(self.rollout == "student")
        warmup = self._options.student_warmup_steps
        grown = 1.0 if warmup == 0 else min(1.0, (step - self.first_step + 1) / warmup)
        return grown * self._options.student_fraction


def _draw(seed: int, row_id: str) -> float:
    """Uniform in [0, 1), the same for a row on every machine."""
    digest = hashlib.blake2b(f"{seed}:source:{row_id}".encode(), digest_size=8).digest()
    return math.ldexp(int.from_bytes(digest, "big"), -64)
