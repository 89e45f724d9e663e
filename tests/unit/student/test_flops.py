"""Operations of a step, counted by hand."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig, PreTrainedConfig

from openrlhf_bd.student.flops import (
    ModelCounts,
    count_model,
    known_peak,
    measured_tflops,
    peak_tflops,
    step_flops,
)
from openrlhf_bd.student.model import StudentModel

COUNTS = ModelCounts(
    decoder_parameters=1000,
    trained_decoder_parameters=1000,
    head_parameters=300,
    head_is_trained=True,
    num_layers=2,
    attention_width=8,
)


def test_operations_of_a_step() -> None:
    """Two rows of 3 and 4 tokens, 5 states: 6 per weight and token, 6 per head weight and state, causal attention."""
    # 6 * 1000 * 7 = 42000; 6 * 300 * 5 = 9000; 6 * 2 layers * 8 * (9 + 16) = 2400
    assert step_flops(COUNTS, num_tokens=7, num_states=5, sum_squared_lengths=25) == 42_000 + 9_000 + 2_400


def test_attention_is_half_of_the_full_square() -> None:
    """One row of n tokens costs 12 L W n operations a token in full attention; a causal mask leaves half of them."""
    n = 50
    nothing_else = ModelCounts(0, 0, 0, True, num_layers=3, attention_width=16)
    full = 12 * 3 * 16 * n * n
    assert step_flops(nothing_else, num_tokens=n, num_states=n, sum_squared_lengths=n * n) == full / 2


def test_frozen_weights_need_no_gradient_of_their_own() -> None:
    """With adapters a frozen weight costs 4 operations a token instead of 6."""
    # decoder: 900 frozen and 100 trained; (900 * 4 + 100 * 6) * 7 = 29400; head frozen: 300 * 4 * 5 = 6000
    lora = ModelCounts(1000, 100, 300, False, num_layers=0, attention_width=0)
    assert step_flops(lora, num_tokens=7, num_states=5, sum_squared_lengths=25) == 29_400 + 6_000


LLAMA = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 50,
}
# A layer: queries and outputs 8 * 8 each, keys and values 8 * 4 each, feed-forward 3 * 8 * 12, two norms of 8;
# 128 + 64 + 288 + 16 = 496; two layers and the last norm: 1000.
LLAMA_DECODER = 1000


@pytest.mark.parametrize("tied", [True, False])
def test_counts_of_a_llama(tied: bool) -> None:
    """Embedding tables and the output embedding are no part of the decoder, tied or not, before and after wrapping."""
    model = AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA, tie_word_embeddings=tied))
    expected = ModelCounts(LLAMA_DECODER, LLAMA_DECODER, 8 * 50, True, num_layers=2, attention_width=8)
    assert count_model(model) == expected
    assert count_model(StudentModel(model).model) == expected


@pytest.mark.parametrize(
    ("config", "decoder"),
    [
        # A layer: 8*24+24 + 8*8+8 + 8*32+32 + 32*8+8 + 2*16 = 872; the last norm 16
        (GPT2Config(n_embd=8, n_layer=2, n_head=2, n_positions=16, vocab_size=50), 2 * 872 + 16),
        # A layer: 4*(64+8) + 8*12+12 + 12*8+8 + 2*16 = 532; projections 4*8 in and 8*4 out; the last norm 16
        (
            OPTConfig(
                hidden_size=8,
                ffn_dim=12,
                num_hidden_layers=2,
                num_attention_heads=2,
                vocab_size=50,
                word_embed_proj_dim=4,
                max_position_embeddings=16,
            ),
            2 * 532 + 64 + 16,
        ),
    ],
    ids=["gpt2", "opt"],
)
def test_learned_positions_are_looked_up(config: PreTrainedConfig, decoder: int) -> None:
    """Positions that are a table do not count; OPT's projections to and from narrower embeddings do."""
    counts = count_model(AutoModelForCausalLM.from_config(config))
    width = config.word_embed_proj_dim if config.model_type == "opt" else 8
    assert (counts.decoder_parameters, counts.head_parameters) == (decoder, 50 * width)


def test_peak_of_known_devices() -> None:
    """A GPU is found by a part of its name, the more special one first; half precision has its own peak."""
    assert known_peak("NVIDIA H100 80GB HBM3", torch.bfloat16) == 989
    assert known_peak("NVIDIA H100 PCIe", torch.float16) == 756
    assert known_peak("NVIDIA H200", torch.float32) == 67
    assert known_peak("NVIDIA A100-SXM4-80GB", torch.bfloat16) == 312
    assert known_peak("NVIDIA L40S", torch.bfloat16) == 362
    assert known_peak("NVIDIA RTX A1000", torch.bfloat16) is None
    assert known_peak("Some other card", torch.bfloat16) is None


def test_peak_that_is_given_or_measured() -> None:
    """What the user gives counts; a CPU's is measured, and is a sensible number."""
    cpu = torch.device("cpu")
    assert peak_tflops(cpu, torch.float32, given=1.5) == 1.5
    assert 1e-4 < measured_tflops(cpu, torch.float32) < 100
