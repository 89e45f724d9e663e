"""Loading the student for DeepSpeed: refusals, dropout, attention, and ZeRO-3's partitioned loading."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from openrlhf_bd.config import Config
from openrlhf_bd.errors import ConfigError, DataError
from openrlhf_bd.student.attention import PER_ROW_SDPA
from openrlhf_bd.student.liger import apply_liger, check_liger
from openrlhf_bd.student.lora import add_adapters
from openrlhf_bd.student.model import FAMILIES, StudentModel
from openrlhf_bd.student.strategy import PARAM_DTYPES, BellmanStrategy
from openrlhf_bd.upstream import has_flash_attention, is_cpu


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


def read_model_config(name: str, config: Config, *, role: str) -> PreTrainedConfig:
    """Configuration of a model that brings no code.

    Args:
        name: folder, or name on the hub.
        config: options of the job.
        role: student or teacher, for messages.

    Raises:
        DataError: the model's folder is missing, damaged, or brings code.
    """
    refuse_model_code(name, trust_remote_code=config.trust_remote_code)
    try:
        hf_config: PreTrainedConfig = AutoConfig.from_pretrained(name, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise DataError(f"{name}: no {role} model could be loaded there ({error})") from error
    return hf_config


def attention_implementation(config: Config) -> str:
    """--ds.attn_implementation as transformers knows it.

    auto takes flash attention if it is installed and knows the parameters' type, else sdpa; sdpa goes through packed
    rows one by one (student.attention).
    """
    name = config.ds.attn_implementation
    if name == "auto":
        name = "flash_attention_2" if has_flash_attention() and config.ds.param_dtype != "fp32" else "sdpa"
    return PER_ROW_SDPA if name == "sdpa" else name


def check_attention(config: Config, family: str) -> None:
    """Refuse an --ds.attn_implementation that cannot train this family as the options say.

    Raises:
        ConfigError: flex_attention on CPUs, flash attention of fp32, or packed rows of a family that would see each
            other.
    """
    name = config.ds.attn_implementation
    if name.startswith("flash_attention") and config.ds.param_dtype == "fp32":
        raise ConfigError(
            f"--ds.attn_implementation {name} with --ds.param_dtype fp32: its kernels compute bf16 and fp16 alone; use "
            "sdpa, or another type of parameters"
        )
    if name == "flex_attention" and is_cpu():
        raise ConfigError(
            "--ds.attn_implementation flex_attention: PyTorch has no backward pass of it on CPUs; use sdpa"
        )
    # Its implementation makes the mask without position ids, which is how these two tell packed rows apart.
    if config.ds.packing_samples and family == "opt" and name in ("eager", "flex_attention"):
        raise ConfigError(
            f"--ds.packing_samples with --ds.attn_implementation {name}: packed rows of the family 'opt' would see "
            "each other; use sdpa or flash_attention_2"
        )


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
    hf_config = read_model_config(name, config, role="student")
    check_family(hf_config.model_type, config)
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
    if config.ds.use_liger_kernel:
        apply_liger(model)
    if config.actor.gradient_checkpointing_enable:
        reentrant = config.actor.gradient_checkpointing_reentrant
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    add_adapters(model, config)
    return StudentModel(model)


def check_family(family: str, config: Config) -> None:
    """Refuse a family that cannot be a student, or cannot be one with these options.

    Args:
        family: `model_type` of the student's configuration.
        config: options of the job.

    Raises:
        ConfigError: with the option to change.
    """
    if family not in FAMILIES:
        raise ConfigError(
            f"--actor.model_name_or_path {config.actor.model_name_or_path}: student family {family!r} is not "
            f"supported; one of {', '.join(FAMILIES)} is needed (Qwen2.5 is qwen2)"
        )
    check_attention(config, family)
    check_liger(config, family, on_cpu=is_cpu())
    if config.actor.optim == "muon" and family == "gpt2":
        raise ConfigError(
            "--actor.optim muon: DeepSpeed tells embeddings by their names, and takes those of gpt2 for hidden "
            "matrices; use --actor.optim adam"
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
