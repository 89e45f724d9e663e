"""Evaluation of a student through its engines: sample, score, and compare by several seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from openrlhf_bd.config import Config
from openrlhf_bd.errors import ConfigError, DataError
from openrlhf_bd.evaluation.checker import Checker
from openrlhf_bd.evaluation.results import DatasetResult, Exposure
from openrlhf_bd.evaluation.sampling import make_requests, sample_responses, score_by_teacher
from openrlhf_bd.evaluation.scored import ScoredResponses, TestData, decode_responses
from openrlhf_bd.evaluation.scores import mean_nll, references_of, score_seed
from openrlhf_bd.records import Prompt, Rollout

if TYPE_CHECKING:
    from openrlhf_bd.engines.actor import Completion

# Called with the work that has just been finished, counted in responses.
OnProgress = Callable[[int], None]


class Meter(Protocol):
    """Measures the exposure of the model that is evaluated (`evaluation.exposure`)."""

    def measure(
        self,
        test_set: str,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Completion]],
        on_progress: OnProgress | None,
    ) -> Exposure:
        """Measures over the responses to one test set, those of one seed after the other."""


def evaluate_test_sets(
    engines: Sequence[Any],
    tests: Mapping[str, TestData],
    *,
    top_ps: Sequence[float],
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    checker: Checker | None = None,
    teacher: Any | None = None,
    meter: Meter | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, DatasetResult]:
    """Answer the prompts of several test sets once a seed by each sampler, and score the responses.

    All test sets and seeds of one sampler go to the engines together, so that these are full until the last responses.

    Args:
        engines: actor handles of `GenerationEngine` that host the student.
        tests: test sets by name.
        top_ps: nuclei of the samplers.
        config: `eval.seeds`, `eval.temperature`, `eval.max_new_tokens`, `eval.num_examples`, `data.max_len`,
            `cluster.generate_timeout_s`.
        tokenizer: of the student.
        checker: exact verdict on a response, or None.
        teacher: actor handle of `TeacherEngine` that scores the responses, or None.
        meter: measures exposure where temperature and nucleus are 1, or None.
        on_progress: called with the number of responses just sampled, scored or measured; `num_units` is what they
            come to in all.

    Returns:
        Results by `score_name`, all test sets of the first nucleus first.

    Raises:
        ConfigError: there is neither `data.label_key` nor a checker, so nothing could be scored.
        DataError: no prompt, a reference that is no text, or a prompt that leaves no room for a response.
        ClusterError: an engine died or did not answer in time.
    """
    references = {name: _references(test, name, checker) for name, test in tests.items()}
    results = {}
    for top_p in top_ps:
        sampled = _sample(engines, tests, seeds=config.eval.seeds, top_p=top_p, config=config, on_progress=on_progress)
        for name, test in tests.items():
            completions = sampled[name]
            nll = None
            if teacher is not None:
                nll = _teacher_nll(teacher, test.prompts, completions, config, on_progress)
            exposure = None
            if meter is not None and is_plain_sampling(config, top_p):
                exposure = meter.measure(name, test.prompts, completions, on_progress)
            dataset = score_name(name, top_p, top_ps)
            scored = ScoredResponses.of(
                name,
                test,
                completions,
                dataset=dataset,
                references=references[name],
                top_p=top_p,
                tokenizer=tokenizer,
                checker=checker,
            )
            results[dataset] = scored.result(nll, exposure)
    return results


def evaluate_model(
    engines: Sequence[Any],
    prompts: Sequence[Prompt],
    *,
    dataset_name: str,
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    checker: Checker | None = None,
    teacher: Any | None = None,
    top_p: float | None = None,
    on_progress: OnProgress | None = None,
) -> DatasetResult:
    """`evaluate_test_sets` of one test set by one sampler.

    Args:
        engines, config, tokenizer, checker, teacher, on_progress: see there; `data.input_key`, `data.context_key`,
            `data.label_key` are those of the records.
        prompts: of the test set.
        dataset_name: name of the test set in results.
        top_p: nucleus of the sampler; None: `eval.top_p`.

    Raises:
        ConfigError, DataError, ClusterError: see there.
    """
    (result,) = evaluate_test_sets(
        engines,
        {dataset_name: TestData(prompts, config)},
        top_ps=[config.eval.top_p if top_p is None else top_p],
        config=config,
        tokenizer=tokenizer,
        checker=checker,
        teacher=teacher,
        on_progress=on_progress,
    ).values()
    return result


def score_name(test_set: str, top_p: float, top_ps: Sequence[float]) -> str:
    """Name of a test set's scores: its own under the first nucleus, "dolly, top-p 0.8" under the others."""
    return test_set if top_p == top_ps[0] else f"{test_set}, top-p {top_p:g}"


