"""Loss and gradient of a global batch do not depend on how it is laid out, cut or divided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from openrlhf_bd.algorithms.base import Algorithm, StepContext
from openrlhf_bd.algorithms.registry import resolve_algorithm
from openrlhf_bd.config import DistillConfig
from openrlhf_bd.data.assignment import Layout, MicroBatchLimit, assign
from openrlhf_bd.data.micro_batches import MicroBatch, collate
from openrlhf_bd.records import RecordedSets, Rollout
from openrlhf_bd.student.attention import PER_ROW_SDPA
from openrlhf_bd.student.loss import MicroBatchLoss
from openrlhf_bd.student.model import StudentModel
from tests.unit.student.families import FAMILIES, VOCAB

STOP = 1
OPTIONS = {
    "robust": DistillConfig(pretrain_coef=0.7, alpha=0.5),
    "paper": DistillConfig(preset="paper", pretrain_coef=0.7, alpha=0.5),
    "sequence mean": DistillConfig(preset="paper", reduction="sequence", include_eos=True),
}


def sets_of(random: np.random.Generator, num_states: int) -> RecordedSets:
    """One to six candidates a state, by descending probability."""
    sizes = random.integers(1, 7, num_states)
    ids, logprobs = [], []
    for size in sizes:
        probability = np.sort(random.dirichlet(np.ones(size + 1)))[::-1][:size]
        ids.append(random.permutation(VOCAB)[:size])
        logprobs.append(np.log(probability))
    masses = [-np.log(np.exp(values).sum()) for values in logprobs]
    return RecordedSets(
        np.concatenate(ids).astype(np.int32),
        np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        np.array(masses, np.float32),
        np.concatenate(logprobs).astype(np.float32),
    )


def rollout(random: np.random.Generator, number: int, *, cut: bool) -> Rollout:
    """A row of 1 to 9 prompt and 1 to 12 response tokens; a cut response has the set of the state after it."""
    num_tokens = int(random.integers(1, 13))
    sets = sets_of(random, num_tokens + cut)
    response = random.integers(2, VOCAB, num_tokens).astype(np.int32)
    # Half of the tokens lie in their sets.
    inside = random.random(num_tokens) < 0.5
    response[inside] = sets.ids_M[sets.offsets[:num_tokens]][inside]
    return Rollout(
        row_id=f"{number}:0",
        prompt_ids=random.integers(2, VOCAB, random.integers(1, 10)).astype(np.int32),
        response_ids=response,
        finish_reason="length" if cut else "stop",
        sets=sets,
    )


@cache
def global_batch() -> tuple[tuple[Rollout, ...], dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    rollouts = tuple(rollout(random, number, cut=number % 3 == 0) for number in range(7))
    return rollouts, {f"block {index}": random.integers(2, VOCAB, 11) for index in range(4)}


@dataclass
class Setup:
    """A student and what its loss needs."""

    student: StudentModel
    algorithm: Algorithm

    def total(self, micro_batches: Sequence[MicroBatch]) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradient of a global batch: the sum over micro-batches, of one rank or of several."""
        rollouts, blocks = global_batch()
        context = StepContext(
            num_tokens=float(sum(len(row.response_ids) for row in rollouts)), num_rows=float(len(rollouts))
        )
        num_targets = float(sum(len(block) - 1 for block in blocks.values()))
        self.student.zero_grad()
        total = 0.0
        for batch in micro_batches:
            tokens = batch.tokens
            loss, _, _ = self.student(
                tokens.input_ids,
                tokens.position_ids,
                tokens.attention_mask,
                tokens.state_index_S,
                MicroBatchLoss(batch, self.algorithm, context, num_targets),
            )
            (batch.weight * loss).backward()
            total += batch.weight * float(loss.detach())
        grads = {name: value.grad.clone() for name, value in self.student.named_parameters() if value.grad is not None}
        return total, grads

    def requires_equal(self, micro_batches: Sequence[MicroBatch], reference: Sequence[MicroBatch]) -> None:
        """Compare loss and gradient in float64: only the order of summation differs."""
        found, found_gradients = self.total(micro_batches)
        expected, expected_gradients = self.total(reference)
        assert found == pytest.approx(expected, rel=1e-10)
        assert found_gradients.keys() == expected_gradients.keys()
        for name, gradient in expected_gradients.items():
            scale = float(gradient.abs().max())
            torch.testing.assert_close(found_gradients[name], gradient, rtol=0, atol=1e-9 * scale + 1e-13, msg=name)


