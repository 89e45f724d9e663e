"""The output head under DeepSpeed: any embedding, whole or partitioned, gets the gradient that torch gives."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from biased_head import IDS, biased_steps, cross_entropy, with_bias
from student_runs import (
    STOP,
    VOCAB,
    Material,
    assert_same_training,
    job,
    on_ranks,
    plain_loop,
    save_model,
    start,
    train,
)
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from openrlhf_bd.config import Config
from openrlhf_bd.functional.head import DenseHead
from openrlhf_bd.upstream import RayActorGroup

pytestmark = pytest.mark.integration

TOKENS = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": STOP, "pad_token_id": None}
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, **TOKENS}
GROUPED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 1, "max_position_embeddings": 64}
MODELS: dict[str, PreTrainedConfig] = {
    "gpt2, tied": GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **TOKENS),
    "qwen2, tied": Qwen2Config(**GROUPED, tie_word_embeddings=True),
    "qwen2, untied": Qwen2Config(**GROUPED, tie_word_embeddings=False),
    "qwen3, tied": Qwen3Config(**GROUPED, head_dim=16, tie_word_embeddings=True),
    "llama, untied": LlamaConfig(**GROUPED, tie_word_embeddings=False),
    "opt, tied, projected": OPTConfig(**SIZES, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=16),
}


def head_job(model: Path, material: Material, **ds: Any) -> Config:
    # With Adam's usual epsilon a gradient that is 0 but for rounding, as that of a key's bias, would move a weight as
    # far as any other.
    return job(material, "head", model=model, actor={"adam": {"lr": 1e-2, "eps": 1e-4}}, ds=ds)


@pytest.fixture(scope="module", params=MODELS)
def model_and_reference(
    request: pytest.FixtureRequest, material: Material
) -> tuple[Path, list[dict[str, float]], dict[str, torch.Tensor]]:
    """A model of each kind, and what a plain torch loop makes of it."""
    folder = save_model(MODELS[request.param], material.folder / request.param.replace(", ", "-"))
    metrics, trained = plain_loop(head_job(folder, material), material)
    return folder, metrics, trained.state_dict()


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_losses_and_weights_are_those_of_plain_torch(
    zero_stage: int,
    model_and_reference: tuple[Path, list[dict[str, float]], dict[str, torch.Tensor]],
    two_ranks: RayActorGroup,
    material: Material,
) -> None:
    """Losses, gradient norms and final weights equal a plain loop's, whatever the stage, family and tying."""
    folder, expected, weights = model_and_reference
    start(two_ranks, head_job(folder, material, zero_stage=zero_stage), material)
    assert_same_training(train(two_ranks), expected)
    saved = material.folder / f"{folder.name}-after-{zero_stage}"
    on_ranks(two_ranks, "save_hf", str(saved))
    found = AutoModelForCausalLM.from_pretrained(saved).state_dict()
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(
            found[name], weight, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_bias_of_the_embedding(zero_stage: int, tmp_path: Path) -> None:
    """An embedding with a bias trains to the weights that plain torch gives, in every stage."""
    model = with_bias()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-4, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        cross_entropy(DenseHead(model(IDS).logits.flatten(0, 1))).backward()
        optimizer.step()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(biased_steps, (port, zero_stage, tmp_path), nprocs=2)
    found = torch.load(tmp_path / "weights.pt", weights_only=True)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-5, msg=lambda text, name=name: name + text)
