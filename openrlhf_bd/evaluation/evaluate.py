"""Evaluation of a student through its engines: sample, score, and compare by several seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from openrlhf_bd.config import Config
from openrlhf_bd.errors import ConfigError, DataError
from openrlhf_bd.evaluation.checker import Checker
from openrlhf_bd.evaluation.results import DatasetResult, DatasetScores, Sample
from openrlhf_bd.evaluation.sampling import make_requests, sample_responses, score_by_teacher
from openrlhf_bd.evaluation.scores import Response, SeedScores, mean_nll, references_of, score_seed
from openrlhf_bd.records import Prompt, Rollout

if TYPE_CHECKING:
    from openrlhf_bd.engines.actor import Completion

# Called with the work that has just been finished, counted in responses.
OnProgress = Callable[[int], None]


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
    """Answer every prompt once a seed and score the responses.

    Args:
        engines: actor handles of `GenerationEngine` that host the student.
        prompts: P prompts of one test set.
        dataset_name: name of the test set in results.
        config: `eval.seeds`, `eval.temperature`, `eval.top_p`, `eval.max_new_tokens`, `eval.num_examples`,
            `data.max_len`, `data.input_key`, `data.context_key`, `data.label_key`, `cluster.generate_timeout_s`.
        tokenizer: of the student.
        checker: exact verdict on a response, or None.
        teacher: actor handle of `TeacherEngine` that scores the responses, or None.
        top_p: nucleus of the sampler in the place of `eval.top_p`, or None.
        on_progress: called with the number of responses just sampled; `num_units` is what they come to in all.

    Raises:
        ConfigError: there is neither `data.label_key` nor a checker, so nothing could be scored.
        DataError: no prompt, a prompt without a reference, or one that leaves no room for a response.
        ClusterError: an engine died or did not answer in time.
    """
    references = _references(prompts, dataset_name, config, checker)
    nucleus = config.eval.top_p if top_p is None else top_p
    by_seed: list[SeedScores] = []
    teacher_nll: list[float] = []
    samples: list[Sample] = []
    for seed in config.eval.seeds:
        completions = _sample(engines, prompts, seed=seed, top_p=nucleus, config=config, on_progress=on_progress)
        responses = decode_responses(completions, tokenizer)
        by_seed.append(score_seed(responses, [prompt.record for prompt in prompts], references, checker))
        if teacher is not None:
            teacher_nll.append(_teacher_nll(teacher, prompts, completions, seed, config, on_progress))
        if not samples:
            samples = _samples(dataset_name, prompts, responses, references, by_seed[0], config)
    scores = _dataset_scores(by_seed, teacher_nll or None, num_prompts=len(prompts), top_p=nucleus, config=config)
    return DatasetResult(scores, samples)


def num_units(num_prompts: int, *, config: Config, teacher: bool) -> int:
    """What `on_progress` counts up to in one call of `evaluate_model`: responses sampled and responses scored."""
    return num_prompts * len(config.eval.seeds) * (2 if teacher else 1)


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
    references = _references(prompts, "validation", config, checker)
    completions = _sample(engines, prompts, seed=config.eval.seeds[0], top_p=config.eval.top_p, config=config)
    responses = decode_responses(completions, tokenizer)
    scores = score_seed(responses, [prompt.record for prompt in prompts], references, checker)
    found = {
        "rouge_l": scores.rouge_l,
        "accuracy": scores.accuracy,
        "response_tokens": scores.response_tokens,
        "stop_rate": scores.stop_rate,
    }
    return {name: value for name, value in found.items() if value is not None}


def decode_responses(completions: Sequence[Completion], tokenizer: PreTrainedTokenizerBase) -> list[Response]:
    """Text of each completion, without special tokens and surrounding space."""
    ids = [completion.token_ids.tolist() for completion in completions]
    texts: list[str] = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [
        Response(text.strip(), len(completion.token_ids), completion.finish_reason)
        for text, completion in zip(texts, completions, strict=True)
    ]


def example_indices(num_prompts: int, num_examples: int) -> list[int]:
    """Indices of the prompts whose responses are shown, evenly spread: the same for every method on the same set."""
    count = min(num_prompts, num_examples)
    return [index * num_prompts // count for index in range(count)]


def _references(
    prompts: Sequence[Prompt], dataset_name: str, config: Config, checker: Checker | None
) -> list[str | list[str]] | None:
    if not prompts:
        raise DataError(f"data set {dataset_name!r}: found no prompt to evaluate, expected at least one")
    label_key = config.data.label_key
    if label_key is not None:
        return [references_of(prompt, label_key) for prompt in prompts]
    if checker is None:
        raise ConfigError(
            f"data set {dataset_name!r} cannot be scored: found neither --data.label_key (Rouge-L against references) "
            "nor --eval.checker (accuracy); set at least one of them"
        )
    return None


def _sample(
    engines: Sequence[Any],
    prompts: Sequence[Prompt],
    *,
    seed: int,
    top_p: float,
    config: Config,
    on_progress: OnProgress | None = None,
) -> list[Completion]:
    requests = make_requests(prompts, seed=seed, max_new_tokens=config.eval.max_new_tokens, max_len=config.data.max_len)
    return sample_responses(
        engines,
        requests,
        temperature=config.eval.temperature,
        top_p=top_p,
        timeout_s=config.cluster.generate_timeout_s,
        on_progress=on_progress,
    )


def _teacher_nll(
    teacher: Any,
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    seed: int,
    config: Config,
    on_progress: OnProgress | None,
) -> float:
    rollouts = [
        Rollout(f"{prompt.prompt_id}:{seed}", prompt.token_ids, completion.token_ids, completion.finish_reason)
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    scored = score_by_teacher(
        teacher, rollouts, prompts, timeout_s=config.cluster.generate_timeout_s, on_progress=on_progress
    )
    return mean_nll([np.asarray(rollout.logprobs_T, dtype=np.float32) for rollout in scored])


def _samples(
    dataset_name: str,
    prompts: Sequence[Prompt],
    responses: Sequence[Response],
    references: list[str | list[str]] | None,
    scores: SeedScores,
    config: Config,
) -> list[Sample]:
    input_key, context_key = config.data.input_key, config.data.context_key
    return [
        Sample(
            dataset=dataset_name,
            instruction=str(prompts[i].record.get(input_key, "")),
            input=str(prompts[i].record.get(context_key) or "") if context_key else "",
            reference=None if references is None else references[i],
            response=responses[i].text,
            rouge_l=None if scores.rouge_l_B is None else scores.rouge_l_B[i],
            correct=None if scores.correct_B is None else scores.correct_B[i],
        )
        for i in example_indices(len(prompts), config.eval.num_examples)
    ]


def _dataset_scores(
    by_seed: Sequence[SeedScores],
    teacher_nll: list[float] | None,
    *,
    num_prompts: int,
    top_p: float,
    config: Config,
) -> DatasetScores:
    rouge_l = [scores.rouge_l for scores in by_seed if scores.rouge_l is not None]
    accuracy = [scores.accuracy for scores in by_seed if scores.accuracy is not None]
    return DatasetScores(
        num_prompts=num_prompts,
        seeds=list(config.eval.seeds),
        rouge_l=rouge_l or None,
        accuracy=accuracy or None,
        teacher_nll=teacher_nll,
        response_tokens=[scores.response_tokens for scores in by_seed],
        stop_rate=[scores.stop_rate for scores in by_seed],
        distinct_1=[scores.distinct_1 for scores in by_seed],
        distinct_2=[scores.distinct_2 for scores in by_seed],
        temperature=config.eval.temperature,
        top_p=top_p,
    )