def setup_of(family: str, options: str = "robust") -> Setup:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family], attn_implementation=PER_ROW_SDPA)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    algorithm = resolve_algorithm("bd")(OPTIONS[options], [STOP], 4.0)
    return Setup(StudentModel(model.double()).train(), algorithm)


def one_by_one() -> list[MicroBatch]:
    rollouts, blocks = global_batch()
    rows = [collate([row], layout="padded", with_sets=True) for row in rollouts]
    return rows + [collate([], {name: block}, layout="padded", with_sets=True) for name, block in blocks.items()]


def all_at_once(layout: Layout) -> list[MicroBatch]:
    rollouts, blocks = global_batch()
    if layout == "packed":
        return [collate(rollouts, blocks, layout="packed", with_sets=True)]
    return [collate(rollouts, layout="padded", with_sets=True), collate([], blocks, layout="padded", with_sets=True)]


def divided(limit: MicroBatchLimit, num_ranks: int) -> list[list[MicroBatch]]:
    """Micro-batches of every rank, fillers included, as the ranks would compute them."""
    rollouts, blocks = global_batch()
    lengths = [len(row.prompt_ids) + len(row.response_ids) for row in rollouts] + [11] * len(blocks)
    ranks = assign(np.array(lengths), num_ranks=num_ranks, limit=limit, num_rows=len(rollouts))
    named = list(blocks.items())
    return [
        [
            collate(
                [rollouts[item] for item in part.items if item < len(rollouts)],
                dict(named[item - len(rollouts)] for item in part.items if item >= len(rollouts)),
                layout=limit.layout,
                with_sets=True,
                weight=float(part.counts),
            )
            for part in rank
        ]
        for rank in ranks
    ]


def padded_on_the_left(batch: MicroBatch) -> MicroBatch:
    """The same micro-batch with each row moved to the right end."""
    tokens = batch.tokens
    length = tokens.input_ids.shape[1]
    mask_BL = tokens.attention_mask if tokens.attention_mask is not None else torch.ones_like(tokens.input_ids)
    gap_B = length - mask_BL.sum(dim=1)
    source_BL = torch.arange(length)[None] - gap_B[:, None]
    is_token_BL = source_BL >= 0
    source_BL = source_BL.clamp(min=0)
    shift_S = gap_B[tokens.state_index_S // length]
    moved = replace(
        tokens,
        input_ids=torch.where(is_token_BL, tokens.input_ids.gather(1, source_BL), 0),
        position_ids=source_BL,
        attention_mask=is_token_BL.long(),
        state_index_S=tokens.state_index_S + shift_S,
    )
    return replace(batch, tokens=moved)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed(family: str, options: str) -> None:
    """All rows and all text in one packed sequence give the loss and gradient of each alone."""
    setup_of(family, options).requires_equal(all_at_once("packed"), one_by_one())


@pytest.mark.parametrize("family", FAMILIES)
def test_padded(family: str) -> None:
    """Rows padded to the longest give the loss and gradient of each alone, padded on the right or on the left."""
    setup = setup_of(family)
    right = all_at_once("padded")
    assert right[0].tokens.attention_mask is not None
    setup.requires_equal(right, one_by_one())
    setup.requires_equal([padded_on_the_left(batch) for batch in right], one_by_one())


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_order_of_rows(layout: Layout) -> None:
    """The order of rows within a micro-batch changes nothing."""
    rollouts, blocks = global_batch()
    text = dict(reversed(list(blocks.items())))
    backwards = (
        [collate(rollouts[::-1], text, layout=layout, with_sets=True)]
        if layout == "packed"
        else [collate(rollouts[::-1], layout=layout, with_sets=True), collate([], text, layout=layout, with_sets=True)]
    )
    setup_of("qwen2").requires_equal(backwards, one_by_one())


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize(
    "limit",
    [
        MicroBatchLimit(rows=None, tokens=40, layout="packed"),
        MicroBatchLimit(rows=None, tokens=1, layout="packed"),
        MicroBatchLimit(rows=3, tokens=None, layout="packed"),
        MicroBatchLimit(rows=None, tokens=40, layout="padded"),
        MicroBatchLimit(rows=2, tokens=None, layout="padded"),
    ],
    ids=str,
)
def test_micro_batches_and_ranks(limit: MicroBatchLimit, num_ranks: int) -> None:
    """Any cut into micro-batches over any number of ranks sums to the same loss and gradient, fillers included."""
    ranks = divided(limit, num_ranks)
    assert len(ranks) == num_ranks
    setup_of("llama").requires_equal([batch for rank in ranks for batch in rank], one_by_one())
