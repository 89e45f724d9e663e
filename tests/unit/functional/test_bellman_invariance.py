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
from openrlhf_bd.functional.bellman import BellmanTerms, bellman_loss, bellman_loss_from_logits
from openrlhf_bd.functional.candidates import CandidateSets
from openrlhf_bd.functional.head import DenseHead, HeadStatistics
from openrlhf_bd.functional.metrics import mean_metrics, merge_metrics
from openrlhf_bd.functional.trajectories import Trajectories

INF = float("inf")
ROWS = [(4, "stop"), (3, "length"), (1, "stop"), (6, "length"), (2, "stop")]
PRESETS = [DistillConfig(), DistillConfig(preset="paper"), DistillConfig(reduction="sequence", q_shift="logsumexp")]
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


def select_rows(batch: Any, rows: list[int]) -> Any:
    """The micro-batch of some rows of a batch, in the order given; counts stay those of the whole."""
    row_S = batch.trajectories.row_S.tolist()
    states = [s for row in rows for s in range(len(row_S)) if row_S[s] == row]
    offsets, sizes = batch.sets.offsets_S1.tolist(), batch.sets.sizes_S[states]
    candidates = torch.tensor([m for s in states for m in range(offsets[s], offsets[s + 1])])
    sets = CandidateSets(
        batch.sets.ids_M[candidates],
        torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]),
        batch.sets.neg_log_mass_S[states],
        batch.sets.logprobs_M[candidates],
    )
    rollouts = [batch.rollouts[row] for row in rows]
    trajectories = Trajectories.from_rollouts(rollouts)
    return replace(batch, logits_SV=batch.logits_SV[states], sets=sets, trajectories=trajectories, rollouts=rollouts)


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


class CandidateRowsHead:
    """StudentHead that makes logits only for the ids it is asked for: hidden_SH @ weight_VH[ids]."""

    def __init__(self, hidden_SH: Tensor, weight_VH: Tensor) -> None:
        self.hidden_SH, self.weight_VH = hidden_SH, weight_VH
        self.num_states, self.device = len(hidden_SH), hidden_SH.device

    def tempered(self, tau: float) -> "CandidateRowsHead":
        return CandidateRowsHead(self.hidden_SH / tau, self.weight_VH)

    def at_candidates(self, sets: CandidateSets) -> Tensor:
        return (self.hidden_SH[sets.state_M] * self.weight_VH[sets.ids_M]).sum(dim=1)

    def at(self, token_S: Tensor) -> Tensor:
        logit_S = (self.hidden_SH * self.weight_VH[token_S.clamp(min=0)]).sum(dim=1)
        return torch.where(token_S >= 0, logit_S, 0.0)

    def logsumexp(self) -> Tensor:
        raise AssertionError("this loss needs no partition function")

    def logsumexp_outside(self, sets: CandidateSets) -> Tensor:
        raise AssertionError("this loss needs no partition function")

    def maximum(self) -> Tensor:
        raise AssertionError("this loss needs no maximum")

    def log_prob(self, token_S: Tensor) -> Tensor:
        raise AssertionError("this loss needs no partition function")

    def statistics(self) -> HeadStatistics:
        return DenseHead(self.hidden_SH.detach() @ self.weight_VH.detach().T).statistics()


@pytest.mark.parametrize("q_shift", ["constant", "topp_max"])
@pytest.mark.parametrize("linear_term", ["sampled", "expected"])
def test_sparse_head_equals_dense_head(make_batch: Callable, q_shift: str, linear_term: str) -> None:
    """A head that computes candidates' logits alone gives the dense loss, gradients and metrics."""
    batch = make_batch(ROWS, seed=25, vocab_size=30)
    chosen = BellmanOptions.model_validate(
        {"q_shift": q_shift, "linear_term": linear_term, "alpha": 0.3, "tail_coef": 0.0, "tau": 0.8, "q_min": -3.0}
    )
    results = []
    for sparse in (True, False):
        generator = torch.Generator().manual_seed(5)
        hidden_SH = torch.randn(len(batch.logits_SV), 6, dtype=torch.float64, generator=generator).requires_grad_()
        weight_VH = torch.randn(30, 6, dtype=torch.float64, generator=generator).requires_grad_()
        head = CandidateRowsHead(hidden_SH, weight_VH) if sparse else DenseHead(hidden_SH @ weight_VH.T)
        terms = bellman_loss(head, batch.sets, batch.trajectories, chosen, shift_constant=SHIFT, **batch.counts)
        terms.loss.backward()
        results.append((terms.loss.detach(), hidden_SH.grad, weight_VH.grad, mean_metrics(terms.metrics)))
    for ours, theirs in zip(results[0][:3], results[1][:3], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)
    assert results[0][3] == pytest.approx(results[1][3])


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
