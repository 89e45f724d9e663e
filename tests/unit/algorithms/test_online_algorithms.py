"""bd with rows of the student, gkd, rkl and minillm: what their losses are, and what must change nothing."""

# S states, V vocabulary, H hidden size

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from openrlhf_bd.algorithms import LossOutput, StepContext, resolve_algorithm
from openrlhf_bd.config import DistillConfig
from openrlhf_bd.functional import sparse_head, streaming
from openrlhf_bd.functional.candidates import CandidateSets
from openrlhf_bd.functional.head import DenseHead, StudentHead
from openrlhf_bd.functional.metrics import mean_metrics, merge_metrics
from openrlhf_bd.functional.sparse_head import SparseHead
from openrlhf_bd.functional.trajectories import Trajectories
from tests.unit.functional.conftest import Batch, as_online, build_batch, select_rows
from tests.unit.functional.test_diagnostics import FloatScans

ROWS = [(4, "stop"), (3, "length"), (1, "stop"), (6, "length"), (2, "stop")]
STUDENT_ROWS = [1, 2, 4]
LOSSES: dict[str, dict[str, Any]] = {
    "bd": {"name": "bd"},
    "bd reverse": {"name": "bd", "student_target": "reverse", "student_out_of_set": "penalise", "student_tail": False},
    "bd sampled": {"name": "bd", "linear_term": "sampled", "student_target": "none", "q_shift": "max", "alpha": 0.5},
    "bd target": {"name": "bd", "next_value_gradient": "target", "student_out_of_set": "penalise", "alpha": 0.5},
    "kd": {"name": "kd"},
    "gkd": {"name": "gkd"},
    "gkd sets": {"name": "gkd", "divergence_support": "set", "tau": 0.7},
    "gkd forward": {"name": "gkd", "jsd_beta": 0.0, "reduction": "sequence"},
    "rkl": {"name": "rkl", "tau": 1.5},
    "minillm": {"name": "minillm"},
    "minillm sequence": {"name": "minillm", "importance": "sequence", "importance_clip": 5.0, "reduction": "sequence"},
}


def online(seed: int, *, rows: Any = ROWS, **options: Any) -> Batch:
    return as_online(build_batch(rows, seed=seed, always_include=[0], **options), STUDENT_ROWS, seed=seed)


def output_of(
    name: str, head: StudentHead, batch: Batch, *, counts: dict[str, float] | None = None, target: Any = None
) -> LossOutput:
    options = DistillConfig.model_validate(LOSSES[name])
    algorithm = resolve_algorithm(options.name)(options, [0], 0.8)
    context = StepContext(**(counts or batch.counts), target_head=target or DenseHead(batch.logits_SV.flip(0)))
    return algorithm.loss(head, batch.sets, batch.trajectories, context)


