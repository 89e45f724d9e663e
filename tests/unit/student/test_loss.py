"""The loss of a mixed micro-batch: its parts, what it costs in memory, and whom it blames."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from openrlhf_bd.algorithms.base import StepContext
from openrlhf_bd.algorithms.registry import resolve_algorithm
from openrlhf_bd.config import DistillConfig
from openrlhf_bd.data.micro_batches import MicroBatch, collate
from openrlhf_bd.functional.candidates import CandidateSets, top_p_candidates
from openrlhf_bd.functional.head import DenseHead, StudentHead
from openrlhf_bd.records import Origin, RecordedSets, Rollout
from openrlhf_bd.student.attention import PER_ROW_SDPA
from openrlhf_bd.student.loss import MicroBatchLoss, _narrow_trajectories, rollout_tokens, text_tokens
from openrlhf_bd.student.model import StudentModel

VOCAB, STOP = 40, 1


def recorded(num_states: int, vocab_size: int, generator: torch.Generator) -> RecordedSets:
    logits = 6 * torch.randn(num_states, vocab_size, generator=generator)
    sets = top_p_candidates(logits, top_p=0.95, always_include=[STOP])
    assert sets.logprobs_M is not None
    return RecordedSets(
        ids_M=sets.ids_M.numpy().astype(np.int32),
        offsets=sets.offsets_S1.numpy(),
        neg_log_mass_S=sets.neg_log_mass_S.numpy(),
        logprobs_M=sets.logprobs_M.numpy(),
    )


def rollout(name: str, prompt: int, response: int, generator: torch.Generator, vocab_size: int = VOCAB) -> Rollout:
    ids = torch.randint(2, vocab_size, (prompt + response,), generator=generator).numpy().astype(np.int32)
    ids[-1] = STOP
    sets = recorded(response, vocab_size, generator)
    return Rollout(row_id=name, prompt_ids=ids[:prompt], response_ids=ids[prompt:], finish_reason="stop", sets=sets)


def mixed(generator: torch.Generator, *, with_text: bool = True, with_rows: bool = True) -> MicroBatch:
    """Two rows of 3 and 5 response tokens, then two blocks of 4 tokens, packed."""
    rows = [rollout("a", 2, 3, generator), rollout("b", 3, 5, generator)]
    blocks = {f"block {i}": torch.randint(0, VOCAB, (4,), generator=generator).numpy() for i in range(2)}
    return collate(rows if with_rows else [], blocks if with_text else {}, layout="packed", with_sets=True)


def loss_of(batch: MicroBatch, *, teacher: StudentHead | None = None, **options: Any) -> MicroBatchLoss:
    distill = DistillConfig.model_validate({"preset": "robust", **options})
    algorithm = resolve_algorithm("bd")(distill, [STOP], 0.5)
    return MicroBatchLoss(batch, algorithm, StepContext(num_tokens=8.0, num_rows=2.0), 6.0, teacher)


def test_mixed_is_the_sum_of_its_parts() -> None:
    """Rows and text in one micro-batch give the loss that they give in two, with J_PT's coefficient."""
    batch = mixed(torch.Generator().manual_seed(0))
    only_rows = mixed(torch.Generator().manual_seed(0), with_text=False)
    only_text = replace(batch, trajectories=_narrow_trajectories(batch.trajectories, 0, 0), sets=None)
    logits_SV = torch.randn(8 + 6, VOCAB, generator=torch.Generator().manual_seed(1))
    loss, parts, metrics = loss_of(batch, pretrain_coef=0.5)(DenseHead(logits_SV))
    of_rows, row_parts, row_metrics = loss_of(only_rows)(DenseHead(logits_SV[:8]))
    _, text_parts, text_metrics = loss_of(only_text)(DenseHead(logits_SV[8:]))
    assert row_parts.keys() == {"policy_loss"}
    assert text_parts.keys() == {"ptx_loss"}
    assert text_parts["ptx_loss"] == pytest.approx(
        torch.nn.functional.cross_entropy(logits_SV[8:], batch.target_P).item()
    )
    assert {name: value.item() for name, value in parts.items()} == pytest.approx(
        {name: value.item() for name, value in (row_parts | text_parts).items()}
    )
    assert loss.item() == pytest.approx(of_rows.item() + 0.5 * text_parts["ptx_loss"].item())
    assert metrics.keys() == row_metrics.keys() | text_metrics.keys()


