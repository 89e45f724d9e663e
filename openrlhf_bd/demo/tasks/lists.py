"""Sorting by repeated selection, and edits of a list in sequence."""

from random import Random
from typing import Any

from openrlhf_bd.demo.tasks.base import Draft, Family, compose, pick

LETTERS = "bdfgkmpt"
PLAIN_EDITS = ("reverse", "drop first", "drop last", "swap ends")


def draw_sorting(rng: Random) -> tuple[Any, ...]:
    """Four different digits and a direction."""
    return (tuple(rng.sample(range(10), 4)), rng.choice(("up", "down")))


def write_sorting(problem: tuple[Any, ...], rng: Random) -> Draft:
    """Each step takes the next digit out and shows what is left."""
    digits, direction = problem
    taken = pick(rng, (":", "|", " from ", " left "))
    between = pick(rng, ("", ",", "-"))
    left, done, steps = list(digits), [], []
    while len(left) > 1:
        best = min(left) if direction == "up" else max(left)
        left.remove(best)
        done.append(best)
        steps.append(f"{best}{taken}{''.join(map(str, left))}")
    done += left
    answer = "".join(map(str, done))
    order = {"up": "smallest", "down": "largest"}[direction]
    text = "".join(map(str, digits))
    phrases = (
        (f"Sort, {order} first.", text),
        (f"Put the digits of {text} in order, {order} first.", ""),
        (f"Take the {order} digit again and again.", text),
        (f"Sort {text} {direction}.", ""),
    )
    instruction, shown = rng.choice(phrases)
    return Draft(instruction, shown, compose(steps, between.join(answer), rng), answer)


def apply_edit(items: list[str], edit: str) -> list[str]:
    """The list after one edit, written as in the instruction ("drop first", "add k")."""
    if edit == "reverse":
        return items[::-1]
    if edit == "drop first":
        return items[1:]
    if edit == "drop last":
        return items[:-1]
    if edit == "swap ends":
        return [items[-1], *items[1:-1], items[0]]
    return [*items, edit.removeprefix("add ")]


def draw_edits(rng: Random) -> tuple[Any, ...]:
    """Four different letters and two edits."""
    letters = rng.sample(LETTERS, 6)
    edits = [rng.choice((*PLAIN_EDITS, f"add {letter}")) for letter in letters[4:]]
    return ("".join(letters[:4]), tuple(edits))


def write_edits(problem: tuple[Any, ...], rng: Random) -> Draft:
    """The whole list after each edit, with or without the edit's name."""
    word, edits = problem
    style = pick(rng, ("plain", "named", "dash"))
    items, steps = list(word), []
    for edit in edits:
        items = apply_edit(items, edit)
        label = {"plain": "", "named": f"{edit}: ", "dash": "- "}[style]
        steps.append(label + " ".join(items))
    shown, listed = " " + " ".join(word), ", ".join(edits)
    phrases = (
        ("Edit the list:" + shown, listed),
        (f"Do this in order: {listed}.", "list:" + shown),
        (f"Start with{shown}, then {listed}.", ""),
        ("Apply the edits one by one.", f"list:{shown}\n{listed}"),
    )
    instruction, text = rng.choice(phrases)
    answer = " ".join(items)
    return Draft(instruction, text, compose(steps, answer, rng), "".join(items))


SORTING = Family("sorting", draw_sorting, write_sorting)
EDITS = Family("edits", draw_edits, write_edits)
