"""String rewriting by rules in sequence, and chains of logic gates."""

from random import Random
from typing import Any

from openrlhf_bd.demo.tasks.base import Draft, Family, compose, pick
from openrlhf_bd.demo.tasks.lists import LETTERS

GATES = {"&": lambda a, b: a & b, "|": lambda a, b: a | b, "^": lambda a, b: a ^ b}
GATE_NAMES = "wxyz"


def draw_rewriting(rng: Random) -> tuple[Any, ...]:
    """Four different letters and two rules; every second time the second rule replaces what the first one wrote."""
    letters = rng.sample(LETTERS, 6)
    word, (first_new, second_new) = letters[:4], letters[4:]
    first_old = rng.choice(word)
    others = [letter for letter in word if letter != first_old]
    second_old = first_new if rng.random() < 0.5 else rng.choice(others)
    return ("".join(word), ((first_old, first_new), (second_old, second_new)))


def write_rewriting(problem: tuple[Any, ...], rng: Random) -> Draft:
    """The whole string after each rule, with or without the rule."""
    word, rules = problem
    style = pick(rng, ("plain", "rule", "equals"))
    now, steps = list(word), []
    for old, new in rules:
        now = [new if letter == old else letter for letter in now]
        label = {"plain": "", "rule": f"{old}>{new}: ", "equals": "= "}[style]
        steps.append(label + " ".join(now))
    shown = " " + " ".join(word)
    listed = ", ".join(f"{old}>{new}" for old, new in rules)
    phrases = (
        ("Rewrite by the rules in order:" + shown, listed),
        (f"Replace letters: {listed}.", "string:" + shown),
        (f"Rewrite{shown} with {listed}.", ""),
        ("Apply each rule once.", f"string:{shown}\n{listed}"),
    )
    instruction, text = rng.choice(phrases)
    return Draft(instruction, text, compose(steps, " ".join(now), rng), "".join(now))


def draw_logic(rng: Random) -> tuple[Any, ...]:
    """A first bit and four gates, each with its other input."""
    gates = tuple((rng.choice(tuple(GATES)), rng.randrange(2)) for _ in GATE_NAMES)
    return (rng.randrange(2), gates)


def write_logic(problem: tuple[Any, ...], rng: Random) -> Draft:
    """One step per gate: its name, its inputs, its output, which the next gate reads."""
    first, gates = problem
    style = pick(rng, ("colon", "equals"))
    between = pick(rng, ("", ",", "-"))
    bit, steps, outputs = first, [], []
    for name, (gate, other) in zip(GATE_NAMES, gates, strict=True):
        before, bit = bit, GATES[gate](bit, other)
        steps.append(
            f"{name}:{before}{gate}{other}={bit}" if style == "colon" else f"{name}={before}{gate}{other}={bit}"
        )
        outputs.append(str(bit))
    answer = "".join(outputs)
    rules = ", ".join(f"{name}{gate}{other}" for name, (gate, other) in zip(GATE_NAMES, gates, strict=True))
    phrases = (
        (f"Begin with {first} and give each gate's output.", rules),
        ("Fill in the logic table.", f"first {first}; {rules}"),
        (f"Pass bit {first} through {rules}.", ""),
        ("What comes out of each gate?", f"first {first}; {rules}"),
    )
    instruction, text = rng.choice(phrases)
    return Draft(instruction, text, compose(steps, between.join(answer), rng), answer)


REWRITING = Family("rewriting", draw_rewriting, write_rewriting)
LOGIC = Family("logic", draw_logic, write_logic)