@pytest.mark.parametrize("kd_ratio", [0.25, 1.0])
def test_share_of_the_teacher(kd_ratio: float) -> None:
    """J_PT is (1 - r) cross-entropy + r KL(teacher || student), both means over the targets."""
    batch = mixed(torch.Generator().manual_seed(0), with_rows=False)
    student_PV, teacher_PV = torch.randn(2, 6, VOCAB, generator=torch.Generator().manual_seed(1))
    _, parts, metrics = loss_of(batch, teacher=DenseHead(teacher_PV), kd_ratio=kd_ratio)(DenseHead(student_PV))
    log_student_PV = torch.log_softmax(student_PV, 1)
    kl = torch.nn.functional.kl_div(log_student_PV, torch.softmax(teacher_PV, 1), reduction="batchmean").item()
    cross_entropy = torch.nn.functional.nll_loss(log_student_PV, batch.target_P).item()
    assert parts["ptx_loss"].item() == pytest.approx((1 - kd_ratio) * cross_entropy + kd_ratio * kl)
    total, weight = metrics["ptx_kl"]
    assert float(total / weight) == pytest.approx(kl)
    assert ("ptx_nll" in metrics) == (kd_ratio < 1)


def test_tokens_of_each_part() -> None:
    """The rows' part of a packed sequence ends where the text's begins; states are the same positions."""
    batch = mixed(torch.Generator().manual_seed(0))
    ids, states = batch.tokens.input_ids[0], batch.tokens.state_index_S
    rows, text = rollout_tokens(batch), text_tokens(batch)
    assert rows.input_ids[0].tolist() == ids[:13].tolist()  # 2 + 3 + 3 + 5
    assert text.input_ids[0].tolist() == ids[13:].tolist()
    assert rows.state_index_S.tolist() == states[:8].tolist()
    assert text.state_index_S.tolist() == [0, 1, 2, 4, 5, 6]
    assert text.position_ids[0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert (rows.num_tokens, text.num_tokens) == (13, 8)
    only_text = mixed(torch.Generator().manual_seed(0), with_rows=False)
    assert rollout_tokens(only_text).state_index_S.tolist() == []


class TestBlame:
    def poisoned(self, state: int) -> Tensor:
        logits_SV = torch.randn(14, VOCAB, generator=torch.Generator().manual_seed(1))
        logits_SV[state] = float("nan")
        return logits_SV

    # Rows have states 0-2 and 3-7, blocks 8-10 and 11-13.
    @pytest.mark.parametrize(("state", "culprit"), [(0, 0), (2, 0), (3, 1), (7, 1), (8, 2), (11, 3), (13, 3)])
    def test_one_item(self, state: int, culprit: int) -> None:
        """Only the row or block whose own states are not finite is blamed."""
        loss = loss_of(mixed(torch.Generator().manual_seed(0)))
        head = DenseHead(self.poisoned(state))
        assert not torch.isfinite(loss(head)[0])
        assert loss.items_not_finite(head).tolist() == [index == culprit for index in range(4)]

    def test_loss_of_one_item(self) -> None:
        """Losses of single rows and blocks add up to that of all: none of them is computed on wrong states."""
        loss = loss_of(mixed(torch.Generator().manual_seed(0)))
        head = DenseHead(torch.randn(14, VOCAB, generator=torch.Generator().manual_seed(1)))
        singles = [own_loss(own)[0] for own_loss, own in loss._single_items(head)]
        assert sum(singles).item() == pytest.approx(loss(head)[0].item())

    def test_rows_of_an_online_run(self) -> None:
        """Who sampled a row goes with it: minillm's losses of single rows add up, and it blames as others do."""
        generator = torch.Generator().manual_seed(0)
        rows = [
            replace(
                rollout(name, 2, length, generator),
                logprobs_T=np.full(length, -1.0, np.float32),
                origin=Origin(1, "student", 0, np.linspace(-2.0, -1.0, length, dtype=np.float32)),
            )
            for name, length in (("a", 3), ("b", 5))
        ]
        options = DistillConfig(name="minillm")
        algorithm = resolve_algorithm("minillm")(options, [STOP])
        batch = collate(rows, {}, layout="packed", with_sets=True)
        loss = MicroBatchLoss(batch, algorithm, StepContext(num_tokens=8.0, num_rows=2.0), 0.0)
        head = DenseHead(torch.randn(8, VOCAB, generator=generator))
        singles = [own_loss(own)[0] for own_loss, own in loss._single_items(head)]
        assert len(singles) == 2
        assert sum(singles).item() == pytest.approx(loss(head)[0].item())
        assert loss.items_not_finite(DenseHead(self.poisoned(4)[:8])).tolist() == [False, True]

    def test_whole_vocabulary_and_target_network(self) -> None:
        """p = 1 and a target network are narrowed to the row too."""
        batch = mixed(torch.Generator().manual_seed(0))
        sets = CandidateSets.whole(8)
        options = {"top_p": 1.0, "linear_term": "sampled", "tail_coef": 0.0, "next_value_gradient": "target"}
        context = StepContext(num_tokens=8.0, num_rows=2.0, target_head=DenseHead(self.poisoned(4)[:8]))
        loss = replace(loss_of(replace(batch, sets=sets), **options), context=context)
        head = DenseHead(torch.randn(14, VOCAB, generator=torch.Generator().manual_seed(1)))
        assert loss.items_not_finite(head).tolist() == [False, True, False, False]


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation's result had."""

    num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.num_elements = max([self.num_elements, *sizes])
        return result


LARGE_VOCAB = 2_000


@pytest.mark.parametrize(
    "options",
    [
        {"preset": "robust"},
        {"preset": "robust", "tail_estimator": "sampled"},
        {"preset": "robust", "next_value_gradient": "target", "alpha": 1.0},
        {"preset": "robust", "q_shift": "logsumexp"},
        {"preset": "paper"},
        {"preset": "released"},
        {"preset": "robust", "kd_ratio": 0.5},
    ],
    ids=lambda options: " ".join(str(value) for value in options.values()),
)
def test_no_logits_of_the_whole_vocabulary(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A step, forward and backward, with every metric, allocates nothing as large as [states, vocabulary]."""
    # As much smaller than usual as the vocabulary is.
    monkeypatch.setattr("openrlhf_bd.functional.tiles.CPU_TILE_ELEMENTS", 1 << 14)
    generator = torch.Generator().manual_seed(0)
    rows = [rollout(str(row), 4, 30, generator, LARGE_VOCAB) for row in range(3)]
    blocks = {"block": torch.randint(0, LARGE_VOCAB, (51,), generator=generator).numpy()}
    batch = collate(rows, blocks, layout="packed", with_sets=True)
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = LlamaConfig(**shape, vocab_size=LARGE_VOCAB, attn_implementation=PER_ROW_SDPA)
    model = StudentModel(LlamaForCausalLM(config))
    tokens = batch.tokens
    arguments = (tokens.input_ids, tokens.position_ids, tokens.attention_mask, tokens.state_index_S)
    with LargestTensor() as largest:
        with torch.no_grad():
            head = model.head(model(*arguments, None))
        context = StepContext(num_tokens=90.0, num_rows=3.0, target_head=head.narrow(0, 90))
        loss = replace(loss_of(batch, teacher=head.narrow(90, 50), **options), context=context)
        total, _, metrics = model(*arguments, loss)
        total.backward()
    assert torch.isfinite(total)
    assert metrics
    # At most a buffer of two tiles, 32,768 elements; the embedding has 16,000, logits of the rows 180,000 and of the
    # text 100,000.
    assert largest.num_elements <= 2 << 14
    assert all(parameter.grad is not None for parameter in model.parameters())
