"""LoRA: low-rank adapters on a student's linear layers, through peft. Only the adapters are trained.

Adapters are put into the model where its linear layers are, so the model keeps its class, its decoder and its output
head; what a layer's own weight was called `<layer>.weight` is `<layer>.base_layer.weight` then.

Shapes: r rank, I inputs and O outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from openrlhf_bd.config import Config
from openrlhf_bd.errors import ConfigError

ALL_LINEAR = "all-linear"
ADAPTER_FOLDER = "adapter"
_ADAPTER = "default"
_WEIGHTS_FILE = "adapter_model.safetensors"
# How peft names what belongs to a model when it wraps one.
_PEFT_PREFIX = "base_model.model."


def add_adapters(model: PreTrainedModel, config: Config) -> None:
    """Put adapters into a model in place, and leave only them trainable. Nothing happens with --ds.lora.rank 0.

    A layer then computes W x + (alpha / r) B A x. A is drawn from --train.seed, the same on every rank and under every
    ZeRO stage; B starts at 0, so the model starts as the one that was loaded.

    Args:
        model: loaded, not yet prepared by DeepSpeed; its weights may be partitioned.
        config: options of the job.

    Raises:
        ConfigError: a name in --ds.lora.target_modules is no layer that can have an adapter.
    """
    lora = config.ds.lora
    if lora.rank == 0:
        return
    check_target_modules(model, config)
    with torch.random.fork_rng():
        torch.manual_seed(config.train.seed)
        inject_adapter_in_model(_peft_config(model, config), model)
    if config.actor.gradient_checkpointing_enable and config.actor.gradient_checkpointing_reentrant:
        # Reentrant checkpointing gives gradients only where a block's input has one; embeddings are frozen here.
        model.enable_input_require_grads()


def _peft_config(model: nn.Module, config: Config) -> LoraConfig:
    lora = config.ds.lora
    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=config.actor.model_name_or_path,
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=ALL_LINEAR if lora.target_modules == [ALL_LINEAR] else lora.target_modules,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        bias="none",
    )


def adaptable_modules(model: PreTrainedModel) -> list[str]:
    """Last names of the layers that can have adapters, sorted: linear layers, without the output head."""
    head = model.get_output_embeddings()
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | Conv1D) and module is not head
        }
    )


def check_target_modules(model: PreTrainedModel, config: Config) -> None:
    """Refuse target modules that match nothing; peft minds only if none matches.

    Args:
        model: weights are not looked at, so it may be on the meta device.
        config: options of the job.

    Raises:
        ConfigError: with the names that the family knows.
    """
    wanted = config.ds.lora.target_modules
    if wanted == [ALL_LINEAR]:
        return
    known = adaptable_modules(model)
    wrong = [name for name in wanted if name.rpartition(".")[2] not in known or not _is_module(model, name)]
    if wrong or not wanted:
        raise ConfigError(
            f"--ds.lora.target_modules {' '.join(wrong) or 'is empty'}: {config.actor.model_name_or_path} "
            f"({model.config.model_type}) has no such layer that can have an adapter; expected {ALL_LINEAR} alone, or "
            f"some of {', '.join(known)} (embeddings and the output head get none)"
        )


def _is_module(model: nn.Module, name: str) -> bool:
    return any(path == name or path.endswith(f".{name}") for path, _ in model.named_modules())


def check_lora(config: Config) -> None:
    """The checks of `add_adapters` before any process starts, on a model without weights.

    Raises:
        ConfigError: see `check_target_modules`.
    """
    lora = config.ds.lora
    if lora.rank == 0 or lora.target_modules == [ALL_LINEAR]:
        return
    name = str(config.actor.model_name_or_path)
    hf_config = AutoConfig.from_pretrained(name, trust_remote_code=config.trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config, trust_remote_code=config.trust_remote_code)
    check_target_modules(model, config)


def _adapted_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def merged_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A plain model's weights: each adapter added to its layer's weight, under the names that the model was loaded by.

    W' = W + (alpha / r) B A, computed in fp32 and rounded once to W's type. `weights` are not changed.

    Args:
        model: with adapters; only its structure is looked at, its weights may be partitioned.
        weights: its whole weights by name, on CPU; empty gives empty.
    """
    merged = dict(weights)
    for name, layer in _adapted_layers(model) if weights else ():
        base_name = f"{name}.base_layer.weight"
        lora_A_rI = merged.pop(f"{name}.lora_A.{_ADAPTER}.weight")
        lora_B_Or = merged.pop(f"{name}.lora_B.{_ADAPTER}.weight")
        delta_OI = layer.scaling[_ADAPTER] * (lora_B_Or.float() @ lora_A_rI.float())
        base, is_transposed = merged[base_name], isinstance(layer.get_base_layer(), Conv1D)
        merged[base_name] = (base.float() + (delta_OI.T if is_transposed else delta_OI)).to(base.dtype)
    return {name.replace(".base_layer.", "."): tensor for name, tensor in merged.items()}


def save_adapter(model: nn.Module, weights: Mapping[str, Tensor], config: Config, folder: Path) -> None:
    """Write the adapters alone, as `peft.PeftModel.from_pretrained` reads them.

    Args:
        model: with adapters; only its structure is looked at.
        weights: whole weights of the model with adapters, by name.
        config: options of the job.
        folder: to make.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True)
    adapter = {
        _PEFT_PREFIX + name.replace(f".{_ADAPTER}.", "."): tensor.contiguous()
        for name, tensor in weights.items()
        if ".lora_A." in name or ".lora_B." in name
    }
    save_file(adapter, folder / _WEIGHTS_FILE, metadata={"format": "pt"})
    _peft_config(model, config).save_pretrained(str(folder))
