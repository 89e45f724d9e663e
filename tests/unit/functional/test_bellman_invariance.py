"""What must change nothing: levels, order of rows, splits into micro-batches, the form of the head; and no NaN."""

# S states, V vocabulary, H hidden size, M candidates

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from openrlhf_bd.config import BellmanOptions, DistillConfig
from openrlhf_bd.functional import sparse_head, streaming
from openrlhf_bd.functional.bellman import BellmanTerms, bellman_loss, bellman_loss_from_logits
from openrlhf_bd.functional.candidates import CandidateSets
from openrlhf_bd.functional.head import DenseHead
from openrlhf_bd.functional.metrics import mean_metrics, merge_metrics
from openrlhf_bd.functional.sparse_head import SparseHead
from openrlhf_bd.functional.trajectories import Trajectories
from tests.unit.functional.conftest import select_rows

INF = float("inf")
ROWS = [(4, "stop"), (3, "length"), (1, "stop"), (6, "length"), (2, "stop")]
PRESETS = [
    DistillConfig(),
    DistillConfig(preset="paper"),
    DistillConfig(preset="released"),
    DistillConfig(reduction="sequence", q_shift="logsumexp"),
]
SHIFT = 1.25


def terms_of(batch: Any, chosen: BellmanOptions, logits_SV: Tensor | None = None) -> BellmanTerms:
    return bellman_loss_from_logits(
        batch.logits_SV if logits_SV is None else logits_SV,
        batch.sets,
        batch.trajectories,
        chosen,
        shift_constant=SHIFT,
        stop_ids=[0],
        **batch.counts,
    )