@pytest.mark.parametrize("name", LOSSES)
def test_sparse_head_equals_dense_head(name: str) -> None:
    """From hidden states and output embedding come the dense loss, gradients and metrics."""
    batch = online(80, vocab_size=30)
    results = []
    for sparse in (True, False):
        generator = torch.Generator().manual_seed(80)
        shapes = [(len(batch.logits_SV), 6), (30, 6), (30,)]
        leaves = [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]
        target = DenseHead(torch.randn(len(batch.logits_SV), 30, dtype=torch.float64, generator=generator))
        head = SparseHead(*leaves) if sparse else DenseHead(leaves[0] @ leaves[1].T + leaves[2])
        output = output_of(name, head, batch, target=target)
        output.loss.backward()
        results.append((output.loss.detach(), [leaf.grad for leaf in leaves], mean_metrics(output.metrics)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-11, atol=1e-13)
    for ours, theirs in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert results[0][2] == pytest.approx(results[1][2], rel=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_order_of_rows_and_micro_batches_change_nothing(name: str) -> None:
    """Loss, gradient and metrics are those of the whole batch, however its rows are ordered and split."""
    whole = online(81)
    z_SV, slow_SV = whole.logits_SV.clone().requires_grad_(), whole.logits_SV.flip(0)
    output = output_of(name, DenseHead(z_SV), whole, target=DenseHead(slow_SV))
    output.loss.backward()
    for split in ([[4, 2, 0, 3, 1]], [[0], [1], [2], [3], [4]], [[3, 1], [4, 0, 2]]):
        y_SV = whole.logits_SV.clone().requires_grad_()
        outputs = []
        for rows in split:
            part = select_rows(replace(whole, logits_SV=y_SV), rows)
            slow = DenseHead(select_rows(replace(whole, logits_SV=slow_SV), rows).logits_SV)
            outputs.append(output_of(name, DenseHead(part.logits_SV), part, counts=whole.counts, target=slow))
        loss = torch.stack([output.loss for output in outputs]).sum()
        loss.backward()
        torch.testing.assert_close(loss, output.loss, rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(y_SV.grad, z_SV.grad, rtol=1e-10, atol=1e-14)
        merged = mean_metrics(merge_metrics(output.metrics for output in outputs))
        assert merged == pytest.approx(mean_metrics(output.metrics), rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LOSSES)
def test_hard_rows_give_finite_loss_and_gradient(name: str, dtype: torch.dtype) -> None:
    """-inf logits outside the sets, rows of one token, a row whose every action is out of set and ruled out."""
    for seed in range(5):
        batch = online(seed, rows=[(1, "stop"), (1, "length"), (1, "stop"), (3, "length"), (2, "stop")], vocab_size=12)
        outside_SV = torch.ones_like(batch.logits_SV, dtype=torch.bool)
        outside_SV[batch.sets.state_M, batch.sets.ids_M] = False
        z_SV = batch.logits_SV.clone()
        z_SV[:, ::2] = torch.where(outside_SV[:, ::2], -math.inf, z_SV[:, ::2])
        taken_S = batch.trajectories.taken_S.clone()
        last_S = batch.trajectories.row_S == 4  # one of the student's
        taken_S[last_S] = (outside_SV & torch.isinf(z_SV)).double().argmax(dim=1)[last_S]
        hard = replace(batch, trajectories=replace(batch.trajectories, taken_S=taken_S))
        y_SV = z_SV.to(dtype).requires_grad_()
        output = output_of(name, DenseHead(y_SV), hard)
        output.loss.backward()
        assert torch.isfinite(output.loss)
        assert torch.isfinite(y_SV.grad).all()
        assert not any(math.isnan(value) for value in mean_metrics(output.metrics).values())


@pytest.mark.parametrize("name", LOSSES)
def test_micro_batch_without_rollouts_gives_nothing(name: str) -> None:
    """No state: a loss of 0 whose gradient reaches every parameter, since all ranks meet in the backward pass."""
    ids = torch.zeros(0, dtype=torch.int64)
    sets = CandidateSets(ids, torch.zeros(1, dtype=torch.int64), torch.zeros(0), torch.zeros(0))
    behaviour = online(82).trajectories.behaviour
    assert behaviour is not None
    nothing = Trajectories(ids, ids, ids.bool(), ids, behaviour.narrow(0, 0))
    hidden_SH, weight_VH = torch.zeros(0, 4, requires_grad=True), torch.ones(9, 4, requires_grad=True)
    options = DistillConfig.model_validate(LOSSES[name])
    algorithm = resolve_algorithm(options.name)(options, [0], 0.8)
    target = DenseHead(torch.zeros(0, 9))
    output = algorithm.loss(SparseHead(hidden_SH, weight_VH), sets, nothing, StepContext(5, 2, target_head=target))
    output.loss.backward()
    assert output.loss.item() == 0.0
    assert weight_VH.grad is not None


@pytest.mark.parametrize("name", ["gkd", "rkl", "minillm"])
def test_one_walk_over_the_vocabulary(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mass outside the sets, the taken token's log-probability and all metrics come from one pass."""
    walked: list[int] = []
    make: Callable = streaming.walk_moments

    def counting(walk: Any, **options: Any) -> Any:
        walked.append(len(walk.states_R))
        return make(walk, **options)

    monkeypatch.setattr(sparse_head, "walk_moments", counting)
    batch = online(83, vocab_size=30)
    head = SparseHead(torch.randn(len(batch.logits_SV), 6), torch.randn(30, 6))
    output = output_of(name, head, batch)
    assert walked == [len(batch.logits_SV)]
    assert "entropy" in output.metrics


@pytest.mark.parametrize("name", LOSSES)
def test_no_operation_that_has_no_deterministic_form_on_cuda(name: str) -> None:
    """The losses and their metrics run with --train.full_determinism_enable on CUDA."""
    batch = online(88)
    with FloatScans() as scans:
        output_of(name, DenseHead(batch.logits_SV.clone().requires_grad_()), batch).loss.backward()
    assert scans.calls == 0


def test_projected_policies_need_no_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    """divergence_support set reads the logits of the candidates alone."""

    def walk(*_: object) -> None:
        raise AssertionError("a pass over the vocabulary")

    monkeypatch.setattr(SparseHead, "_walk", walk)
    batch = online(84, vocab_size=30)
    options = DistillConfig(name="gkd", divergence_support="set")
    head = SparseHead(torch.randn(len(batch.logits_SV), 6), torch.randn(30, 6))
    context = StepContext(**batch.counts, full_diagnostics=False)
    assert resolve_algorithm("gkd")(options, [0]).loss(head, batch.sets, batch.trajectories, context).loss > 0


def gradients(name: str, batch: Batch, **values: Any) -> tuple[Tensor, Tensor]:
    options = DistillConfig.model_validate({"name": name, **values})
    z_SV = batch.logits_SV.clone().requires_grad_()
    context = StepContext(**batch.counts)
    loss = resolve_algorithm(name)(options, [0]).loss(DenseHead(z_SV), batch.sets, batch.trajectories, context).loss
    loss.backward()
    assert z_SV.grad is not None
    return loss.detach(), z_SV.grad


def test_gkd_at_its_ends_is_kd_and_rkl() -> None:
    """jsd_beta 0: kd's gradient, and its loss without the teacher's entropy. jsd_beta 1: rkl."""
    batch = online(85)
    (forward, forward_SV), (kd, kd_SV) = gradients("gkd", batch, jsd_beta=0.0), gradients("kd", batch)
    torch.testing.assert_close(forward_SV, kd_SV, rtol=1e-10, atol=1e-13)
    teacher = replace(batch, logits_SV=batch.teacher_SV)
    torch.testing.assert_close(kd - forward, gradients("kd", teacher)[0], rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(gradients("gkd", batch, jsd_beta=1.0), gradients("rkl", batch), strict=True):
        assert torch.equal(ours, theirs)


def test_every_token_counts_once() -> None:
    """gkd's loss of a mixed batch: (1 - beta) of the mean over the teacher's tokens, beta of the student's."""
    batch = online(86)
    output = output_of("gkd", DenseHead(batch.logits_SV), batch)
    metrics = mean_metrics(output.metrics)
    beta = metrics["student/share"]
    assert beta == pytest.approx(6 / 16)
    both = (1 - beta) * metrics["teacher/policy_loss"] + beta * metrics["student/policy_loss"]
    assert both == pytest.approx(float(output.loss))


def test_minillm_on_policy_starts_as_the_reverse_kl() -> None:
    """Rows of one token sampled from the student itself have no later reward: rkl's gradient."""
    batch = build_batch([(1, "stop"), (1, "stop")], seed=87)
    batch = as_online(batch, [0, 1])
    behaviour = batch.trajectories.behaviour
    assert behaviour is not None
    logprob_S = torch.log_softmax(batch.logits_SV, dim=1).gather(1, batch.trajectories.taken_S[:, None])[:, 0]
    trajectories = replace(batch.trajectories, behaviour=replace(behaviour, logprob_S=logprob_S))
    batch = replace(batch, trajectories=trajectories)
    torch.testing.assert_close(gradients("minillm", batch)[1], gradients("rkl", batch)[1], rtol=1e-12, atol=1e-14)
