"""Date arithmetic: a jump over the end of a month, in a year of 365 days."""

from random import Random
from typing import Any

from openrlhf_bd.demo.tasks.base import Draft, Family, compose, pick

MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
DAYS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)


def draw_dates(rng: Random) -> tuple[Any, ...]:
    """A day, a month and a jump of at most 28 days that ends in the next month."""
    month = rng.randrange(12)
    jump = rng.randint(2, 28)
    return (rng.randint(DAYS[month] - jump + 1, DAYS[month]), month, jump)


def write_dates(problem: tuple[Any, ...], rng: Random) -> Draft:
    """Three steps: add the days, recall the month's length, subtract it."""
    day, month, jump = problem
    worded = pick(rng, ("", "has"))
    total, later = day + jump, (month + 1) % 12
    answer = f"{total - DAYS[month]} {MONTHS[later]}"
    limit = f"{MONTHS[month]} has {DAYS[month]}" if worded else f"{MONTHS[month]}={DAYS[month]}"
    steps = [f"{day}+{jump}={total}", limit, f"{total}-{DAYS[month]}={answer}"]
    phrases = (
        ("Find the date.", f"{day} {MONTHS[month]} +{jump} days"),
        (f"Which date is {jump} days later?", f"{day} {MONTHS[month]}"),
        (f"Start on {day} {MONTHS[month]} and go {jump} days on.", ""),
        ("Move the date forward.", f"{day} {MONTHS[month]} +{jump}"),
    )
    instruction, text = rng.choice(phrases)
    return Draft(instruction, text, compose(steps, answer, rng), answer)


DATES = Family("dates", draw_dates, write_dates)
