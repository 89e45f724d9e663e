"""What a judge is asked about two methods' responses: every pair of answers, in both orders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from openrlhf_bd.config import JudgeOptions
from openrlhf_bd.evaluation.judge_prompt import PROMPT_VERSION, question_text
from openrlhf_bd.evaluation.judge_responses import Match
from openrlhf_bd.evaluation.results import SavedResponse
from openrlhf_bd.store.fingerprints import fingerprint_json


@dataclass(frozen=True, slots=True)
class Question:
    """Two answers in one order.

    Attributes:
        key: digest of all that decides the verdict.
        shown_a: label of the method whose answer is shown as A.
        shown_b: label of the other.
        answer_a: shown as A.
        answer_b: shown as B.
    """

    key: str
    shown_a: str
    shown_b: str
    answer_a: SavedResponse
    answer_b: SavedResponse

    @property
    def text(self) -> str:
        return question_text(
            self.answer_a.instruction, self.answer_a.input, self.answer_a.response, self.answer_b.response
        )


def _question(shown_a: str, shown_b: str, one: SavedResponse, other: SavedResponse, options: JudgeOptions) -> Question:
    key = fingerprint_json(
        {
            "model": options.model,
            "constrained": options.constrained,
            "prompt_version": PROMPT_VERSION,
            "instruction": one.instruction,
            "input": one.input,
            # As they are shown: the order is part of it.
            "answers": [one.response, other.response],
        }
    )
    return Question(key, shown_a, shown_b, one, other)


def both_orders(
    match: Match, one: SavedResponse, other: SavedResponse, options: JudgeOptions
) -> tuple[Question, Question]:
    return _question(match.a, match.b, one, other, options), _question(match.b, match.a, other, one, options)


def all_questions(matches: Sequence[Match], options: JudgeOptions) -> Iterator[Question]:
    """Every question once, the two orders of a prompt one after the other: a small budget judges whole prompts."""
    seen: set[str] = set()
    for match in matches:
        for one, other in match.prompts:
            for question in both_orders(match, one, other, options):
                if question.key not in seen:
                    seen.add(question.key)
                    yield question
