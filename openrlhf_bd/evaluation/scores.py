"""Scores of a set of responses. Pure functions: no tokenizer, no Ray."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from openrlhf_bd.data.fields import reference_fields
from openrlhf_bd.data.readers import Record
from openrlhf_bd.evaluation.checker import Checker
from openrlhf_bd.evaluation.rouge import rouge_l
from openrlhf_bd.records import Prompt


@dataclass(frozen=True, slots=True)
class Response:
    """One response of the student.

    Attributes:
        text: decoded without special tokens, surrounding space removed.
        num_tokens: sampled tokens, the stop token included.
        finish_reason: "stop" if it ended by itself, "length" if it was cut.
    """

    text: str
    num_tokens: int
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class SeedScores:
    """Scores of one seed's responses, and what each response got.

    Attributes:
        rouge_l_B: Rouge-L of each response, 0 to 100, None where there is no reference; None without references.
        correct_B: verdict of the checker on each; None without a checker.
        response_tokens: mean length, tokens.
        stop_rate: share that ended by itself.
        distinct_1, distinct_2: see `distinct`.
    """

    rouge_l_B: list[float | None] | None
    correct_B: list[bool] | None
    response_tokens: float
    stop_rate: float
    distinct_1: float
    distinct_2: float

    @property
    def rouge_l(self) -> float | None:
        """Mean over the responses that have a reference."""
        found = [value for value in self.rouge_l_B or [] if value is not None]
        return math.fsum(found) / len(found) if found else None

    @property
    def accuracy(self) -> float | None:
        return None if self.correct_B is None else sum(self.correct_B) / len(self.correct_B)


def references_of(prompt: Prompt, label_key: str) -> list[str]:
    """The reference responses of a prompt's record, any number; none where it has none.

    Raises:
        DataError: what stands there is neither a text nor a list of texts.
    """
    record = Record(dict(prompt.record), f"prompt {prompt.prompt_id}")
    return reference_fields(record, label_key, allow_missing=True)


def distinct(texts: Sequence[str], n: int) -> float:
    """Different n-grams of words over all n-grams of words in a set of responses, 0 to 1; 0 where there are none.

    distinct-n (Li et al. 2016). It falls with the number of responses: compare equal sets only.
    """
    seen: set[tuple[str, ...]] = set()
    total = 0
    for text in texts:
        words = text.lower().split()
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        seen.update(grams)
        total += len(grams)
    return len(seen) / total if total else 0.0


def mean_nll(logprobs: Sequence[NDArray[np.float32]]) -> float:
    """Negative log-likelihood per token over a set of responses, nats: -sum of log-probabilities / number of tokens.

    Raises:
        ValueError: no token.
    """
    num_tokens = sum(len(logprobs_T) for logprobs_T in logprobs)
    if num_tokens == 0:
        raise ValueError("mean_nll: found no token, expected at least one scored response")
    return -math.fsum(float(np.sum(logprobs_T, dtype=np.float64)) for logprobs_T in logprobs) / num_tokens


def score_seed(
    responses: Sequence[Response],
    records: Sequence[Mapping[str, Any]],
    references: Sequence[Sequence[str]] | None,
    checker: Checker | None,
) -> SeedScores:
    """Score one response to each prompt.

    Args:
        responses: one for each prompt.
        records: the data set's record of each prompt, for the checker.
        references: references of each prompt, some may have none; or None.
        checker: function(record, response text) -> bool, or None.

    Raises:
        ValueError: no response, or the lengths differ.
    """
    if not responses:
        raise ValueError("score_seed: found no response, expected at least one")
    texts = [response.text for response in responses]
    return SeedScores(
        rouge_l_B=None
        if references is None
        else [rouge_l(text, refs) if refs else None for text, refs in zip(texts, references, strict=True)],
        correct_B=None
        if checker is None
        else [bool(checker(record, text)) for record, text in zip(records, texts, strict=True)],
        response_tokens=sum(response.num_tokens for response in responses) / len(responses),
        stop_rate=sum(response.finish_reason == "stop" for response in responses) / len(responses),
        distinct_1=distinct(texts, 1),
        distinct_2=distinct(texts, 2),
    )
