"""Teacher and student side by side in one process, for measures over the whole vocabulary at each other's states."""

# S states, T tokens of one response

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from openrlhf_bd.config import Config
from openrlhf_bd.data.micro_batches import collate
from openrlhf_bd.errors import ConfigError
from openrlhf_bd.evaluation.exposure import ResponseRow, RowMeasures
from openrlhf_bd.functional.exposure import state_measures
from openrlhf_bd.functional.head import StudentHead
from openrlhf_bd.records import Rollout
from openrlhf_bd.student.attention import PER_ROW_SDPA
from openrlhf_bd.student.live_teacher import LiveTeacher, teacher_dtype
from openrlhf_bd.student.loading import read_model_config
from openrlhf_bd.student.model import FAMILIES, StudentModel, vocabulary_size

# Tokens of one forward pass of each model.
MICRO_BATCH_TOKENS = 8192


class ExposureModels:
    """The teacher, and one student at a time. A plain class: an actor hosts it.

    Distributions are over the ids that both embeddings have: an engine samples ids that no tokenizer knows too. Logits
    and sums are float32 (float64 where the weights are), whatever the weights' type.

    Args:
        config: `teacher.model_name_or_path`, `teacher.dtype`, `eval.exposure_top_p`, `trust_remote_code`.

    Raises:
        ConfigError: the teacher's family is not supported.
        DataError: a model cannot be read.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        teacher = self._read(
            str(config.teacher.model_name_or_path), teacher_dtype(config, self._device), role="teacher"
        )
        self._num_teacher_ids = vocabulary_size(teacher)
        self._teacher = LiveTeacher(teacher, self._num_teacher_ids)
        self._student: LiveTeacher | None = None

    def ready(self) -> bool:
        """Answers once the teacher is loaded."""
        return True

    def load(self, model: str) -> None:
        """Take another student.

        Args:
            model: folder, or name on the hub.
        """
        self._student = None  # give its memory back first
        dtype: torch.dtype | str = "auto" if self._device.type == "cuda" else torch.float32
        student = self._read(model, dtype, role="student")
        num_ids = min(self._num_teacher_ids, vocabulary_size(student))
        self._teacher.fit(num_ids)
        self._student = LiveTeacher(student, num_ids)

    def measure(self, rows: Sequence[ResponseRow]) -> list[RowMeasures]:
        """Measures at every token of some responses, in their order."""
        assert self._student is not None, "load a student first"
        return [
            measures
            for part in _micro_batches(rows)
            for measures in compare(
                self._student, self._teacher, part, top_p=self._config.eval.exposure_top_p, device=self._device
            )
        ]

    def _read(self, name: str, dtype: torch.dtype | str, *, role: str) -> StudentModel:
        hf_config = read_model_config(name, self._config, role=role)
        check_exposed(name, hf_config.model_type)
        model = AutoModelForCausalLM.from_pretrained(
            name,
            config=hf_config,
            trust_remote_code=self._config.trust_remote_code,
            attn_implementation=PER_ROW_SDPA,
            dtype=dtype,
            use_safetensors=True,
        )
        return StudentModel(model).to(self._device)


def compare(
    student: LiveTeacher, teacher: LiveTeacher, rows: Sequence[ResponseRow], *, top_p: float, device: torch.device
) -> list[RowMeasures]:
    """Measures at every token of the responses of one forward pass of each model.

    Args:
        student: over the same ids as the teacher.
        teacher: frozen.
        rows: responses, packed into one sequence.
        top_p: p of the teacher's sets.
        device: where the models are.
    """
    taken_S = torch.cat([torch.from_numpy(row.response_ids).long() for row in rows]).to(device)
    own = _head(student, [_rollout(row, of_teacher=False) for row in rows], device)
    other = _head(teacher, [_rollout(row, of_teacher=True) for row in rows], device)
    found = state_measures(own, other, taken_S, top_p=top_p)
    lengths = [len(row.response_ids) for row in rows]
    columns: list[tuple[Tensor, ...]] = [
        column.cpu().split(lengths)
        for column in (found.forward_kl_S, found.reverse_kl_S, found.teacher_nll_S, found.outside_S)
    ]
    return [RowMeasures(*(part.numpy() for part in parts)) for parts in zip(*columns, strict=True)]


def check_exposed(name: str, family: str) -> None:
    """Refuse a model whose logits may be more than its output embedding makes of its last hidden state.

    Raises:
        ConfigError: the family is not supported.
    """
    if family not in FAMILIES:
        raise ConfigError(
            f"--eval.exposure: {name} is of type {family}; expected one of {', '.join(FAMILIES)}. Leave it "
            "away (--eval.teacher_nll works with every type)"
        )


def _head(model: LiveTeacher, rollouts: Sequence[Rollout], device: torch.device) -> StudentHead:
    return model.head(collate(rollouts, layout="packed", with_sets=False).tokens.to(device))


def _rollout(row: ResponseRow, *, of_teacher: bool) -> Rollout:
    prompt_ids = row.teacher_prompt_ids if of_teacher else row.prompt_ids
    return Rollout("response", prompt_ids, row.response_ids, "length")


def _micro_batches(rows: Sequence[ResponseRow]) -> Iterator[list[ResponseRow]]:
    """Consecutive rows of at most MICRO_BATCH_TOKENS tokens; one that is longer is alone."""
    part: list[ResponseRow] = []
    num_tokens = 0
    for row in rows:
        length = max(len(row.prompt_ids), len(row.teacher_prompt_ids)) + len(row.response_ids)
        if part and num_tokens + length > MICRO_BATCH_TOKENS:
            yield part
            part, num_tokens = [], 0
        part.append(row)
        num_tokens += length
    if part:
        yield part
