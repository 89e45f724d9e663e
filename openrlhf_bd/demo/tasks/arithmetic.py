"""Column addition with carries, running totals, and chains of unit conversions."""

from random import Random
from typing import Any

from openrlhf_bd.demo.tasks.base import Draft, Family, compose, pick

TOTAL_MAX = 19
PACKINGS = (
    ("crates", "boxes", "pens"),
    ("racks", "trays", "cups"),
    ("trucks", "bags", "nuts"),
    ("shelves", "books", "pages"),
)


def draw_addition(rng: Random) -> tuple[Any, ...]:
    """Two numbers of two digits."""
    return (rng.randint(10, 99), rng.randint(10, 99))


def write_addition(problem: tuple[Any, ...], rng: Random) -> Draft:
    """One step per column, ones first; the order of the terms of a column is free."""
    a, b = problem
    worded = pick(rng, ("", " carry"))
    steps, carry = [], 0
    for column in range(2):
        terms = [str(a // 10**column % 10), str(b // 10**column % 10)]
        rng.shuffle(terms)
        if carry:
            terms.append("1")
        total = sum(map(int, terms))
        carry = total // 10
        steps.append("+".join(terms) + f"={total}" + (worded if carry else ""))
    phrases = (
        ("Add the columns from the right.", f"{a}+{b}"),
        (f"Find {a}+{b} by columns.", ""),
        ("Work out the sum, ones first.", f"{a}+{b}"),
        (f"What is {a}+{b}?", ""),
    )
    instruction, text = rng.choice(phrases)
    return Draft(instruction, text, compose(steps, str(a + b), rng), str(a + b))


def draw_totals(rng: Random) -> tuple[Any, ...]:
    """A start and three changes of different sizes, at most nine, that keep the total within 0..TOTAL_MAX."""
    start = total = rng.randint(0, TOTAL_MAX)
    changes: list[int] = []
    for _ in range(3):
        used = {0, *map(abs, changes)}
        change = rng.choice([c for c in range(-9, 10) if abs(c) not in used and 0 <= total + c <= TOTAL_MAX])
        changes.append(change)
        total += change
    return (start, tuple(changes))


def write_totals(problem: tuple[Any, ...], rng: Random) -> Draft:
    """One step per change, with or without the total before it."""
    start, changes = problem
    style = pick(rng, ("sum", "arrow"))
    steps, total = [], start
    for change in changes:
        before, total = total, total + change
        steps.append(f"{before}{change:+d}={total}" if style == "sum" else f"{change:+d}>{total}")
    changed = " ".join(f"{change:+d}" for change in changes)
    phrases = (
        ("Keep a running total.", f"{start} {changed}"),
        ("Apply the changes one by one.", f"{start} {changed}"),
        (f"Start at {start} and keep the total.", changed),
        (f"What is the total of {start} {changed}?", ""),
    )
    instruction, text = rng.choice(phrases)
    return Draft(instruction, text, compose(steps, str(total), rng), str(total))


def draw_units(rng: Random) -> tuple[Any, ...]:
    """Large units, two factors, and loose middle units."""
    return (rng.randint(2, 9), rng.randint(2, 4), rng.randint(1, 9), rng.randint(2, 4))


def write_units(problem: tuple[Any, ...], rng: Random) -> Draft:
    """Three steps: large to middle units, add the loose ones, middle to small units."""
    large, first, loose, second = problem
    big, middle, small = rng.choice(PACKINGS)
    times = pick(rng, ("*", "x"))
    named = pick(rng, ("", "name"))
    values = (large * first, large * first + loose, (large * first + loose) * second)
    sums = (f"{large}{times}{first}", f"{values[0]}+{loose}", f"{values[1]}{times}{second}")
    units = (f" {middle}", f" {middle}", f" {small}") if named else ("", "", "")
    steps = [f"{text}={value}{unit}" for text, value, unit in zip(sums, values, units, strict=True)]
    rates = f"{big} hold {first} {middle}, {middle} hold {second} {small}"
    phrases = (
        (f"Convert {large} {big} and {loose} {middle} to {small}.", rates),
        (f"How many {small} are in {large} {big} and {loose} {middle}?", rates),
        (f"Count the {small}: {large} {big}, {loose} {middle}.", rates),
        (f"Given {rates}: {large} {big} and {loose} {middle} in {small}?", ""),
    )
    instruction, text = rng.choice(phrases)
    return Draft(instruction, text, compose(steps, str(values[2]), rng), str(values[2]))


ADDITION = Family("addition", draw_addition, write_addition)
TOTALS = Family("totals", draw_totals, write_totals)
UNITS = Family("units", draw_units, write_units)
