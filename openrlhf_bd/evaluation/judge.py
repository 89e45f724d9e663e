"""Win rates by a judge: every pair of answers in both orders, each question asked once, whatever interrupts it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from openrlhf_bd.config import JudgeOptions
from openrlhf_bd.endpoint import ApiOptions
from openrlhf_bd.errors import ConfigError, RunFolderError
from openrlhf_bd.evaluation.judge_asking import Asking, OnProgress
from openrlhf_bd.evaluation.judge_cache import open_judgements
from openrlhf_bd.evaluation.judge_client import JudgeClient, api_options
from openrlhf_bd.evaluation.judge_prompt import PROMPT_VERSION
from openrlhf_bd.evaluation.judge_questions import Question, all_questions, both_orders
from openrlhf_bd.evaluation.judge_responses import Match, choose_responses, find_responses, match_responses
from openrlhf_bd.evaluation.win_rates import (
    NO_VERDICT,
    NOT_ASKED,
    PairRates,
    Usage,
    WinRates,
    pair_rates,
    win_rates_path,
)

# Starts a server for the length of a block.
Host = Callable[[], AbstractContextManager[ApiOptions]]

_SCORE_OF_A = {"A": 1.0, "Tie": 0.5, "B": 0.0}


def judge_pairs(
    responses: Mapping[str, Path],
    pairs: Sequence[tuple[str, str]],
    options: JudgeOptions,
    output_dir: Path,
    on_progress: OnProgress | None = None,
    host: Host | None = None,
) -> WinRates:
    """Let a judge compare saved responses, and write `judgements.jsonl` and `win_rates.json`.

    What `judgements.jsonl` has is not asked for again. A call that ends before its time (budget, a server that went
    away) writes what there is: `WinRates.num_missing` is not 0 then, `stopped` says why, and the same call goes on.

    Args:
        responses: of each label, the saved responses or their folder (`find_responses`).
        pairs: labels (a, b); a wins and loses.
        options: the judge, by the name that its server knows, and which responses.
        output_dir: made where it is missing.
        on_progress: see `OnProgress`.
        host: starts the judge's server, entered where there is something to ask; None: that of `options.api_base` runs.

    Raises:
        ConfigError: a pair names no responses; the endpoint is none, refuses the key, or has no such model.
        DataError: responses are missing, damaged, or to different prompts; the server refuses the first question.
        RunFolderError: `output_dir` holds other win rates, or another process is judging there.
        ClusterError: the server did not answer a single question, or did not start.
    """
    _check_pairs(pairs, responses)
    labels = dict.fromkeys(label for pair in pairs for label in pair)
    found = {label: choose_responses(find_responses(Path(responses[label])), options) for label in labels}
    matches = [match_responses(a, b, found) for a, b in pairs]
    opened: Host = host or _server_of(api_options(options))
    _check_output(output_dir, pairs, options)
    with open_judgements(output_dir) as judgements:
        asking = Asking(judgements, options, on_progress)
        questions = list(all_questions(matches, options))
        if asking.open_questions(questions):
            with opened() as api:
                asyncio.run(asking.run(JudgeClient(options, api), questions))
        rates = _win_rates(matches, options, asking)
        rates.write(output_dir)
    return rates


def _server_of(api: ApiOptions) -> Host:
    """One that somebody else started."""
    return lambda: nullcontext(api)


def _win_rates(matches: Sequence[Match], options: JudgeOptions, asking: Asking) -> WinRates:
    keys = {question.key for question in all_questions(matches, options)}
    judgements = [found for key in keys if (found := asking.judgements.get(key)) is not None]
    return WinRates(
        model=options.model,
        prompt_version=PROMPT_VERSION,
        constrained=options.constrained,
        test_set=options.test_set,
        seed=options.seed,
        top_p=options.top_p,
        pairs=[_tally(match, options, asking) for match in matches],
        usage=Usage(
            num_requests=sum(len(found.answers) for found in judgements),
            prompt_tokens=sum(found.prompt_tokens or 0 for found in judgements),
            completion_tokens=sum(found.completion_tokens or 0 for found in judgements),
        ),
        stopped=asking.stopped,
        first_error=asking.first_error,
    )


def _tally(match: Match, options: JudgeOptions, asking: Asking) -> PairRates:
    scores: list[tuple[float, float]] = []
    reasons = Counter[str]()
    for one, other in match.prompts:
        first, second = both_orders(match, one, other, options)
        missing = _reason(first, asking) or _reason(second, asking)
        if missing is not None:
            reasons[missing] += 1
            continue
        shown_first = asking.judgements[first.key].verdict
        shown_second = asking.judgements[second.key].verdict
        scores.append((_SCORE_OF_A[str(shown_first)], 1 - _SCORE_OF_A[str(shown_second)]))
    for label, number in ((match.b, match.only_a), (match.a, match.only_b)):
        if number:
            reasons[f"no response of {label}"] = number
    return pair_rates(
        match.a,
        match.b,
        scores,
        not_judged=dict(reasons),
        num_empty=(
            sum(not one.response.strip() for one, _ in match.prompts),
            sum(not other.response.strip() for _, other in match.prompts),
        ),
    )


def _reason(question: Question, asking: Asking) -> str | None:
    """Why a question has no verdict; None: it has one."""
    if question.key in asking.judgements:
        return None if asking.judgements[question.key].verdict is not None else NO_VERDICT
    return asking.failed.get(question.key, NOT_ASKED)


def _check_pairs(pairs: Sequence[tuple[str, str]], responses: Mapping[str, Path]) -> None:
    if not pairs:
        raise ConfigError("found no pair to judge, expected at least one; name two methods")
    for number, (a, b) in enumerate(pairs):
        unknown = [label for label in (a, b) if label not in responses]
        if unknown:
            raise ConfigError(
                f"pair {a} - {b}: no responses of {unknown[0]!r}; expected some of {', '.join(responses)}"
            )
        if a == b or {a, b} in [set(pair) for pair in pairs[:number]]:
            raise ConfigError(f"pair {a} - {b}: expected two different methods, and each pair once; leave it out")


def _check_output(folder: Path, pairs: Sequence[tuple[str, str]], options: JudgeOptions) -> None:
    """Refuse a folder whose win rates this call would replace by others."""
    path = win_rates_path(folder)
    if not path.exists():
        return
    found = WinRates.read(path)
    expected = options.model_dump(include={"model", "constrained", "test_set", "seed", "top_p"})
    expected["prompt_version"] = PROMPT_VERSION
    for name, there in found.model_dump(include=set(expected)).items():
        if there != (now := expected[name]):
            raise RunFolderError(
                f"{path}: holds win rates of {name} {there}, expected {now}; name another folder. Nothing was changed"
            )
    for pair in found.pairs:
        if (pair.a, pair.b) not in [tuple(wanted) for wanted in pairs]:
            raise RunFolderError(
                f"{path}: holds the pair {pair.a} - {pair.b} too, which this call would leave out; name it too (no "
                "verdict is asked for twice), or another folder. Nothing was changed"
            )
