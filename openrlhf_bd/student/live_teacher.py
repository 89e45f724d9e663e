"""The teacher in a student's rank: a frozen model that gives its logits at the states of pre-training text (kd_ratio)
and of rows (kd_support full).

It computes with whole weights on every rank, whatever the student's ZeRO stage is.
"""

# V the student's vocabulary, H the teacher's hidden size, P states of the text

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from openrlhf_bd.config import Config
from openrlhf_bd.data.micro_batches import TokenBatch
from openrlhf_bd.errors import ConfigError
from openrlhf_bd.functional.head import StudentHead
from openrlhf_bd.student.attention import PER_ROW_SDPA
from openrlhf_bd.student.loading import read_model_config
from openrlhf_bd.student.model import FAMILIES, StudentModel

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LiveTeacher:
    """A frozen teacher over the student's vocabulary.

    The two share a tokenizer, and their embeddings may be padded to different sizes. The teacher's ids that the student
    does not have never count: its distribution is the one over the student's ids. Where the student has more, the
    teacher gives the others no probability.

    Args:
        model: on the device where it computes.
        vocab_size: V.
    """

    def __init__(self, model: StudentModel, vocab_size: int) -> None:
        self._model = model.requires_grad_(False).eval()
        self._output = model.model.get_output_embeddings()
        self._whole = self._output.weight, self._output.bias
        self.fit(vocab_size)

    def fit(self, vocab_size: int) -> None:
        """Give it another vocabulary; heads that it gave before keep theirs."""
        self._output.weight, self._output.bias = _fitted(*self._whole, vocab_size)

    @torch.no_grad()
    def head(self, tokens: TokenBatch) -> StudentHead:
        """The teacher's logits at the states of a batch, [P, V]. No gradient flows."""
        arguments = (tokens.input_ids, tokens.position_ids, tokens.attention_mask, tokens.state_index_S)
        return self._model.head(self._model(*arguments, None))


def _fitted(
    weight: nn.Parameter, bias: nn.Parameter | None, vocab_size: int
) -> tuple[nn.Parameter, nn.Parameter | None]:
    """An output embedding cut to a vocabulary, or padded with ids of no probability."""
    missing = vocab_size - len(weight)
    if missing <= 0:
        return _frozen(weight[:vocab_size]), None if bias is None else _frozen(bias[:vocab_size])
    known = weight.new_zeros(len(weight)) if bias is None else bias
    return (
        _frozen(torch.cat([weight, weight.new_zeros(missing, weight.shape[1])])),
        _frozen(torch.cat([known, known.new_full((missing,), float("-inf"))])),
    )


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)


def load_live_teacher(config: Config, *, vocab_size: int, device: torch.device) -> LiveTeacher:
    """The teacher of --teacher.model_name_or_path, in --teacher.dtype.

    Args:
        config: options of the job.
        vocab_size: the student's.
        device: of this rank.

    Raises:
        ConfigError: no teacher is named, or its family is not supported.
        DataError: the model's folder is missing, damaged, or brings code.
    """
    name = config.teacher.model_name_or_path
    if name is None:
        raise ConfigError("--teacher.model_name_or_path is missing; it names the teacher that the student's ranks hold")
    hf_config = read_model_config(name, config, role="teacher")
    check_live_teacher(hf_config.model_type, config)
    model = AutoModelForCausalLM.from_pretrained(
        name,
        config=hf_config,
        trust_remote_code=config.trust_remote_code,
        attn_implementation=PER_ROW_SDPA,  # takes any type of weights
        dtype=teacher_dtype(config, device),
        use_safetensors=True,
    )
    return LiveTeacher(StudentModel(model).to(device), vocab_size)


def check_live_teacher(family: str, config: Config) -> None:
    """Refuse a teacher whose logits may be more than its output embedding makes of its last hidden state.

    Raises:
        ConfigError: the family is not supported.
    """
    if family not in FAMILIES:
        raise ConfigError(
            f"--teacher.model_name_or_path {config.teacher.model_name_or_path}: models of type {family} cannot be the "
            f"teacher that the student's ranks hold; expected one of {', '.join(FAMILIES)}, or neither "
            "--algo.distill.kd_ratio above 0 nor --algo.distill.kd_support full"
        )


def teacher_dtype(config: Config, device: torch.device) -> torch.dtype | str:
    """--teacher.dtype, where auto is the checkpoint's own type on GPUs and float32 on CPUs, as in the engines."""
    if config.teacher.dtype == "auto":
        return "auto" if device.type == "cuda" else torch.float32
    return _DTYPES[config.teacher.dtype]
