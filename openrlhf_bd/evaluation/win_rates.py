"""Win rates of pairs of methods by a judge, and their file `win_rates.json`.

A judge sees the two answers to a prompt in both orders. Each verdict gives the first method 1 for a win, 1/2 for a
tie and 0 for a loss; a prompt's score is the mean over both orders, and the win rate is the mean score over the prompts
that were judged in both. Prompts that were not are counted by reason, and nowhere else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from openrlhf_bd.errors import DataError
from openrlhf_bd.store.files import write_text

WIN_RATES_FILE = "win_rates.json"

# Why a prompt was not judged. The first two end with another call; the others stay.
NOT_ASKED = "not asked yet"
NO_ANSWER = "the server did not answer"
REFUSED = "the server refused the question"
NO_VERDICT = "the judge's answer is no verdict"
_RESUMABLE = (NOT_ASKED, NO_ANSWER)

_REMEDY = "move it away and judge again: no verdict is asked for twice"
_RESAMPLES = 10_000
_BOOTSTRAP_SEED = 0


class Counts(BaseModel):
    """Verdicts in one order, over the prompts that were judged in both."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    wins: int
    ties: int
    losses: int

    @staticmethod
    def of(scores: Sequence[float]) -> Counts:
        """Counts of scores 1, 1/2 and 0."""
        return Counts(wins=scores.count(1.0), ties=scores.count(0.5), losses=scores.count(0.0))


class Usage(BaseModel):
    """What the judgements took, over all calls: answers asked for and tokens, as far as the server counts them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_requests: int
    prompt_tokens: int
    completion_tokens: int


class PairRates(BaseModel):
    """How often one method's answers are preferred to another's.

    Attributes:
        a: label of the method that wins and loses.
        b: label of the other.
        num_prompts: prompts that either has a response to.
        num_judged: those judged in both orders.
        not_judged: the others by reason.
        num_empty: empty responses of a and of b, which were judged like others.
        a_first: verdicts where a's answer came first.
        b_first: verdicts where b's came first.
        num_consistent: prompts with the same outcome in both orders.
        win_rate: 0 to 1, ties counting half; None where nothing was judged.
        interval: 95 % interval of it, percentiles of a bootstrap over prompts.
        p_value: two-sided sign test over the prompts whose score is not 1/2.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    a: str
    b: str
    num_prompts: int
    num_judged: int
    not_judged: dict[str, int]
    num_empty: tuple[int, int]
    a_first: Counts
    b_first: Counts
    num_consistent: int
    win_rate: float | None
    interval: tuple[float, float] | None
    p_value: float | None

    @property
    def num_not_judged(self) -> int:
        return sum(self.not_judged.values())

    @property
    def num_missing(self) -> int:
        """Prompts that another call would judge."""
        return sum(self.not_judged.get(reason, 0) for reason in _RESUMABLE)


class WinRates(BaseModel):
    """What a judge found.

    Attributes:
        model: name of the judge.
        prompt_version: version of what it was asked.
        constrained: it could only answer A, B or Tie.
        test_set: of the responses.
        seed: with which they were sampled.
        top_p: nucleus with which they were sampled.
        pairs: one a comparison.
        usage: what these judgements took.
        stopped: why the last call ended before its time; None: it did not.
        first_error: what the server said of the first question that it did not judge in the last call, if any.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    prompt_version: int
    constrained: bool
    test_set: str
    seed: int
    top_p: float
    pairs: list[PairRates]
    usage: Usage
    stopped: str | None = None
    first_error: str | None = None

    @property
    def num_missing(self) -> int:
        """Comparisons of a prompt that another call would judge; 0: complete."""
        return sum(pair.num_missing for pair in self.pairs)

    def write(self, path: Path) -> None:
        """Write `win_rates.json` into a folder, or the named file, in one step."""
        write_text(win_rates_path(path), json.dumps(self.model_dump(), indent=1, ensure_ascii=False) + "\n")

    @staticmethod
    def read(path: Path) -> WinRates:
        """Read `win_rates.json` from a folder, or the named file.

        Raises:
            DataError: the file is missing or holds no win rates.
        """
        file_path = win_rates_path(path)
        try:
            return WinRates.model_validate(json.loads(file_path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise DataError(f"{file_path}: not found, expected win rates; run `openrlhf-bd judge` first") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise DataError(f"{file_path}: no JSON ({error}); {_REMEDY}") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the document"
            raise DataError(
                f"{file_path}: {where}: {first['msg']}; expected the form that `openrlhf-bd judge` writes; {_REMEDY}"
            ) from None


def win_rates_path(path: Path) -> Path:
    """The file of win rates in a folder; a path that ends in `.json` is the file itself."""
    return path if path.suffix == ".json" else path / WIN_RATES_FILE


def pair_rates(
    a: str,
    b: str,
    scores: Sequence[tuple[float, float]],
    *,
    not_judged: dict[str, int],
    num_empty: tuple[int, int] = (0, 0),
) -> PairRates:
    """The figures of one pair.

    Args:
        a: label of the method that wins and loses.
        b: label of the other.
        scores: of each judged prompt: a's score shown first, and shown second; each 1, 1/2 or 0.
        not_judged: prompts that were not judged in both orders, by reason.
        num_empty: empty responses of a and of b.
    """
    means = [(first + second) / 2 for first, second in scores]
    return PairRates(
        a=a,
        b=b,
        num_prompts=len(scores) + sum(not_judged.values()),
        num_judged=len(scores),
        not_judged=not_judged,
        num_empty=num_empty,
        a_first=Counts.of([first for first, _ in scores]),
        b_first=Counts.of([second for _, second in scores]),
        num_consistent=sum(first == second for first, second in scores),
        win_rate=math.fsum(means) / len(means) if means else None,
        interval=bootstrap_interval(means) if means else None,
        p_value=sign_test(means) if means else None,
    )


def bootstrap_interval(scores: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of scores: percentiles of the means of resamples of as many prompts, fixed seed.

    Scores have few values, so the counts of these in a resample are one multinomial draw.

    Args:
        scores: of each prompt, at least one.
    """
    values, counts = np.unique(scores, return_counts=True)
    num_prompts = len(scores)
    drawn = np.random.default_rng(_BOOTSTRAP_SEED).multinomial(num_prompts, counts / num_prompts, size=_RESAMPLES)
    low, high = np.percentile(drawn @ values / num_prompts, [2.5, 97.5])
    return float(low), float(high)


def sign_test(scores: Sequence[float]) -> float:
    """Two-sided p-value that wins and losses over prompts are equally likely; prompts with score 1/2 are left out.

    p = min(1, 2 P(X <= min(wins, losses))),  X ~ Binomial(wins + losses, 1/2)

    Args:
        scores: of each prompt, 0 to 1.
    """
    wins, losses = sum(score > 0.5 for score in scores), sum(score < 0.5 for score in scores)
    num_decided = wins + losses
    # Whole numbers first: at 2000 prompts 2^n is beyond a float.
    tail = sum(math.comb(num_decided, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**num_decided)
