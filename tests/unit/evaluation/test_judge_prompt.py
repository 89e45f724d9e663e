"""What a judge is asked, and which answers are verdicts."""

import pytest

from openrlhf_bd.evaluation.judge_prompt import EMPTY_ANSWER, parse_verdict, question_text


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("A", "A"),
        ("B", "B"),
        ("Tie", "Tie"),
        (" a.\n", "A"),
        ("**B**", "B"),
        ("TIE!", "Tie"),
        ("(A)", "A"),
        ("`tie`", "Tie"),
        ("__B__", "B"),
        ('"A"', "A"),
    ],
)
def test_case_space_and_punctuation_do_not_matter(answer: str, verdict: str) -> None:
    """A verdict is one whatever its case and decoration."""
    assert parse_verdict(answer) == verdict


@pytest.mark.parametrize(
    "answer",
    [
        "",
        " ",
        "...",
        "Answer A",
        "A or B",
        "A is better",
        "AB",
        "A B",
        "Tied",
        "I choose B.",
        "C",
        "A\nB",
        "A, because",
    ],
)
def test_no_sentence_is_a_verdict(answer: str) -> None:
    """What says more than a verdict, or less, is none: nobody guesses what was meant."""
    assert parse_verdict(answer) is None


def test_question_has_everything_in_order() -> None:
    """Instruction, input and both answers stand there in this order; an empty answer is named as such."""
    text = question_text("Add.", "1 and 2", "3", " ")
    places = [text.index(part) for part in ("Add.", "1 and 2", "### ANSWER A\n3", f"### ANSWER B\n{EMPTY_ANSWER}")]
    assert places == sorted(places)


def test_question_without_input_has_no_part_for_it() -> None:
    """An instruction without input leaves no empty heading."""
    assert "### INPUT" not in question_text("Add.", " \n", "3", "4")
    assert "### INPUT" in question_text("Add.", "1", "3", "4")
