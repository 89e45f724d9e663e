"""Which student a run keeps: by which validation measure, from what it is computed, and the folders of its weights."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from openrlhf_bd.config import Config

SNAPSHOT_SUFFIX = "_hf"
# Of the validation set's own responses, computed by the student's ranks; all others are of sampled responses.
LOSS = "loss"


def selection_metric(config: Config) -> str:
    """Name of the validation measure that selects the student."""
    return config.ckpt.best_metric_key or "rouge_l"


def validates_by_sampling(config: Config) -> bool:
    """Whether validation samples responses, and so needs engines: unless the loss alone decides."""
    return config.eval.dataset is not None and selection_metric(config) != LOSS


def validates_by_loss(config: Config) -> bool:
    """Whether validation computes the loss of references: where there are any, whatever selects; it costs little."""
    return config.eval.dataset is not None and config.data.label_key is not None


@dataclass(frozen=True, slots=True)
class Selection:
    """The best student so far: the measure and its value, its step, and the folder of its weights."""

    metric: str
    value: float
    step: int
    tag: str

    def is_better_than(self, best: Selection | None) -> bool:
        """Whether this student takes the place of the best so far: by a lower loss, or by more of anything else.

        Any number is better than NaN.
        """
        if best is None or math.isnan(best.value):
            return True
        return self.value < best.value if self.metric == LOSS else self.value > best.value


class Snapshots:
    """Folders of validated students. One that a checkpoint may name stays until a newer checkpoint is whole.

    A resumed run takes the best student from its newest checkpoint, so that student's folder must be there, even if a
    better one was found after the checkpoint and the run was killed then.

    Args:
        folder: of the checkpoints.
        checkpointed: whether the run saves checkpoints; without any, a superseded student can go at once.
    """

    def __init__(self, folder: Path, *, checkpointed: bool) -> None:
        self._folder, self._checkpointed = folder, checkpointed
        self._superseded: list[str] = []

    def path(self, tag: str) -> Path:
        """Folder of the student of a tag."""
        return self._folder / f"{tag}{SNAPSHOT_SUFFIX}"

    def supersede(self, tag: str) -> None:
        """A better student was found."""
        self._superseded.append(tag)
        if not self._checkpointed:
            self.prune()

    def prune(self) -> None:
        """Remove what was superseded: the newest checkpoint names a later student."""
        for tag in self._superseded:
            shutil.rmtree(self.path(tag), ignore_errors=True)
        self._superseded.clear()

    def remove(self, tag: str) -> None:
        """Remove a student that nothing names."""
        shutil.rmtree(self.path(tag), ignore_errors=True)
