"""Rouge-L as the paper reports it: `rouge_score`, F-measure, Porter stemmer, maximum over references, times 100."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from rouge_score.rouge_scorer import RougeScorer


@cache
def _scorer() -> RougeScorer:
    return RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(response: str, references: str | Sequence[str]) -> float:
    """Rouge-L F-measure of a response, 0 to 100; the best over its references.

    F = 2 P R / (P + R) with P = LCS / words of the response, R = LCS / words of the reference   (Lin 2004)

    Words are the lower-case runs of letters a-z and digits, stemmed where they are longer than three; everything else
    separates words. A text without any such word scores 0.

    Args:
        response: text of the student.
        references: one reference, or several.

    Raises:
        ValueError: no reference.
    """
    texts = [references] if isinstance(references, str) else list(references)
    if not texts:
        raise ValueError("rouge_l: found no reference, expected at least one")
    return 100.0 * float(_scorer().score_multi(texts, response)["rougeL"].fmeasure)


def mean_rouge_l(responses: Sequence[str], references: Sequence[str | Sequence[str]]) -> float:
    """Mean of `rouge_l` over a set of responses, 0 to 100.

    Raises:
        ValueError: no response, or the lengths differ.
    """
    if not responses:
        raise ValueError("mean_rouge_l: found no response, expected at least one")
    return sum(rouge_l(text, refs) for text, refs in zip(responses, references, strict=True)) / len(responses)
