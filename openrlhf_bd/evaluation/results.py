"""What an evaluation found, and its file: `evaluation.json` of a run folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from openrlhf_bd.errors import DataError
from openrlhf_bd.store.files import write_text

EVALUATION_FILE = "evaluation.json"


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


class DatasetScores(BaseModel):
    """Scores of one student on one test set: lists hold one value a seed, in the order of `seeds`.

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

    @model_validator(mode="after")
    def _one_value_a_seed(self) -> DatasetScores:
        for name in ("rouge_l", "accuracy", "teacher_nll", "response_tokens", "stop_rate", "distinct_1", "distinct_2"):
            values = self.values(name)
            if values is not None and len(values) != len(self.seeds):
                raise ValueError(f"{name} has {len(values)} values, expected one for each of {len(self.seeds)} seeds")
        return self

    def values(self, name: str) -> list[float] | None:
        """The values of one score by name, one a seed."""
        values: list[float] | None = getattr(self, name)
        return values


@dataclass(frozen=True, slots=True)
class DatasetResult:
    """Scores on one test set, with a few responses."""

    scores: DatasetScores
    samples: list[Sample]


class Evaluation(BaseModel):
    """The evaluation of one student.

    Attributes:
        label: name of the method in tables, such as "bd:robust".
        model: path of the student.
        datasets: scores by name of the test set.
        samples: responses to show; the same prompts for every method on the same data.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    label: str
    model: str
    datasets: dict[str, DatasetScores]
    samples: list[Sample] = []

    @staticmethod
    def from_results(label: str, model: str, results: Mapping[str, DatasetResult]) -> Evaluation:
        """Put the results on several test sets together."""
        return Evaluation(
            label=label,
            model=model,
            datasets={name: result.scores for name, result in results.items()},
            samples=[sample for result in results.values() for sample in result.samples],
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
