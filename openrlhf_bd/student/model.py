"""The student as DeepSpeed trains it: a Hugging Face causal language model that gives logits only where a loss asks.

Shapes: B rows, L positions of a row, S states, H hidden size, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from openrlhf_bd.config import Config
from openrlhf_bd.errors import ConfigError, DataError
from openrlhf_bd.student.strategy import PARAM_DTYPES, BellmanStrategy
from openrlhf_bd.upstream import has_flash_attention

# Families whose logits are the output embedding of the decoder's last hidden state and nothing else.
FAMILIES = ("gpt2", "llama", "opt", "qwen2", "qwen3")
# Its implementation makes its own attention mask, so position ids cannot tell packed rows apart.
FAMILIES_WITHOUT_PACKING = ("opt",)


class StudentModel(nn.Module):
    """A causal language model whose forward pass gives logits at chosen states only.

    Attributes:
        model: the Hugging Face model; its own forward pass is not used.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def hidden_states(
        self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor | None, state_index_S: Tensor
    ) -> Tensor:
        """Hidden states before the output head, [S, H], at positions of the flattened input. Gradient flows."""
        output = self.model.base_model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        )
        return output.last_hidden_state.flatten(0, 1).index_select(0, state_index_S)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor | None, state_index_S: Tensor
    ) -> Tensor:
        """Logits at the chosen states.

        Args:
            input_ids: token ids, [B, L]; packed rows are [1, L].
            position_ids: position of each token in its own row, [B, L].
            attention_mask: 1 on tokens and 0 on padding, [B, L]; None for packed rows or without padding.
            state_index_S: positions in the flattened input whose logits are wanted, [S].

        Returns:
            Logits [S, V], fp32. Gradient flows.
        """
        hidden_SH = self.hidden_states(input_ids, position_ids, attention_mask, state_index_S)
        return self.model.get_output_embeddings()(hidden_SH).float()


def refuse_model_code(folder: str | Path, *, trust_remote_code: bool) -> None:
    """Refuse a model folder that brings Python code, before any loader sees it.

    Raises:
        DataError: the folder has *.py files or an auto_map, and remote code is off.
    """
    path = Path(folder)
    if trust_remote_code or not path.is_dir():
        return
    code = sorted(file.name for file in path.rglob("*.py"))
    configs = [path / "config.json", path / "tokenizer_config.json"]
    code += [f"auto_map in {file.name}" for file in configs if file.exists() and "auto_map" in _read_json(file)]
    if code:
        raise DataError(
            f"{folder}: the model brings Python code ({', '.join(code)}), which would run on this machine. Use a model "
            "without code, or add --trust_remote_code if you trust its authors"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error})") from error
    return dict(values)


def attention_implementation(config: Config) -> str:
    """--ds.attn_implementation, where auto takes flash attention if it is installed and knows the parameters' type."""
    if config.ds.attn_implementation != "auto":
        return config.ds.attn_implementation
    return "flash_attention_2" if has_flash_attention() and config.ds.param_dtype != "fp32" else "sdpa"


def load_student(config: Config, strategy: BellmanStrategy) -> StudentModel:
    """The student of --actor.model_name_or_path, without dropout, ready for `strategy.prepare`.

    Under ZeRO-3 each rank loads its own part.

    Raises:
        ConfigError: no model is named, or the family or a pair of options is not supported.
        DataError: the model's folder is missing, damaged, or brings code.
    """
    name = config.actor.model_name_or_path
    if name is None:
        raise ConfigError("--actor.model_name_or_path is missing: it names the student, a Hugging Face model or folder")
    refuse_model_code(name, trust_remote_code=config.trust_remote_code)
    try:
        hf_config = AutoConfig.from_pretrained(name, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise DataError(f"{name}: no student model could be loaded there ({error})") from error
    _check_family(hf_config, config)
    _turn_off_dropout(hf_config)
    with _zero3_loading(strategy):
        model = AutoModelForCausalLM.from_pretrained(
            name,
            config=hf_config,
            trust_remote_code=config.trust_remote_code,
            attn_implementation=attention_implementation(config),
            dtype=PARAM_DTYPES[config.ds.param_dtype],
            use_safetensors=True,
        )
    if config.actor.gradient_checkpointing_enable:
        reentrant = config.actor.gradient_checkpointing_reentrant
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return StudentModel(model)


def _check_family(hf_config: PreTrainedConfig, config: Config) -> None:
    family = hf_config.model_type
    if family not in FAMILIES:
        raise ConfigError(
            f"{config.actor.model_name_or_path}: student family {family!r} is not supported; one of "
            f"{', '.join(FAMILIES)} is needed (Qwen2.5 is qwen2)"
        )
    if config.ds.packing_samples and family in FAMILIES_WITHOUT_PACKING:
        raise ConfigError(
            f"--ds.packing_samples: packed rows of the family {family!r} would see each other "
            f"({config.actor.model_name_or_path}); leave the option away"
        )


def _turn_off_dropout(hf_config: PreTrainedConfig) -> None:
    """Distillation fits a fixed target, and a resumed run must repeat itself: no dropout anywhere."""
    for name, value in hf_config.to_dict().items():
        if ("dropout" in name or name.endswith("pdrop") or name == "layerdrop") and isinstance(value, float):
            setattr(hf_config, name, 0.0)


@contextmanager
def _zero3_loading(strategy: BellmanStrategy) -> Iterator[None]:
    """Under ZeRO-3, let `from_pretrained` hand each rank only its part of the weights."""
    if strategy.stage != 3:
        yield
        return
    hf_deepspeed_config = HfDeepSpeedConfig(strategy.get_ds_train_config())
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del hf_deepspeed_config


def context_length(model: StudentModel) -> int:
    """Longest row that the student can read, tokens."""
    return int(model.model.config.max_position_embeddings)


def vocabulary_size(model: StudentModel) -> int:
    """Number of logits of a state."""
    return int(model.model.config.vocab_size)


def state_dict_of(engine: Any, *, zero_stage: int) -> dict[str, Tensor]:
    """Weights under their Hugging Face names, on CPU; under ZeRO-3 whole on rank 0 and empty elsewhere. Collective.

    Tied weights share memory, so that they are written once.

    Args:
        engine: DeepSpeed engine around a StudentModel.
        zero_stage: its ZeRO stage.
    """
    weights = engine._consolidated_16bit_state_dict() if zero_stage == 3 else engine.module.state_dict()
    copies: dict[tuple[int, torch.Size], Tensor] = {}
    named: dict[str, Tensor] = {}
    for name, tensor in (weights or {}).items():
        key = (tensor.data_ptr(), tensor.shape)
        named[name.removeprefix("model.")] = copies.setdefault(key, tensor.detach().cpu())
    return named
