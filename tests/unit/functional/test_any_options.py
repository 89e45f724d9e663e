"""Whatever options are accepted together: loss, gradient and metrics are numbers, on whatever rows."""

# S states, V vocabulary

import math
from dataclasses import replace
from typing import Any

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from openrlhf_bd.config import DistillConfig
from openrlhf_bd.errors import ConfigError
from openrlhf_bd.functional.bellman import bellman_loss
from openrlhf_bd.functional.head import DenseHead
from openrlhf_bd.functional.metrics import mean_metrics
from openrlhf_bd.functional.options import validate_options
from openrlhf_bd.functional.sparse_head import SparseHead
from tests.unit.functional.conftest import Batch, as_online, build_batch

INF = float("inf")

eq17_options = st.fixed_dictionaries(
    {
        "gamma": st.sampled_from([0.0, 0.5, 0.99, 1.0]),
        "alpha": st.sampled_from([0.1, 83.0]),
        "tau": st.sampled_from([0.5, 1.0, 2.0]),
        "q_shift": st.sampled_from(["none", "constant", "max", "max_detached", "topp_max", "logsumexp"]),
        "q_min": st.sampled_from([None, -10.0, -0.5]),
        "linear_term": st.sampled_from(["sampled", "expected"]),
        "out_of_set": st.sampled_from(["drop", "clip", "zero"]),
        "regulariser": st.sampled_from(["chi2", "none", "kl_fix", "hellinger", "js"]),
        "terminal": st.sampled_from(["zero", "drop_chi", "absorbing"]),
        "truncated": st.sampled_from(["bootstrap", "drop"]),
        "next_value_gradient": st.sampled_from(["full", "stop", "target"]),
        "reduction": st.sampled_from(["token", "sequence"]),
        "tail_coef": st.sampled_from([0.0, 1.0, 0.1]),
        "tail_estimator": st.sampled_from(["exact", "sampled"]),
        "tail_samples": st.sampled_from([1, 3, 100]),
        "tail_tolerance": st.sampled_from([0.0, 0.05]),
        "top_p": st.sampled_from([0.3, 0.8, 0.99, 1.0]),
        "include_eos": st.booleans(),
        "student_target": st.sampled_from(["none", "forward", "reverse"]),
        "student_tail": st.booleans(),
        "student_td": st.booleans(),
        "student_out_of_set": st.sampled_from(["drop", "penalise"]),
    }
)
released_options = st.fixed_dictionaries(
    {
        "preset": st.just("released"),
        "gamma": st.sampled_from([0.0, 0.99]),
        "q_shift": st.sampled_from(["constant", "max", "max_detached", "topp_max", "logsumexp"]),
        "q_min": st.sampled_from([None, -10.0, -0.5]),
        "tail_coef": st.sampled_from([0.0, 1.0]),
        "top_p": st.sampled_from([0.3, 0.8, 0.99]),
    }
)
rows = st.lists(st.tuples(st.integers(1, 4), st.sampled_from(["stop", "length"])), min_size=1, max_size=4)


def hard_batch(batch: Batch, *, out_of_set_row: int | None, impossible: bool) -> Batch:
    """With a row whose every token lies outside its set, and with every other id outside ruled out by the student."""
    num_states, vocab_size = batch.logits_SV.shape
    outside_SV = torch.ones(num_states, vocab_size, dtype=torch.bool)
    outside_SV[batch.sets.state_M, batch.sets.ids_M] = False
    outside_SV &= not batch.sets.is_whole
    taken_S, logits_SV = batch.trajectories.taken_S.clone(), batch.logits_SV.clone()
    movable_S = (batch.trajectories.row_S == out_of_set_row) & (taken_S >= 0) & outside_SV.any(dim=1)
    taken_S[movable_S] = outside_SV.double().argmax(dim=1)[movable_S]
    if impossible:
        logits_SV[:, ::2] = torch.where(outside_SV[:, ::2], -INF, logits_SV[:, ::2])
    return replace(batch, logits_SV=logits_SV, trajectories=replace(batch.trajectories, taken_S=taken_S))


def accepted(values: dict[str, Any]) -> DistillConfig:
    """The options, unless they contradict each other."""
    chosen = DistillConfig.model_validate(values)
    try:
        validate_options(chosen)
    except ConfigError:
        assume(False)
    return chosen


def compute(batch: Batch, chosen: DistillConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, float]]:
    z_SV = batch.logits_SV.to(dtype).requires_grad_()
    # Hidden states times the identity are the same logits; not where some are infinite.
    sparse = bool(torch.isfinite(z_SV).all())
    terms = bellman_loss(
        SparseHead(z_SV, torch.eye(z_SV.shape[1], dtype=dtype)) if sparse else DenseHead(z_SV),
        batch.sets,
        batch.trajectories,
        chosen,
        shift_constant=0.8,
        stop_ids=[0],
        td_scale=0.5,
        target_head=DenseHead(batch.logits_SV.to(dtype)),
        generator=torch.Generator().manual_seed(3),
        **batch.counts,
    )
    terms.loss.backward()
    assert z_SV.grad is not None
    return terms.loss.detach(), z_SV.grad, mean_metrics(terms.metrics)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(
    values=st.one_of(eq17_options, eq17_options, eq17_options, released_options),
    rows=rows,
    out_of_set_row=st.one_of(st.none(), st.integers(0, 3)),
    impossible=st.booleans(),
    vocab_size=st.integers(3, 14),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    student_rows=st.sets(st.integers(0, 3)),
    seed=st.integers(0, 10**6),
)
def test_accepted_options_give_numbers(
    values: dict[str, Any],
    rows: list[tuple[int, str]],
    out_of_set_row: int | None,
    impossible: bool,
    vocab_size: int,
    dtype: torch.dtype,
    student_rows: set[int],
    seed: int,
) -> None:
    """Impossible tokens, one-token responses, rows all out of set: loss and gradient stay finite, no metric is NaN."""
    chosen = accepted(values)
    batch = build_batch(
        rows,
        seed=seed,
        vocab_size=vocab_size,
        top_p=chosen.top_p,
        always_include=[0] if chosen.include_eos else [],
        spread=4.0,
    )
    if chosen.objective == "eq17" and (chosen.top_p < 1 or chosen.student_target == "none"):
        batch = as_online(batch, sorted(student_rows), seed=seed)
    loss, grad_SV, metrics = compute(
        hard_batch(batch, out_of_set_row=out_of_set_row, impossible=impossible), chosen, dtype
    )
    assert torch.isfinite(loss)
    assert torch.isfinite(grad_SV).all()
    for name, value in metrics.items():
        # A taken token that the student rules out has no finite likelihood: that one is reported as it is.
        assert math.isfinite(value) or (name in ("nll", "student/log_ratio") and abs(value) == INF)
