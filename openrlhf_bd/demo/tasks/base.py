"""What every task family shares: its type, and the random style of a written answer.

A *problem* is the mathematical content (two numbers, a list and its edits). A *draft* is one way to write it down.
The style of an answer is drawn independently of the problem, so the best possible model of these answers is a
distribution and not a single string.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

# Uneven odds on purpose: a top-p set of 0.8 and one of 0.95 then hold different numbers of tokens.
ODDS = (0.5, 0.3, 0.15, 0.05)
OPENERS = ("", "Steps:\n", "Work:\n", "OK:\n")
JOINERS = ("\n", "; ", ";\n", " then ")
CLOSERS = ("\nAnswer: {}", ". The answer is {}.", "\nResult: {}", ".\nFinal: {}")
MARKERS = ("Answer:", "The answer is", "Result:", "Final:")


@dataclass(frozen=True)
class Draft:
    """One problem written down: the instruction, its input (may be empty), the answer's steps, and the answer."""

    instruction: str
    input: str
    output: str
    answer: str


@dataclass(frozen=True)
class Family:
    """One kind of task.

    Attributes:
        name: lower-case identifier, also the record's `family` field.
        draw: draws a problem, a tuple of JSON-able values whose `repr` identifies it.
        write: writes a problem down, with the phrasing and the style drawn from the generator.
    """

    name: str
    draw: Callable[[Random], tuple[Any, ...]]
    write: Callable[[tuple[Any, ...], Random], Draft]


def pick(rng: Random, options: Sequence[str]) -> str:
    """One of at most four options, the first most often (see `ODDS`)."""
    return rng.choices(options, weights=ODDS[: len(options)])[0]


def compose(steps: Sequence[str], answer: str, rng: Random) -> str:
    """An answer: an opening, the steps with a separator drawn for each gap, and the marked final answer."""
    body = steps[0]
    for step in steps[1:]:
        body += pick(rng, JOINERS) + step
    return pick(rng, OPENERS) + body + pick(rng, CLOSERS).format(answer)


def final_answer(response: str) -> str | None:
    """The text after the last marker of a response, in canonical form; None where there is no marker."""
    starts = [(response.rfind(marker), marker) for marker in MARKERS]
    start, marker = max(starts)
    if start < 0:
        return None
    return canonical(response[start + len(marker) :])


def canonical(answer: str) -> str:
    """An answer without the liberties of style: no spaces, no separators, no closing full stop."""
    return answer.strip().removesuffix(".").replace(" ", "").replace(",", "").replace("-", "")