@pytest.mark.parametrize("q_shift", ["max", "topp_max", "logsumexp"])
@pytest.mark.parametrize("linear_term", ["sampled", "expected"])
def test_whole_loss_ignores_the_level_of_each_state(make_batch: Callable, q_shift: str, linear_term: str) -> None:
    """Adding any number to all logits of a state changes neither loss nor gradient, and the gradient sums to 0."""
    batch = make_batch(ROWS, seed=20)
    chosen = BellmanOptions.model_validate({"q_shift": q_shift, "linear_term": linear_term, "alpha": 0.3})
    level_S1 = torch.linspace(-40, 90, len(batch.logits_SV), dtype=torch.float64)[:, None]
    plain_SV, moved_SV = batch.logits_SV.clone().requires_grad_(), (batch.logits_SV + level_S1).requires_grad_()
    plain, moved = terms_of(batch, chosen, plain_SV).loss, terms_of(batch, chosen, moved_SV).loss
    torch.testing.assert_close(moved, plain, rtol=1e-12, atol=0)
    plain.backward()
    moved.backward()
    torch.testing.assert_close(moved_SV.grad, plain_SV.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(plain_SV.grad.sum(1), torch.zeros(len(level_S1)).double(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("q_shift", ["none", "constant", "max_detached"])
def test_linear_part_and_tail_ignore_the_level_under_every_shift(make_batch: Callable, q_shift: str) -> None:
    """Without the regulariser nothing depends on a state's level."""
    batch = make_batch(ROWS, seed=21)
    chosen = BellmanOptions.model_validate({"q_shift": q_shift, "regulariser": "none"})
    level_S1 = torch.linspace(-40, 90, len(batch.logits_SV), dtype=torch.float64)[:, None]
    moved = terms_of(batch, chosen, batch.logits_SV + level_S1).loss
    torch.testing.assert_close(moved, terms_of(batch, chosen).loss, rtol=1e-12, atol=0)


def test_constant_shift_keeps_differences_between_states(make_batch: Callable) -> None:
    """The constant removes a level common to all states, and no other."""
    batch = make_batch(ROWS, seed=22)
    chosen = BellmanOptions(q_shift="constant", alpha=0.3)
    loss = terms_of(batch, chosen).loss
    common = bellman_loss_from_logits(
        batch.logits_SV + 50, batch.sets, batch.trajectories, chosen, shift_constant=SHIFT + 50, **batch.counts
    ).loss
    torch.testing.assert_close(common, loss, rtol=1e-12, atol=0)
    level_S1 = torch.linspace(0, 1, len(batch.logits_SV), dtype=torch.float64)[:, None]
    assert abs(terms_of(batch, chosen, batch.logits_SV + level_S1).loss - loss) > 1e-3


@pytest.mark.parametrize("chosen", PRESETS)
def test_order_of_rows_and_micro_batches_change_nothing(make_batch: Callable, chosen: DistillConfig) -> None:
    """Loss, gradient and metrics are those of the whole batch, however its rows are ordered and split."""
    whole = make_batch(ROWS, seed=23)
    z_SV = whole.logits_SV.clone().requires_grad_()
    terms = terms_of(whole, chosen, z_SV)
    terms.loss.backward()
    expected = mean_metrics(terms.metrics)
    for split in ([[4, 2, 0, 3, 1]], [[0], [1], [2], [3], [4]], [[3, 1], [4, 0, 2]]):
        y_SV = whole.logits_SV.clone().requires_grad_()
        parts = []
        for rows in split:
            part = select_rows(replace(whole, logits_SV=y_SV), rows)
            parts.append(
                bellman_loss_from_logits(
                    part.logits_SV,
                    part.sets,
                    part.trajectories,
                    chosen,
                    shift_constant=SHIFT,
                    stop_ids=[0],
                    **whole.counts,
                )
            )
        loss = torch.stack([part.loss for part in parts]).sum()
        loss.backward()
        torch.testing.assert_close(loss, terms.loss, rtol=1e-13, atol=0)
        torch.testing.assert_close(y_SV.grad, z_SV.grad, rtol=1e-10, atol=1e-14)
        assert mean_metrics(merge_metrics(part.metrics for part in parts)) == pytest.approx(expected, rel=1e-11)


def test_pad_equal_to_eos_keeps_the_last_action(make_batch: Callable) -> None:
    """Token id 0 is stop token and could be padding: its term is there, and the end's reward too."""
    batch = make_batch([(3, "stop")], seed=24, always_include=[0])
    assert int(batch.trajectories.taken_S[-1]) == 0
    terms = terms_of(batch, DistillConfig(preset="paper"))
    assert float(terms.metrics["linear_loss"][1]) == 3
    assert float(terms.metrics["reward_end"][1]) == 1
    renamed = torch.arange(7).roll(1)  # the same problem with the stop token at id 1: nothing may change
    sets = replace(batch.sets, ids_M=renamed[batch.sets.ids_M])
    trajectories = replace(batch.trajectories, taken_S=renamed[batch.trajectories.taken_S])
    logits_SV = torch.empty_like(batch.logits_SV)
    logits_SV[:, renamed] = batch.logits_SV
    moved = bellman_loss_from_logits(logits_SV, sets, trajectories, DistillConfig(preset="paper"), **batch.counts)
    torch.testing.assert_close(moved.loss, terms.loss, rtol=1e-14, atol=0)


def through_both_heads(
    make_batch: Callable, chosen: BellmanOptions, *, bias: bool, full_diagnostics: bool = True, seed: int = 25
) -> list[tuple[Tensor, list[Tensor], dict[str, float]]]:
    """Loss, gradients of hidden states, output embedding and bias, and metrics: sparse, then dense."""
    always = [] if chosen.top_p == 1 else [0]
    batch = make_batch(ROWS, seed=seed, vocab_size=30, top_p=chosen.top_p, always_include=always)
    results = []
    for sparse in (True, False):
        generator = torch.Generator().manual_seed(seed)
        shapes = [(len(batch.logits_SV), 6), (30, 6), (30,)][: 3 if bias else 2]
        parameters = [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]
        slow_SH = torch.randn(shapes[0], dtype=torch.float64, generator=generator)
        heads = []
        for hidden_SH in (parameters[0], slow_SH):
            weights = parameters[1:] if hidden_SH is parameters[0] else [p.detach() for p in parameters[1:]]
            heads.append(
                SparseHead(hidden_SH, *weights)
                if sparse
                else DenseHead(hidden_SH @ weights[0].T + (weights[1] if bias else 0.0))
            )
        terms = bellman_loss(
            heads[0],
            batch.sets,
            batch.trajectories,
            chosen,
            shift_constant=SHIFT,
            stop_ids=[0],
            target_head=heads[1],
            generator=torch.Generator().manual_seed(1),
            full_diagnostics=full_diagnostics,
            **batch.counts,
        )
        terms.loss.backward()
        gradients = [p.grad for p in parameters if p.grad is not None]
        results.append((terms.loss.detach(), gradients, mean_metrics(terms.metrics)))
    return results


ALPHA = {"alpha": 0.3, "tau": 0.8, "gamma": 0.9}
BOTH_HEADS = [
    *({"q_shift": shift, "linear_term": linear, "tail_coef": tail, "q_min": q_min, "top_p": 0.8, **ALPHA}
      for shift in ("constant", "max", "max_detached", "topp_max", "logsumexp")
      for linear, tail, q_min in (("sampled", 0.0, -3.0), ("expected", 1.0, None))),
    {"preset": "robust"},
    {"preset": "robust", "tail_estimator": "sampled", "tail_samples": 9},
    {"preset": "robust", "tail_tolerance": 0.05},
    {"preset": "robust", "next_value_gradient": "target"},
    {"preset": "paper"},
    {"preset": "released", "tail_coef": 0.5},
    *({"q_shift": shift, "linear_term": "sampled", "top_p": 1.0, "q_min": q_min, **ALPHA}
      for shift in ("constant", "max", "logsumexp")
      for q_min in (None, -2.0)),
    {"q_shift": "max", "linear_term": "sampled", "top_p": 1.0, "next_value_gradient": "target"},
]  # fmt: skip


@pytest.mark.parametrize("values", BOTH_HEADS)
def test_sparse_head_equals_dense_head(make_batch: Callable, values: dict[str, Any]) -> None:
    """From hidden states and output embedding come the dense loss, gradients and metrics, whatever the options."""
    sparse, dense = through_both_heads(make_batch, DistillConfig.model_validate(values), bias=len(values) % 2 == 0)
    torch.testing.assert_close(sparse[0], dense[0], rtol=1e-11, atol=1e-13)
    assert len(sparse[1]) == len(dense[1])
    for ours, theirs in zip(sparse[1], dense[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert sparse[2] == pytest.approx(dense[2], rel=1e-9)


@pytest.mark.parametrize("q_shift", ["constant", "topp_max"])
@pytest.mark.parametrize("linear_term", ["sampled", "expected"])
def test_only_the_sets_are_read(
    make_batch: Callable, monkeypatch: pytest.MonkeyPatch, q_shift: str, linear_term: str
) -> None:
    """Without a tail, and with a shift that the sets give, no pass over the vocabulary is made."""

    def walk(*_: object) -> None:
        raise AssertionError("a pass over the vocabulary")

    monkeypatch.setattr(SparseHead, "_walk", walk)
    chosen = DistillConfig.model_validate({"q_shift": q_shift, "linear_term": linear_term, "tail_coef": 0.0, **ALPHA})
    sparse, dense = through_both_heads(make_batch, chosen, bias=True, full_diagnostics=False)
    torch.testing.assert_close(sparse[0], dense[0], rtol=1e-11, atol=1e-13)
    assert "entropy" not in sparse[2]


@pytest.mark.parametrize("preset", ["robust", "paper", "released"])
def test_micro_batch_without_rollouts_gives_nothing(preset: str) -> None:
    """No state: a loss of 0 whose gradient reaches every parameter, since all ranks meet in the backward pass."""
    ids = torch.zeros(0, dtype=torch.int64)
    sets = CandidateSets(ids, torch.zeros(1, dtype=torch.int64), torch.zeros(0), torch.zeros(0))
    nothing = Trajectories(ids, ids, ids.bool(), ids)
    hidden_SH, weight_VH = torch.zeros(0, 4, requires_grad=True), torch.ones(9, 4, requires_grad=True)
    for head in (SparseHead(hidden_SH, weight_VH), DenseHead(hidden_SH @ weight_VH.T)):
        weight_VH.grad = None
        terms = bellman_loss(
            head, sets, nothing, DistillConfig(preset=preset), num_tokens=5, num_rows=2, shift_constant=0.0
        )
        terms.loss.backward()
        assert terms.loss.item() == 0.0
        assert weight_VH.grad is not None
        assert not weight_VH.grad.any()


def test_one_pass_gives_the_tail_and_the_shift(make_batch: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tail, the maximum or log-sum-exp of the shift and all metrics come from its pass over the vocabulary."""
    walked: list[int] = []
    make = streaming.walk_moments

    def counting(walk: Any, **options: Any) -> Any:
        walked.append(len(walk.states_R))
        return make(walk, **options)

    monkeypatch.setattr(sparse_head, "walk_moments", counting)
    for q_shift in ("max", "logsumexp"):
        walked.clear()
        through_both_heads(make_batch, DistillConfig(q_shift=q_shift), bias=False)
        # 16 states with an action for the tail; then only the two that follow cut responses.
        assert walked == [16, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_close_to_float64(make_batch: Callable, dtype: torch.dtype) -> None:
    """float32 logits at a level of 100 nats lose 1e-5; bfloat16 logits are taken at their exact values."""
    batch = make_batch(ROWS, seed=26)
    for chosen in PRESETS:
        logits_SV = (batch.logits_SV + (100 if dtype == torch.float32 else 0)).to(dtype)
        terms = terms_of(batch, chosen, logits_SV)
        reference = terms_of(batch, chosen, logits_SV.double())
        assert terms.loss.dtype == torch.float32
        torch.testing.assert_close(terms.loss.double(), reference.loss, rtol=1e-5, atol=0)


OPTIONS = [
    {"q_shift": q_shift, "linear_term": linear_term, "q_min": q_min, "out_of_set": out_of_set}
    for q_shift, linear_term, (q_min, out_of_set) in itertools.product(
        ["none", "constant", "max", "max_detached", "topp_max", "logsumexp"],
        ["sampled", "expected"],
        [(None, "drop"), (-10.0, "drop"), (-10.0, "clip"), (None, "zero")],
    )
]


@pytest.mark.parametrize("regulariser", ["chi2", "none", "kl_fix", "hellinger", "js"])
def test_hard_rows_give_finite_loss_and_gradient(make_batch: Callable, regulariser: str) -> None:
    """-inf logits outside the sets, rows of one token, a row whose every action is out of set: all stays finite."""
    batch = make_batch([(1, "stop"), (1, "length"), (3, "stop")], seed=27, vocab_size=12, always_include=[11])
    sets = batch.sets
    outside_SV = torch.ones(len(batch.logits_SV), 12, dtype=torch.bool)
    outside_SV[sets.state_M, sets.ids_M] = False
    taken_S = batch.trajectories.taken_S.clone()
    taken_S[-3:] = torch.stack([torch.nonzero(row)[0, 0] for row in outside_SV[-3:]])
    trajectories = replace(batch.trajectories, taken_S=taken_S)
    masked_SV = batch.logits_SV.clone()
    masked_SV[:, ::2] = torch.where(outside_SV[:, ::2], -INF, masked_SV[:, ::2])
    for values in OPTIONS:
        terminal = "drop_chi" if values["q_shift"] == "none" else "zero"
        chosen = BellmanOptions.model_validate({**values, "regulariser": regulariser, "terminal": terminal})
        z_SV = masked_SV.clone().requires_grad_()
        terms = bellman_loss_from_logits(
            z_SV, sets, trajectories, chosen, num_tokens=5, num_rows=3, shift_constant=SHIFT, stop_ids=[0]
        )
        terms.loss.backward()
        assert torch.isfinite(terms.loss)
        assert torch.isfinite(z_SV.grad).all()
        for name, value in mean_metrics(terms.metrics).items():
            # A taken token that the student rules out has no finite likelihood: that one is reported as it is.
            assert not math.isnan(value)
            assert math.isfinite(value) or name == "nll"


def test_impossible_candidates_give_infinity_not_nan(make_batch: Callable) -> None:
    """-inf at a candidate: harmless where Q_min or a weight of 0 covers it, else the loss is +inf; never NaN."""
    batch = make_batch([(3, "stop"), (2, "length")], seed=28)
    for state, everything in itertools.product(range(len(batch.logits_SV)), (False, True)):
        start, end = batch.sets.offsets_S1[state : state + 2].tolist()
        z_SV = batch.logits_SV.clone()
        z_SV[state, batch.sets.ids_M[start:end] if everything else batch.sets.ids_M[start]] = -INF
        for values in OPTIONS:
            terminal = "drop_chi" if values["q_shift"] == "none" else "zero"
            chosen = BellmanOptions.model_validate({**values, "terminal": terminal, "tail_coef": 0.0})
            y_SV = z_SV.clone().requires_grad_()
            loss = terms_of(batch, chosen, y_SV).loss
            assert not loss.isnan()
            if chosen.q_min is not None:
                loss.backward()
                assert torch.isfinite(loss)
                assert torch.isfinite(y_SV.grad).all()


def test_token_of_teacher_probability_zero_weighs_nothing(make_batch: Callable) -> None:
    """An always-included id of teacher probability 0 and student logit -inf leaves the expected loss finite."""
    z_SV = torch.tensor([[0.0, 1.0, -INF]], dtype=torch.float64, requires_grad=True)
    sets = CandidateSets(torch.tensor([1, 2]), torch.tensor([0, 2]), torch.tensor([0.1]), torch.tensor([-0.1, -INF]))
    trajectories = Trajectories(torch.tensor([1]), torch.tensor([-1]), torch.tensor([True]), torch.tensor([0]))
    loss = bellman_loss_from_logits(
        z_SV, sets, trajectories, BellmanOptions(), num_tokens=1, num_rows=1, shift_constant=0.0
    ).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert z_SV.grad is not None
    assert torch.isfinite(z_SV.grad).all()
