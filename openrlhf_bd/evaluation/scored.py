"""Responses of a student to one test set, scored: what goes into the evaluation's files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from openrlhf_bd.config import Config
from openrlhf_bd.evaluation.checker import Checker
from openrlhf_bd.evaluation.results import DatasetResult, DatasetScores, Exposure, Sample, SavedResponse
from openrlhf_bd.evaluation.scores import Response, SeedScores, score_seed
from openrlhf_bd.records import Prompt

if TYPE_CHECKING:
    from openrlhf_bd.engines.actor import Completion


@dataclass(frozen=True, slots=True)
class TestData:
    """A test set as it is evaluated.

    Attributes:
        prompts: at least one.
        config: with the keys of this set's records.
        num_dropped: records that were left out because their prompt was over the limit.
    """

    __test__ = False  # no class of tests, whatever pytest makes of its name

    prompts: Sequence[Prompt]
    config: Config
    num_dropped: int = 0


@dataclass(frozen=True, slots=True)
class ScoredResponses:
    """The responses of one sampler to one test set, and their scores; lists have an entry for each seed.

    Attributes:
        name: of the test set.
        dataset: name of these scores in results.
        test: its prompts and their keys.
        top_p: nucleus of the sampler.
        references: of each prompt, some may have none; None where there is only a checker.
        responses: to each prompt.
        by_seed: their scores.
    """

    name: str
    dataset: str
    test: TestData
    top_p: float
    references: list[list[str]] | None
    responses: list[list[Response]]
    by_seed: list[SeedScores]

    @staticmethod
    def of(
        name: str,
        test: TestData,
        completions: Sequence[Sequence[Completion]],
        *,
        dataset: str,
        references: list[list[str]] | None,
        top_p: float,
        tokenizer: PreTrainedTokenizerBase,
        checker: Checker | None,
    ) -> ScoredResponses:
        """Decode and score the completions of each seed, one to each prompt."""
        responses = [decode_responses(answers, tokenizer) for answers in completions]
        records = [prompt.record for prompt in test.prompts]
        by_seed = [score_seed(answers, records, references, checker) for answers in responses]
        return ScoredResponses(name, dataset, test, top_p, references, responses, by_seed)

    def result(self, teacher_nll: list[float] | None, exposure: Exposure | None) -> DatasetResult:
        """Everything about these responses, with what other models said of them."""
        saved = self._saved()
        return DatasetResult(self._scores(teacher_nll, exposure), self._samples(saved), saved)

    def _scores(self, teacher_nll: list[float] | None, exposure: Exposure | None) -> DatasetScores:
        options = self.test.config.eval
        rouge_l = [scores.rouge_l for scores in self.by_seed if scores.rouge_l is not None]
        accuracy = [scores.accuracy for scores in self.by_seed if scores.accuracy is not None]
        return DatasetScores(
            num_prompts=len(self.test.prompts),
            seeds=list(options.seeds),
            rouge_l=rouge_l or None,
            accuracy=accuracy or None,
            teacher_nll=teacher_nll,
            response_tokens=[scores.response_tokens for scores in self.by_seed],
            stop_rate=[scores.stop_rate for scores in self.by_seed],
            distinct_1=[scores.distinct_1 for scores in self.by_seed],
            distinct_2=[scores.distinct_2 for scores in self.by_seed],
            temperature=options.temperature,
            top_p=self.top_p,
            test_set=self.name,
            num_unscored=sum(not found for found in self.references or []),
            num_dropped=self.test.num_dropped,
            exposure=exposure,
        )

    def _saved(self) -> list[SavedResponse]:
        """All responses, those of one seed after the other."""
        data = self.test.config.data
        return [
            SavedResponse(
                test_set=self.name,
                prompt_id=prompt.prompt_id,
                seed=seed,
                top_p=self.top_p,
                instruction=_shown(prompt.record.get(data.input_key)),
                input=_shown(prompt.record.get(data.context_key)) if data.context_key else "",
                references=[] if self.references is None else self.references[i],
                response=answers[i].text,
                num_tokens=answers[i].num_tokens,
                finish_reason=answers[i].finish_reason,
                rouge_l=None if scores.rouge_l_B is None else scores.rouge_l_B[i],
                correct=None if scores.correct_B is None else scores.correct_B[i],
            )
            for seed, answers, scores in zip(self.test.config.eval.seeds, self.responses, self.by_seed, strict=True)
            for i, prompt in enumerate(self.test.prompts)
        ]

    def _samples(self, saved: Sequence[SavedResponse]) -> list[Sample]:
        """Of the first seed, the responses to show."""
        shown = [saved[i] for i in example_indices(len(self.test.prompts), self.test.config.eval.num_examples)]
        return [
            Sample(
                dataset=self.dataset,
                instruction=response.instruction,
                input=response.input,
                reference=response.references[0] if len(response.references) == 1 else response.references or None,
                response=response.response,
                rouge_l=response.rouge_l,
                correct=response.correct,
            )
            for response in shown
        ]


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


def _shown(value: Any) -> str:
    """A value of a record, for people: a conversation as JSON."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
