"""How many floating-point operations a training step is worth, and how many this machine could do in that time.

Model FLOP utilisation (Chowdhery et al. 2022, appendix B) counts what the model's mathematics needs, not what is
executed: no recomputation, no padding, no fillers, no second pass over the vocabulary; and the head as a dense model
would compute it, but only at the states that have a loss. A sparse head does less than it is credited with, so a step
can be worth more than it costs.

Needs torch alone. Shapes: N parameters, S states with a loss, V vocabulary, H hidden size.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

TERA = 1e12
# Peak TFLOP/s without sparsity for bf16 or fp16, fp32 through tensor cores, and fp32, by words of the device's name;
# the first that fit count. From the makers' data sheets.
PEAK_TFLOPS = {
    "H100 PCIe": (756.0, 378.0, 51.0),
    "H100 NVL": (835.0, 417.0, 60.0),
    "H100": (989.0, 494.0, 67.0),
    "H200": (989.0, 494.0, 67.0),
    "GH200": (989.0, 494.0, 67.0),
    "H20": (148.0, 74.0, 44.0),
    "A100": (312.0, 156.0, 19.5),
    "A800": (312.0, 156.0, 19.5),
    "A40": (149.7, 74.8, 37.4),
    "A10": (125.0, 62.5, 31.2),
    "L40S": (362.0, 183.0, 91.6),
    "L40": (181.0, 90.5, 90.5),
    "L4": (121.0, 60.0, 30.3),
}
_PRODUCT_SIZE = {"cpu": 768, "cuda": 8192}
_PRODUCTS = 5


@dataclass(frozen=True, slots=True)
class ModelCounts:
    """What the operations of a model's step follow from.

    Attributes:
        decoder_parameters: N_dec, all but the tables that are only looked up in and the output embedding.
        trained_decoder_parameters: those of them with a gradient.
        head_parameters: V H of the output embedding.
        head_is_trained: whether it has a gradient.
        num_layers: attention layers.
        attention_width: heads times head size.
    """

    decoder_parameters: int
    trained_decoder_parameters: int
    head_parameters: int
    head_is_trained: bool
    num_layers: int
    attention_width: int


def count_model(model: Any) -> ModelCounts:
    """Counts of a Hugging Face causal language model, whole or partitioned by ZeRO-3.

    Args:
        model: with `config` and `get_output_embeddings`.
    """
    config, head = model.config, model.get_output_embeddings()
    tables = {id(table.weight) for table in model.modules() if isinstance(table, nn.Embedding)}
    decoder = [
        parameter
        for parameter in model.parameters()
        if id(parameter) not in tables and not any(parameter is own for own in head.parameters())
    ]
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ModelCounts(
        decoder_parameters=sum(_size(parameter) for parameter in decoder),
        trained_decoder_parameters=sum(_size(parameter) for parameter in decoder if parameter.requires_grad),
        head_parameters=_size(head.weight),
        head_is_trained=head.weight.requires_grad,
        num_layers=config.num_hidden_layers,
        attention_width=config.num_attention_heads * head_size,
    )


def _size(parameter: nn.Parameter) -> int:
    # ZeRO-3 leaves an empty tensor and keeps the number of elements beside it.
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def step_flops(counts: ModelCounts, *, num_tokens: int, num_states: int, sum_squared_lengths: int) -> float:
    """Floating-point operations that a step's mathematics needs.

    6 N_dec T + 6 V H S + 6 L_layers W sum_rows len^2

    A weight costs 2 operations a token in the forward pass, 2 for the gradient of its input and 2 for its own, which a
    frozen weight saves. Attention: 12 L W len a token (queries times keys, weights times values, forward and twice
    backward), half of it under the causal mask.

    Args:
        counts: of the model.
        num_tokens: T, prompt, response and pre-training tokens, without padding.
        num_states: S, states whose logits the loss is about.
        sum_squared_lengths: over rows and blocks.
    """
    decoder = 4 * counts.decoder_parameters + 2 * counts.trained_decoder_parameters
    head = (6 if counts.head_is_trained else 4) * counts.head_parameters
    attention = 6 * counts.num_layers * counts.attention_width
    return float(decoder * num_tokens + head * num_states + attention * sum_squared_lengths)


def peak_tflops(device: torch.device, dtype: torch.dtype, *, given: float | None = None) -> float:
    """Peak TFLOP/s of one device: as given, from the table, or that of a large matrix product, measured now.

    A measured product is less than what a data sheet says, so it flatters the utilisation.

    Args:
        device: of this rank.
        dtype: of the student's parameters.
        given: --logger.peak_tflops.
    """
    if given is not None:
        return given
    known = known_peak(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None
    return measured_tflops(device, dtype) if known is None else known


def known_peak(device_name: str, dtype: torch.dtype) -> float | None:
    """The table's value for a GPU by its name, or None."""
    for part, (half, tensor_cores, single) in PEAK_TFLOPS.items():
        if re.search(rf"\b{part}\b", device_name):
            if dtype != torch.float32:
                return half
            return tensor_cores if torch.backends.cuda.matmul.allow_tf32 else single
    return None


def measured_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of the fastest of a few square matrix products of this type, with the threads that training has."""
    size = _PRODUCT_SIZE[device.type]
    factor = torch.ones(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(_PRODUCTS):
        _wait(device)
        started = time.perf_counter()
        torch.mm(factor, factor)
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return 2.0 * size**3 / min(seconds) / TERA


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