def is_plain_sampling(config: Config, top_p: float) -> bool:
    """Whether responses are drawn from the model's own distribution, which is what exposure is about."""
    return config.eval.temperature == 1.0 and top_p == 1.0


def num_units(
    num_prompts: int, *, config: Config, teacher: bool, top_ps: Sequence[float] = (1.0,), exposure: bool = False
) -> int:
    """What `on_progress` counts up to on a test set: responses sampled, scored by the teacher, and measured.

    Args:
        num_prompts: of the test set.
        config: `eval.seeds`, `eval.temperature`.
        teacher: whether the teacher scores the responses.
        top_ps: nuclei of the samplers.
        exposure: whether exposure is measured: over the student's responses, and as many of the teacher's.
    """
    times = len(top_ps) * (2 if teacher else 1)
    times += sum(2 for top_p in top_ps if exposure and is_plain_sampling(config, top_p))
    return num_prompts * len(config.eval.seeds) * times


def validate(
    engines: Sequence[Any],
    prompts: Sequence[Prompt],
    *,
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    checker: Checker | None = None,
) -> dict[str, float]:
    """Scores for selection while training: one seed, the first of `eval.seeds`, no teacher.

    Args:
        engines: actor handles of `GenerationEngine` that host the student.
        prompts: validation prompts.
        config: as in `evaluate_model`.
        tokenizer: of the student.
        checker: exact verdict on a response, or None.

    Returns:
        rouge_l (0 to 100, where records have references), accuracy (0 to 1, where there is a checker),
        response_tokens, stop_rate.

    Raises:
        ConfigError, DataError, ClusterError: as in `evaluate_model`.
    """
    test = TestData(prompts, config)
    references = _references(test, "validation", checker)
    seeds, top_p = config.eval.seeds[:1], config.eval.top_p
    completions = _sample(engines, {"validation": test}, seeds=seeds, top_p=top_p, config=config)["validation"]
    responses = decode_responses(completions[0], tokenizer)
    scores = score_seed(responses, [prompt.record for prompt in prompts], references, checker)
    found = {
        "rouge_l": scores.rouge_l,
        "accuracy": scores.accuracy,
        "response_tokens": scores.response_tokens,
        "stop_rate": scores.stop_rate,
    }
    return {name: value for name, value in found.items() if value is not None}


def _references(test: TestData, name: str, checker: Checker | None) -> list[list[str]] | None:
    """References of each prompt; None where there is only a checker."""
    if not test.prompts:
        raise DataError(f"data set {name!r}: found no prompt to evaluate, expected at least one")
    label_key = test.config.data.label_key
    if label_key is None and checker is None:
        raise ConfigError(
            f"data set {name!r} cannot be scored: found neither --data.label_key (Rouge-L against references) "
            "nor --eval.checker (accuracy); set at least one of them"
        )
    return None if label_key is None else [references_of(prompt, label_key) for prompt in test.prompts]


def _sample(
    engines: Sequence[Any],
    tests: Mapping[str, TestData],
    *,
    seeds: Sequence[int],
    top_p: float,
    config: Config,
    on_progress: OnProgress | None = None,
) -> dict[str, list[list[Completion]]]:
    """Responses to each test set, those of one seed after the other."""
    requests_of = partial(make_requests, max_new_tokens=config.eval.max_new_tokens, max_len=config.data.max_len)
    requests = [
        request for test in tests.values() for seed in seeds for request in requests_of(test.prompts, seed=seed)
    ]
    completions = iter(
        sample_responses(
            engines,
            requests,
            temperature=config.eval.temperature,
            top_p=top_p,
            timeout_s=config.cluster.generate_timeout_s,
            on_progress=on_progress,
        )
    )
    return {name: [[next(completions) for _ in test.prompts] for _ in seeds] for name, test in tests.items()}


def _teacher_nll(
    teacher: Any,
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[Completion]],
    config: Config,
    on_progress: OnProgress | None,
) -> list[float]:
    """The teacher's negative log-likelihood of each seed's responses, nats a token."""
    rollouts = [
        Rollout(f"{prompt.prompt_id}:{seed}", prompt.token_ids, completion.token_ids, completion.finish_reason)
        for seed, answers in zip(config.eval.seeds, completions, strict=True)
        for prompt, completion in zip(prompts, answers, strict=True)
    ]
    scored = score_by_teacher(
        teacher,
        rollouts,
        [*prompts] * len(completions),
        timeout_s=config.cluster.generate_timeout_s,
        on_progress=on_progress,
    )
    logprobs = [np.asarray(rollout.logprobs_T, dtype=np.float32) for rollout in scored]
    return [mean_nll(logprobs[start : start + len(prompts)]) for start in range(0, len(logprobs), len(prompts))]
