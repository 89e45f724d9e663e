"""What an evaluation found, and its files: `evaluation.json` of a run folder, and every response beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from openrlhf_bd.errors import ConfigError, DataError
from openrlhf_bd.store.files import write_text, writing

EVALUATION_FILE = "evaluation.json"
RESPONSES_FILE = "responses.jsonl"
# Scores of DatasetScores and measures of Exposure that have one value a seed.
_SCORES = ("rouge_l", "accuracy", "teacher_nll", "response_tokens", "stop_rate", "distinct_1", "distinct_2")
_MEASURES = ("forward_kl", "reverse_kl", "teacher_nll", "out_of_set_rate")


class Sample(BaseModel):
    """One response, for people to read.

    Attributes:
        dataset: name of the test set.
        instruction: what was asked.
        input: further input of the instruction, may be empty.
        reference: reference response or responses; None where the records have none.
        response: the student's text.
        rouge_l: 0 to 100; None without a reference.
        correct: verdict of the checker; None without one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: str
    instruction: str
    input: str
    reference: str | list[str] | None
    response: str
    rouge_l: float | None
    correct: bool | None


class SavedResponse(BaseModel):
    """One response and its scores: a line of `responses.jsonl`.

    Attributes:
        test_set: name of the test set.
        prompt_id: of the prompt in its test set, the same for every model.
        seed: sampling seed of the evaluation.
        top_p: nucleus of the sampler.
        instruction: what was asked.
        input: further input of the instruction, may be empty.
        references: reference responses; none where the record has none.
        response: the student's text.
        num_tokens: sampled tokens, the stop token included.
        finish_reason: "stop" if it ended by itself, "length" if it was cut.
        rouge_l: 0 to 100; None without a reference.
        correct: verdict of the checker; None without one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    test_set: str
    prompt_id: str
    seed: int
    top_p: float
    instruction: str
    input: str
    references: list[str]
    response: str
    num_tokens: int
    finish_reason: Literal["stop", "length"]
    rouge_l: float | None
    correct: bool | None


class Exposure(BaseModel):
    """How far a student is from its teacher where its own responses lead it (`evaluation.exposure`).

    Lists of the first four hold one value a seed; curves are over all seeds, one value for each of `positions`.

    Attributes:
        top_p: p of the teacher's candidate sets.
        forward_kl: KL(teacher || student) at the states of the student's own responses, nats a token.
        reverse_kl: KL(student || teacher) there, nats a token.
        teacher_nll: the teacher's negative log-likelihood of the student's tokens, nats a token.
        out_of_set_rate: share of the student's tokens outside the teacher's top-p set, 0 to 1.
        positions: places in a response, counted from 1, up to which there are responses of both.
        forward_kl_student_T: mean forward KL at each position, over the student's responses that reach it, nats.
        forward_kl_teacher_T: the same over the teacher's responses to the same prompts.
        reach_student_T: share of the student's responses that reach each position, 0 to 1.
        reach_teacher_T: the same of the teacher's.
        excess_error_T: excess accumulated error up to each position, %.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    top_p: float
    forward_kl: list[float]
    reverse_kl: list[float]
    teacher_nll: list[float]
    out_of_set_rate: list[float]
    positions: list[int]
    forward_kl_student_T: list[float]
    forward_kl_teacher_T: list[float]
    reach_student_T: list[float]
    reach_teacher_T: list[float]
    excess_error_T: list[float]

    @model_validator(mode="after")
    def _curves_have_one_length(self) -> Exposure:
        for name in Exposure.model_fields:
            if name.endswith("_T") and len(getattr(self, name)) != len(self.positions):
                raise ValueError(f"{name} has another length than the {len(self.positions)} positions")
        return self


