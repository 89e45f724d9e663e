"""Which rows and which pre-training blocks each optimizer step sees. NumPy only.

The order depends on the seed, the counts and the batch size alone: not on the number of ranks, micro-batches or on
where a run was resumed. Steps are counted from 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

ROWS_STREAM, BLOCKS_STREAM = 0, 1


@lru_cache(maxsize=4)
def epoch_permutation(num_items: int, *, seed: int, stream: int, epoch: int) -> NDArray[np.int64]:
    """Permutation of range(num_items) of one epoch, read-only, the same on every machine.

    Args:
        num_items: items to permute.
        seed: --train.seed.
        stream: ROWS_STREAM or BLOCKS_STREAM, so that rows and blocks are shuffled independently.
        epoch: counted from 0.
    """
    generator = np.random.Generator(np.random.PCG64([seed % 2**32, stream, epoch]))
    permutation = generator.permutation(num_items)
    permutation.flags.writeable = False
    return permutation


@dataclass(frozen=True, slots=True)
class RowOrder:
    """Order of the store's rows: each epoch is one permutation, cut into batches; its last batch may be smaller.

    Attributes:
        num_rows: rows of the store.
        batch_size: rows of a step, over all ranks.
        seed: --train.seed.
    """

    num_rows: int
    batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.num_rows / self.batch_size)

    def rows(self, step: int) -> NDArray[np.int64]:
        """Rows of a step's global batch, in order; at least one.

        Raises:
            ValueError: step < 1.
        """
        if step < 1:
            raise ValueError(f"steps are counted from 1, found {step}")
        epoch, batch = divmod(step - 1, self.steps_per_epoch)
        permutation = epoch_permutation(self.num_rows, seed=self.seed, stream=ROWS_STREAM, epoch=epoch)
        return permutation[batch * self.batch_size : (batch + 1) * self.batch_size]


@dataclass(frozen=True, slots=True, eq=False)
class RecordedOrder:
    """Order of an online run's rows: each belongs to the step that it was made for. Epochs repeat it.

    Attributes:
        step_N: optimizer step of each row.
        first_step: first of these steps; it becomes step 1.
    """

    step_N: NDArray[np.integer]
    first_step: int

    @property
    def steps_per_epoch(self) -> int:
        return int(self.step_N.max()) - self.first_step + 1

    def rows(self, step: int) -> NDArray[np.int64]:
        """Rows of a step's global batch, in order.

        Raises:
            ValueError: step < 1, or no row was made for it.
        """
        if step < 1:
            raise ValueError(f"steps are counted from 1, found {step}")
        recorded = self.first_step + (step - 1) % self.steps_per_epoch
        rows = np.flatnonzero(self.step_N == recorded)
        if not len(rows):
            raise ValueError(f"no row was made for step {recorded}; expected some for each of the run's steps")
        return rows


@dataclass(frozen=True, slots=True)
class BlockOrder:
    """Order of the pre-training blocks: the endless sequence of epoch permutations, `batch_size` blocks a step.

    Pre-training text has its own epochs, since its size has nothing to do with the number of rows; a step's blocks may
    span two of them.

    Attributes:
        num_blocks: blocks there are.
        batch_size: blocks of a step, over all ranks.
        seed: --train.seed.
    """

    num_blocks: int
    batch_size: int
    seed: int

    def blocks(self, step: int) -> NDArray[np.int64]:
        """The `batch_size` blocks of a step, in order.

        Raises:
            ValueError: step < 1.
        """
        if step < 1:
            raise ValueError(f"steps are counted from 1, found {step}")
        first, end = (step - 1) * self.batch_size, step * self.batch_size
        epochs = range(first // self.num_blocks, (end - 1) // self.num_blocks + 1)
        sequence = np.concatenate([self._permutation(epoch) for epoch in epochs])
        start = first - epochs[0] * self.num_blocks
        return sequence[start : start + self.batch_size]

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        return epoch_permutation(self.num_blocks, seed=self.seed, stream=BLOCKS_STREAM, epoch=epoch)
