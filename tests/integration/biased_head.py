"""A model whose output embedding has a bias, as no family's has, and a process that trains it on a DeepSpeed rank."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from student_runs import (
    VOCAB,
)
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
)

from openrlhf_bd.config import Config
from openrlhf_bd.functional.head import StudentHead
from openrlhf_bd.student.model import StudentModel, state_dict_of
from openrlhf_bd.student.strategy import make_strategy

IDS = torch.arange(2, 26).view(2, 12)
TARGET_S = torch.arange(24) % VOCAB


def with_bias() -> PreTrainedModel:
    """No family's head has a bias, and an embedding may have one."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            vocab_size=VOCAB,
        )
    )
    biased = torch.nn.Linear(32, VOCAB)
    biased.weight = model.get_output_embeddings().weight
    model.set_output_embeddings(biased)
    return model


def cross_entropy(head: StudentHead) -> Tensor:
    return -head.log_prob(TARGET_S).mean()


def biased_steps(rank: int, port: int, zero_stage: int, folder: Path) -> None:
    """One of two processes that train the model with a bias for three steps, each on a row of its own."""
    addresses = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in addresses.items()}
    settings = {"param_dtype": "fp32", "zero_stage": zero_stage}
    strategy = make_strategy(Config.model_validate({"actor": {"max_norm": 0.0}, "ds": settings}))
    strategy.setup_distributed()
    options = {
        "optim": "adam",
        "adam": {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-4, "weight_decay": 0.0},
        "lr_scheduler": "constant",
        "lr_warmup_ratio": 0.0,
        "min_lr_ratio": 0.0,
        "max_norm": 0.0,
        "scheduler_steps": 3,
    }
    engine, optimizer, scheduler = strategy.prepare((StudentModel(with_bias()), options))
    mine = slice(rank * 12, rank * 12 + 12)

    def loss(head: StudentHead) -> Tensor:
        return -head.log_prob(TARGET_S[mine]).mean()

    for _ in range(3):
        output = engine(IDS[rank : rank + 1], torch.arange(12)[None], None, torch.arange(12), loss)
        strategy.backward(output, engine)
        strategy.optimizer_step(optimizer, engine, scheduler)
    weights = state_dict_of(engine, zero_stage=zero_stage)
    if rank == 0:
        torch.save(weights, folder / "weights.pt")
    torch.distributed.destroy_process_group()
