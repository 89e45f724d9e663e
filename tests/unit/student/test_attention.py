"""Attention of packed rows: the same values and gradients as of each row alone."""

from collections import defaultdict
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, PreTrainedModel, modeling_flash_attention_utils

from openrlhf_bd.student.attention import PER_ROW_SDPA, per_row_attention, rows_of_pack
from tests.unit.student.families import CORNERS, FAMILIES, VOCAB

LENGTHS = (7, 4, 1, 12)


def packed_positions() -> Tensor:
    return torch.cat([torch.arange(length) for length in LENGTHS])[None]


def model_of(name: str, **checkpointing: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config({**FAMILIES, **CORNERS}[name], attn_implementation=PER_ROW_SDPA)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    return model.double().train()


def hidden(model: PreTrainedModel, ids: Tensor, **inputs: Any) -> Tensor:
    return model.base_model(input_ids=ids, use_cache=False, **inputs).last_hidden_state[0]


def gradients(model: PreTrainedModel, hidden_LH: Tensor) -> dict[str, Tensor]:
    weight_LH = torch.randn(hidden_LH.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    (hidden_LH * weight_LH).sum().backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("checkpointing", [{}, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
@pytest.mark.parametrize("name", [*FAMILIES, *CORNERS])
def test_packed_rows_are_what_each_is_alone(name: str, checkpointing: dict[str, bool]) -> None:
    """Hidden states and gradients of packed rows are those of the rows one by one, by transformers' own attention."""
    model = model_of(name, **checkpointing)
    ids = torch.randint(2, VOCAB, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(2))
    positions = packed_positions()
    packed = hidden(model, ids, position_ids=positions, **rows_of_pack(positions, None))
    found = gradients(model, packed)
    model.set_attn_implementation("sdpa")
    alone = torch.cat([hidden(model, row) for row in ids.split(LENGTHS, dim=1)])
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-12)
    expected = gradients(model, alone)
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", [*FAMILIES, *CORNERS])
def test_position_ids_are_enough(name: str) -> None:
    """A caller that packs rows and does not say where they lie still gets rows that do not see each other."""
    model, positions = model_of(name), packed_positions()
    ids = torch.randint(2, VOCAB, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(2))
    expected = hidden(model, ids, position_ids=positions, **rows_of_pack(positions, None))
    torch.testing.assert_close(hidden(model, ids, position_ids=positions), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_mask_of_the_whole_sequence_is_made(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call of PyTorch's attention sees one row, and no mask."""
    seen: list[int] = []

    def watched(query: Tensor, *args: Any, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        assert attn_mask is None
        seen.append(query.shape[2])
        return scaled_dot_product_attention(query, *args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr("openrlhf_bd.student.attention.scaled_dot_product_attention", watched)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    positions = packed_positions()
    hidden(model_of(name), torch.ones_like(positions), position_ids=positions, **rows_of_pack(positions, None))
    assert seen == [*LENGTHS] * 2  # two layers


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_one_length(name: str) -> None:
    """Rows side by side, whose position ids a model makes itself and shares, are what each is alone."""
    model = model_of(name)
    ids = torch.randint(2, VOCAB, (3, 6), generator=torch.Generator().manual_seed(2))
    together = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(together, torch.stack([hidden(model, row[None]) for row in ids]), rtol=0, atol=1e-12)


class TestRowsOfPack:
    def test_packed(self) -> None:
        """Rows begin where position ids are 0; flash attention gets the same, as offsets."""
        rows = rows_of_pack(torch.tensor([[0, 1, 2, 0, 0, 1]]), None)
        assert rows["row_lengths"] == (3, 1, 2)
        assert rows["cu_seq_lens_q"].tolist() == rows["cu_seq_lens_k"].tolist() == [0, 3, 4, 6]
        assert rows["cu_seq_lens_q"].dtype == torch.int32
        assert rows["max_length_q"] == rows["max_length_k"] == 3

    def test_padded(self) -> None:
        """Padded rows are no pack."""
        assert rows_of_pack(torch.arange(4).expand(2, 4), None) == {}
        assert rows_of_pack(torch.arange(4)[None], torch.tensor([[0, 1, 1, 1]])) == {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window", [None, 5])
def test_flash_kernel(window: int | None) -> None:
    """On a GPU the variable-length kernel gives what rows give one by one, with grouped heads and a window."""
    rows = rows_of_pack(packed_positions().cuda(), None)
    module = torch.nn.Module()
    torch.manual_seed(0)
    shapes = ((1, 4, 24, 64), (1, 2, 24, 64), (1, 2, 24, 64))
    exact = [torch.randn(shape, device="cuda").bfloat16().float().requires_grad_() for shape in shapes]
    half = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    expected, _ = per_row_attention(module, *exact, None, scaling=0.1, sliding_window=window, **rows)
    found, _ = per_row_attention(module, *half, None, scaling=0.1, sliding_window=window, **rows)
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=2e-2)
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    (found.float() * weight).sum().backward()
    for mine, reference in zip(half, exact, strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad.float(), reference.grad, rtol=0, atol=1e-1)


@pytest.mark.parametrize("name", FAMILIES)
def test_flash_attention_is_told_the_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' flash path gets the rows of a pack in every family, OPT's too, and needs no mask.

    flash-attn itself has no CPU kernel: a plain loop stands in for its variable-length function.
    """

    def varlen(query: Tensor, key: Tensor, value: Tensor, *, cu_seqlens_q: Tensor, **kwargs: Any) -> Tensor:
        assert kwargs["causal"]
        assert kwargs["max_seqlen_q"] == max(LENGTHS)
        lengths = cu_seqlens_q.diff().tolist()
        rows = zip(*(tensor.transpose(0, 1)[None].split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
        options = {"scale": kwargs["softmax_scale"], "is_causal": True, "enable_gqa": True}
        return torch.cat([scaled_dot_product_attention(*row, **options)[0] for row in rows], dim=1).transpose(0, 1)

    takes = defaultdict(bool, max_seqlen_q=True)
    process = partial(modeling_flash_attention_utils._process_flash_attention_kwargs, supports_mapping=takes)
    monkeypatch.setattr(
        modeling_flash_attention_utils,
        "lazy_import_flash_attention",
        lambda implementation: ((None, varlen, None, None, None), process),
    )
    model, positions = model_of(name), packed_positions()
    ids = torch.randint(2, VOCAB, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(2))
    expected = hidden(model, ids, position_ids=positions, **rows_of_pack(positions, None))
    model.config._attn_implementation = "flash_attention_2"
    found = hidden(model, ids, position_ids=positions, **rows_of_pack(positions, None))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
