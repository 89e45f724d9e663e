"""Models of known shapes with random weights, and the arithmetic that a step of theirs needs."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedConfig, PreTrainedModel, Qwen2Config

# Standard deviation of the teacher's logits. With normal logits and 50,257 tokens, sets of p = 0.95 hold 7 tokens on
# average and sets of p = 0.8 hold 3, about as those of real teachers do; weights as initialised would give 45,000.
TEACHER_LOGIT_STD = 9.0
INITIAL_STD = 0.02

# Products of matrices a second that a data sheet promises, bf16, dense.
DATA_SHEET_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


def _gpt2(hidden: int, layers: int, heads: int) -> GPT2Config:
    return GPT2Config(
        n_embd=hidden, n_layer=layers, n_head=heads, n_positions=1024, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0
    )


def _qwen2(hidden: int, layers: int, heads: int, feed_forward: int, *, tied: bool) -> Qwen2Config:
    return Qwen2Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2,
        intermediate_size=feed_forward,
        vocab_size=151_936,
        tie_word_embeddings=tied,
        max_position_embeddings=32_768,
        rope_theta=1e6,
    )


# The paper's pairs, and its smallest one (GPT-2 1.5B -> 120M) at half and at a quarter of its widths and depths.
SHAPES: dict[str, PreTrainedConfig] = {
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "gpt2-half": _gpt2(384, 6, 6),
    "gpt2-xl-half": _gpt2(800, 24, 10),
    "gpt2-quarter": _gpt2(192, 3, 3),
    "gpt2-xl-quarter": _gpt2(400, 12, 5),
    "qwen2.5-0.5b": _qwen2(896, 24, 14, 4864, tied=True),
    "qwen2.5-3b": _qwen2(2048, 36, 16, 11_008, tied=True),
}


def new_model(
    shape: str, *, seed: int, device: torch.device, attention: str = "sdpa", liger: bool = False
) -> PreTrainedModel:
    """A causal language model with random weights, the same for the same seed; fp32 on CPU, bf16 on CUDA.

    Args:
        shape: a name of SHAPES.
        seed: of the weights.
        device: where it lies.
        attention: attention implementation, by its name in transformers.
        liger: Liger's kernels for norms, rotary positions and feed-forward layers.
    """
    torch.manual_seed(seed)
    with device:
        model = AutoModelForCausalLM.from_config(
            SHAPES[shape], dtype=parameter_type(device), attn_implementation=attention
        )
    if liger:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False)
    return model


def new_teacher(shape: str, *, seed: int, device: torch.device, liger: bool = False) -> PreTrainedModel:
    """A frozen model whose distributions are as peaked as a teacher's, not as flat as those of random weights."""
    model = new_model(shape, seed=seed, device=device, liger=liger).eval().requires_grad_(False)
    final_norm(model).weight.fill_(TEACHER_LOGIT_STD / (INITIAL_STD * hidden_size(model) ** 0.5))
    return model


def parameter_type(device: torch.device) -> torch.dtype:
    """Type of parameters: bf16 on CUDA; fp32 on CPUs, most of which are slower with bf16."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def final_norm(model: PreTrainedModel) -> nn.Module:
    """The norm whose output the head reads."""
    decoder: Any = model.base_model
    norm: nn.Module = decoder.ln_f if model.config.model_type == "gpt2" else decoder.norm
    return norm


def hidden_size(model: PreTrainedModel) -> int:
    """Width of the hidden states."""
    return int(model.get_output_embeddings().weight.shape[1])


def num_parameters(model: PreTrainedModel) -> int:
    """Parameters, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def decoder_flops(model: PreTrainedModel, lengths: list[int]) -> float:
    """Floating-point operations of the decoder's forward pass over rows: matrix products and causal attention.

    Args:
        model: its head and embeddings do not count.
        lengths: tokens of each row, without padding.
    """
    embeddings = {id(module.weight) for module in model.base_model.modules() if isinstance(module, nn.Embedding)}
    weights = sum(p.numel() for p in model.base_model.parameters() if p.dim() == 2 and id(p) not in embeddings)
    config = model.config
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    return 2.0 * weights * sum(lengths) + 4.0 * pairs * config.num_hidden_layers * config.hidden_size


def head_flops(model: PreTrainedModel, num_states: int) -> float:
    """Floating-point operations of one product of hidden states with the output embedding."""
    vocab_size, hidden = model.get_output_embeddings().weight.shape
    return 2.0 * num_states * vocab_size * hidden


def peak_flops(device: torch.device) -> float:
    """Operations a second: of a known GPU by its data sheet; else what one large matrix product reaches here."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = [value for key, value in DATA_SHEET_FLOPS.items() if key in name]
        if known:
            return known[0]
    size = 2048
    x_NN = torch.randn(size, size, device=device, dtype=parameter_type(device))
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        x_NN @ x_NN
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2.0 * size**3 / min(seconds)
