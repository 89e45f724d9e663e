"""The order of rows and pre-training blocks."""

from collections.abc import Callable

import numpy as np
import pytest

from openrlhf_bd.data.order import BlockOrder, RowOrder, epoch_permutation


def test_each_epoch_visits_every_row_once_and_keeps_the_last_partial_batch() -> None:
    """Each epoch visits every row exactly once; its last batch is smaller, not dropped."""
    order = RowOrder(num_rows=10, batch_size=4, seed=7)
    assert order.steps_per_epoch == 3
    for epoch in range(3):
        batches = [order.rows(epoch * 3 + step) for step in (1, 2, 3)]
        assert [len(batch) for batch in batches] == [4, 4, 2]
        assert sorted(np.concatenate(batches)) == list(range(10))


def test_order_is_a_function_of_seed_and_step() -> None:
    """The same seed and step give the same rows; another seed or epoch gives another order."""
    order = RowOrder(num_rows=100, batch_size=100, seed=1)
    np.testing.assert_array_equal(order.rows(5), RowOrder(100, 100, 1).rows(5))
    assert (order.rows(1) != order.rows(2)).any()
    assert (order.rows(1) != RowOrder(100, 100, 2).rows(1)).any()


def test_order_is_pinned() -> None:
    """A seed means the same order in every release: a run of last year can be resumed or repeated."""
    assert epoch_permutation(8, seed=42, stream=0, epoch=0).tolist() == [3, 4, 2, 7, 6, 1, 5, 0]


def test_batch_larger_than_the_store_is_one_batch() -> None:
    """A batch size above the number of rows makes one step an epoch, with every row once."""
    assert sorted(RowOrder(num_rows=3, batch_size=8, seed=0).rows(2)) == [0, 1, 2]


def test_blocks_are_an_endless_sequence_of_permutations() -> None:
    """Blocks of consecutive steps join up into whole permutations, whatever the batch size."""
    steps = [BlockOrder(num_blocks=5, batch_size=3, seed=3).blocks(step) for step in range(1, 11)]
    assert {len(blocks) for blocks in steps} == {3}
    sequence = np.concatenate(steps)
    for epoch in range(6):
        assert sorted(sequence[epoch * 5 : epoch * 5 + 5]) == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(sequence, np.concatenate([BlockOrder(5, 10, 3).blocks(s) for s in (1, 2, 3)]))


def test_batch_of_more_blocks_than_there_are() -> None:
    """A step may take more blocks than there are: it spans several permutations."""
    blocks = BlockOrder(num_blocks=2, batch_size=5, seed=0).blocks(2)
    assert len(blocks) == 5
    assert set(blocks) == {0, 1}


@pytest.mark.parametrize("order", [RowOrder(4, 2, 0).rows, BlockOrder(4, 2, 0).blocks])
def test_step_zero_is_refused(order: Callable[[int], object]) -> None:
    """Steps are counted from 1: step 0 is a programmer's mistake, not an empty batch."""
    with pytest.raises(ValueError, match="counted from 1"):
        order(0)
