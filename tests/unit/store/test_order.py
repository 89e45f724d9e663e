"""The order of rows, against tuples that compare as the definition says."""

from __future__ import annotations

import random
import re

import pytest

from openrlhf_bd.store.order import natural_key, natural_order


def tuple_key(row_id: str) -> tuple[object, ...]:
    """Text, number, text, ... as Python compares them, and the id itself."""
    parts = re.split("([0-9]+)", row_id)
    return tuple(int(part) if place % 2 else part for place, part in enumerate(parts)), row_id


@pytest.mark.parametrize(
    "ascending",
    [
        ["train:9:1", "train:10:0", "train:10:2"],
        ["", "a", "a0", "a1", "a-", "ab"],
        ["a07", "a7", "a7b", "a08"],
        ["0", "00", "1", "18446744073709551616", "100000000000000000000000000000"],
        ["a\0", "a\0b", "a\1", "a:", "é1", "東1", "🙂1"],
    ],
)
def test_numbers_count_as_numbers(ascending: list[str]) -> None:
    """Hand-made ids come in the order of their numbers, and else of their characters."""
    shuffled = random.Random(0).sample(ascending, len(ascending))
    assert sorted(shuffled, key=natural_key) == ascending
    assert sorted(shuffled, key=tuple_key) == ascending


def test_any_ids() -> None:
    """Over random ids of few characters, where prefixes and leading zeros abound, both keys give one order."""
    generator = random.Random(0)
    ids = list({"".join(generator.choices("a:-0012\0é", k=generator.randrange(7))) for _ in range(20_000)})
    expected = sorted(ids, key=tuple_key)
    assert sorted(ids, key=natural_key) == expected
    assert [ids[number] for number in natural_order(ids).tolist()] == expected


def test_no_ids() -> None:
    """Nothing is in order."""
    assert natural_order([]).tolist() == []