class DatasetScores(BaseModel):
    """Scores of one student on one test set by one sampler: lists hold one value a seed, in the order of `seeds`.

    Attributes:
        num_prompts: prompts, each answered once a seed.
        seeds: sampling seeds.
        rouge_l: mean Rouge-L, 0 to 100; None without references.
        accuracy: share of responses that the checker accepts, 0 to 1; None without a checker.
        teacher_nll: the teacher's negative log-likelihood of the responses, nats a token; None without a teacher.
        response_tokens: mean length of the responses, tokens, the stop token included.
        stop_rate: share of responses that end with a stop token, 0 to 1.
        distinct_1: different words over all words of the responses, 0 to 1; None where it was not computed.
        distinct_2: the same of pairs of neighbouring words.
        temperature: of the sampler; None where it is not known.
        top_p: nucleus of the sampler; None where it is not known.
        test_set: name of the test set alone; None where it is that of the scores.
        num_unscored: prompts without a reference, which count in all scores but Rouge-L.
        num_dropped: records whose prompt was over the limit, which nobody answered.
        exposure: measures at the student's own states; None where they were not asked for.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_prompts: int
    seeds: list[int]
    rouge_l: list[float] | None
    accuracy: list[float] | None = None
    teacher_nll: list[float] | None = None
    response_tokens: list[float]
    stop_rate: list[float]
    distinct_1: list[float] | None = None
    distinct_2: list[float] | None = None
    temperature: float | None = None
    top_p: float | None = None
    test_set: str | None = None
    num_unscored: int = 0
    num_dropped: int = 0
    exposure: Exposure | None = None

    @model_validator(mode="after")
    def _one_value_a_seed(self) -> DatasetScores:
        lists = {name: self.values(name) for name in _SCORES}
        if self.exposure is not None:
            lists |= {f"exposure.{name}": getattr(self.exposure, name) for name in _MEASURES}
        for name, values in lists.items():
            if values is not None and len(values) != len(self.seeds):
                raise ValueError(f"{name} has {len(values)} values, expected one for each of {len(self.seeds)} seeds")
        return self

    def values(self, name: str) -> list[float] | None:
        """The values of one score by name, one a seed."""
        values: list[float] | None = getattr(self, name)
        return values


@dataclass(frozen=True, slots=True)
class DatasetResult:
    """Scores on one test set by one sampler, a few responses to show, and all of them."""

    scores: DatasetScores
    samples: list[Sample]
    responses: list[SavedResponse]


class Evaluation(BaseModel):
    """The evaluation of one student.

    Attributes:
        label: name of the method in tables, such as "bd:robust".
        model: path of the student.
        datasets: scores by name of the test set; the sampler's nucleus is part of a name where there are several.
        samples: responses to show; the same prompts for every method on the same data.
        fingerprint: of the model's configuration and weights; None where it is not known.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    label: str
    model: str
    datasets: dict[str, DatasetScores]
    samples: list[Sample] = []
    fingerprint: str | None = None

    @staticmethod
    def from_results(
        label: str, model: str, results: Mapping[str, DatasetResult], *, fingerprint: str | None = None
    ) -> Evaluation:
        """Put the results on several test sets together."""
        return Evaluation(
            label=label,
            model=model,
            datasets={name: result.scores for name, result in results.items()},
            samples=[sample for result in results.values() for sample in result.samples],
            fingerprint=fingerprint,
        )

    def write(self, path: Path) -> None:
        """Write `evaluation.json` in one step: a reader sees the old file or the whole new one.

        Args:
            path: the run folder, or a file name that ends in `.json`.
        """
        file_path = evaluation_path(path)
        file_path.parent.mkdir(parents=True, exist_ok=True)
        write_text(file_path, json.dumps(self.model_dump(), indent=1, ensure_ascii=False) + "\n")

    @staticmethod
    def read(path: Path) -> Evaluation:
        """Read `evaluation.json` from a run folder, or the named file.

        Raises:
            DataError: the file is missing or is no evaluation.
        """
        file_path = evaluation_path(path)
        try:
            return Evaluation.model_validate(json.loads(file_path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise DataError(
                f"{file_path}: not found, expected an evaluation; run `openrlhf-bd evaluate` first"
            ) from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise DataError(f"{file_path}: no JSON ({error}); evaluate the run again") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the document"
            raise DataError(
                f"{file_path}: {where}: {first['msg']}; expected the form that `openrlhf-bd evaluate` writes"
            ) from error


def evaluation_path(path: Path) -> Path:
    """The evaluation file of a run folder; a path that ends in `.json` is the file itself."""
    return path if path.suffix == ".json" else path / EVALUATION_FILE


def labelled_paths(folder: Path, labels: Iterable[str]) -> dict[str, Path]:
    """The evaluation file of each of several models in a folder: `<slug of the label>.json`.

    Raises:
        ConfigError: two labels would have one file.
    """
    found: dict[str, Path] = {}
    for label in labels:
        path = folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', label).strip('-.') or 'model'}.json"
        clash = next((other for other, taken in found.items() if taken.name.lower() == path.name.lower()), None)
        if clash is not None:
            raise ConfigError(
                f"models {clash!r} and {label!r} would both have the file {path.name}; give one of them another label"
            )
        found[label] = path
    return found


def responses_path(path: Path) -> Path:
    """The file of all responses beside an evaluation: `responses.jsonl`, of `LABEL.json` `LABEL.responses.jsonl`."""
    file_path = evaluation_path(path)
    prefix = "" if file_path.name == EVALUATION_FILE else f"{file_path.stem}."
    return file_path.with_name(prefix + RESPONSES_FILE)


def write_responses(path: Path, responses: Iterable[SavedResponse]) -> None:
    """Write all responses beside an evaluation, in one step.

    Args:
        path: as of `Evaluation.write`.
        responses: in the order in which they are to stand there.
    """
    file_path = responses_path(path)
    file_path.parent.mkdir(parents=True, exist_ok=True)
    with writing(file_path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(response.model_dump_json() + "\n" for response in responses)


def read_responses(path: Path) -> list[SavedResponse]:
    """Read the responses beside an evaluation.

    Args:
        path: the run folder, the evaluation's file, or the file of the responses itself.

    Raises:
        DataError: the file is missing, or a line is no response; the message names the line.
    """
    file_path = path if path.suffix == ".jsonl" else responses_path(path)
    try:
        lines = file_path.read_bytes().splitlines()
    except FileNotFoundError:
        raise DataError(
            f"{file_path}: not found, expected the responses of an evaluation; run `openrlhf-bd evaluate` first"
        ) from None
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(SavedResponse.model_validate_json(line))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the line"
            raise DataError(
                f"{file_path}:{number}: {where}: {first['msg']}; expected a response as `openrlhf-bd evaluate` writes "
                "it. Evaluate the model again"
            ) from error
    return found
