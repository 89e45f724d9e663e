"""What a judge is asked (the paper's Fig. 4 in other words), and what counts as its verdict."""

from __future__ import annotations

import re
from typing import Literal

Verdict = Literal["A", "B", "Tie"]
VERDICTS: tuple[Verdict, ...] = ("A", "B", "Tie")

# Part of what names a judgement: another wording is another judge. Raise it with every change of the texts.
PROMPT_VERSION = 1
EMPTY_ANSWER = "(This answer is empty.)"
# Said after an answer that was no verdict.
REMINDER = "That is no verdict. Reply with one token and nothing else: A, B or Tie."

_TASK = """\
You compare two answers to the same request. Be impartial: neither the order of the answers nor who might have written \
them counts.
You see an instruction, further input if there is any, and the answers A and B. Decide which of them serves the \
instruction better, or whether they are equally good. Reply with one token and nothing else: A, B or Tie."""

_VERDICT = re.compile(r"[\W_]*(a|b|tie)[\W_]*", re.IGNORECASE)
_BY_NAME = {verdict.lower(): verdict for verdict in VERDICTS}


def question_text(instruction: str, further_input: str, answer_a: str, answer_b: str) -> str:
    """The whole question as one message.

    Args:
        instruction: what the students were asked.
        further_input: of the instruction; its part is left out where it is empty.
        answer_a: shown first.
        answer_b: shown second.
    """
    parts = [_TASK, f"### INSTRUCTION\n{instruction.strip()}"]
    if further_input.strip():
        parts.append(f"### INPUT\n{further_input.strip()}")
    parts += [
        f"### ANSWER A\n{answer_a.strip() or EMPTY_ANSWER}",
        f"### ANSWER B\n{answer_b.strip() or EMPTY_ANSWER}",
        "Which answer is better: A, B or Tie?",
    ]
    return "\n\n".join(parts)


def parse_verdict(answer: str) -> Verdict | None:
    """The verdict that an answer is, whatever its case and the space and punctuation around it; None: it is none.

    A sentence is never a verdict, whichever letter it names: "A", " b.", "**Tie**" are; "Answer A", "A or B" are not.
    """
    found = _VERDICT.fullmatch(answer)
    return _BY_NAME[found.group(1).lower()] if found else None
