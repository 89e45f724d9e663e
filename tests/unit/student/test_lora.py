"""Adapters: where they go, where they start, and that merging is exact and leaves the live model alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from openrlhf_bd.config import Config
from openrlhf_bd.errors import ConfigError
from openrlhf_bd.student.lora import adaptable_modules, add_adapters, merged_weights, save_adapter

SIZES: dict[str, Any] = {"vocab_size": 97, "bos_token_id": 0, "eos_token_id": 1}
SHAPE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, **SIZES}
GROUPED: dict[str, Any] = {**SHAPE, "num_key_value_heads": 1, "intermediate_size": 48}
# MLP and attention projections; OPT's narrow embedding adds two.
SWIGLU = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
FAMILIES: dict[str, tuple[PreTrainedConfig, list[str]]] = {
    "gpt2": (GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **SIZES), ["c_attn", "c_fc", "c_proj"]),
    "opt": (
        OPTConfig(**SHAPE, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=16),
        ["fc1", "fc2", "k_proj", "out_proj", "project_in", "project_out", "q_proj", "v_proj"],
    ),
    "llama": (LlamaConfig(**GROUPED), SWIGLU),
    "qwen2": (Qwen2Config(**GROUPED, tie_word_embeddings=True), SWIGLU),
    "qwen3": (Qwen3Config(**GROUPED, head_dim=16), SWIGLU),
}
IDS = torch.arange(2, 12)[None]


def config_of(folder: Path | str = "model", **lora: Any) -> Config:
    return Config.model_validate(
        {"actor": {"model_name_or_path": str(folder)}, "ds": {"lora": {"rank": 3, "alpha": 6, **lora}}}
    )


def model_of(family: str) -> PreTrainedModel:
    torch.manual_seed(1)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(FAMILIES[family][0])
    return model.eval()


def train_a_little(model: nn.Module) -> None:
    """Adapters that do something: B starts at 0."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_B" in name:
                parameter.normal_(0.0, 0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_layers_but_the_head(family: str) -> None:
    """all-linear gives every linear layer an adapter and the output head none; nothing else is trained."""
    model = model_of(family)
    assert adaptable_modules(model) == FAMILIES[family][1]
    before = model(IDS).logits
    add_adapters(model, config_of())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in trained} == set(FAMILIES[family][1])
    assert type(model.get_output_embeddings()) is nn.Linear
    torch.testing.assert_close(model(IDS).logits, before, rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_and_saved_models_are_the_live_one(family: str, tmp_path: Path) -> None:
    """Merged weights in a plain model, and base with saved adapter, give the live logits; no live weight changes."""
    base = model_of(family)
    base.save_pretrained(tmp_path / "base")
    model, config = model_of(family), config_of(tmp_path / "base")
    add_adapters(model, config)
    train_a_little(model)
    live = model(IDS).logits
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = {name: tensor.clone() for name, tensor in weights.items()}

    plain = model_of(family)
    plain.load_state_dict(merged_weights(model, weights), strict=True)
    torch.testing.assert_close(plain(IDS).logits, live, rtol=0, atol=1e-5)
    save_adapter(model, weights, config, tmp_path / "adapter")
    torch.testing.assert_close(
        PeftModel.from_pretrained(base, tmp_path / "adapter")(IDS).logits, live, rtol=0, atol=1e-5
    )
    assert (plain(IDS).logits - model_of(family)(IDS).logits).abs().max() > 1e-3
    assert all(torch.equal(weights[name], before[name]) for name in before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_merge_by_hand() -> None:
    """W + (alpha / r) B A, transposed where the layer keeps inputs first: alpha / r = 6 / 3 = 2."""
    model = model_of("gpt2")
    add_adapters(model, config_of())
    train_a_little(model)
    weights = model.state_dict()
    name = "transformer.h.1.mlp.c_fc"
    lora_A, lora_B = (weights[f"{name}.lora_{part}.default.weight"] for part in "AB")
    expected = weights[f"{name}.base_layer.weight"] + 2.0 * (lora_B @ lora_A).T
    torch.testing.assert_close(merged_weights(model, weights)[f"{name}.weight"], expected)


def test_start_depends_on_the_seed_alone() -> None:
    """Adapters start the same whatever was drawn before, and adding them draws nothing from the global generator."""
    first, second = model_of("qwen2"), model_of("qwen2")
    add_adapters(first, config_of())
    torch.manual_seed(123)
    add_adapters(second, config_of())
    drawn = torch.rand(())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    torch.manual_seed(123)
    assert torch.equal(torch.rand(()), drawn)


def test_adapter_file_is_small(tmp_path: Path) -> None:
    """Of the weights only the adapters are in the adapter's file, named as peft names them."""
    model = model_of("llama")
    add_adapters(model, config_of(target_modules=["q_proj"]))
    save_adapter(model, model.state_dict(), config_of(target_modules=["q_proj"]), tmp_path / "adapter")
    assert sorted(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == [
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{part}.weight"
        for layer in (0, 1)
        for part in "AB"
    ]


@pytest.mark.parametrize("names", [["lm_head"], ["embed_tokens"], ["q_prj"], ["q_proj", "all-linear"], []])
def test_wrong_target_modules(names: list[str]) -> None:
    """Layers that are not there, embeddings and the output head are refused, with the names that can be given."""
    with pytest.raises(
        ConfigError, match=r"--ds\.lora\.target_modules.*expected all-linear alone, or some of down_proj"
    ):
        add_adapters(model_of("qwen2"), config_of(target_modules=names))


def test_rank_0_changes_nothing() -> None:
    """Without a rank all weights are trained, and merging is the identity."""
    model = model_of("qwen2")
    add_adapters(model, config_of(rank=0))
    assert all(parameter.requires_grad for parameter in model.parameters())
    weights = model.state_dict()
    assert merged_weights(model, weights).keys() == weights.keys()
