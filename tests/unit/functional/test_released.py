"""Preset `released`: the formula of functional.released, worked out by hand and by loops over the vocabulary."""

# S states, V vocabulary

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from openrlhf_bd.config import DistillConfig
from openrlhf_bd.errors import ConfigError
from openrlhf_bd.functional.bellman import bellman_loss_from_logits
from openrlhf_bd.functional.candidates import CandidateSets
from openrlhf_bd.functional.metrics import mean_metrics
from openrlhf_bd.functional.options import RELEASED_OPTIONS
from openrlhf_bd.functional.trajectories import Trajectories

ROWS = [(5, "stop"), (4, "length"), (1, "stop"), (2, "stop"), (1, "length")]
RELEASED = DistillConfig(preset="released")
LOG2 = math.log(2)


def loss_of(batch: Any, chosen: DistillConfig, logits_SV: Tensor | None = None) -> Tensor:
    logits_SV = batch.logits_SV if logits_SV is None else logits_SV
    return bellman_loss_from_logits(logits_SV, batch.sets, batch.trajectories, chosen, **batch.counts).loss


def test_loss_of_known_numbers() -> None:
    """A stopped row of three tokens, vocabulary 4; the last state is dropped, and its value is not seen.

    As exp, over the maximum: 1, 1/2, 1/4, 1/4 with set {0, 1}, so Q is 0 and -log 2, V = log 3/2;
    1, 1/2, 1/2, 1/2 with set {0}: Q = 0, V = 0. V'_0 = V_1 = 0; V'_1 = 0, the response ends after it.
    """
    logits = torch.log(torch.tensor([[4, 2, 1, 1], [2, 1, 1, 1], [9, 1, 1, 1]], dtype=torch.float64))
    sets = CandidateSets(torch.tensor([0, 1, 0, 1]), torch.tensor([0, 2, 3, 4]), torch.zeros(3), None)
    row = Trajectories(
        torch.tensor([1, 0, 3]), torch.tensor([1, 2, -1]), torch.tensor([False, False, True]), torch.zeros(3).long()
    )
    linear = math.log(1.5) + LOG2 / 4
    penalty = LOG2**2 / (4 * 0.1 * 4)
    terms = bellman_loss_from_logits(logits, sets, row, RELEASED, num_tokens=3, num_rows=5)
    assert float(terms.loss) == pytest.approx((linear + penalty) / 2 / 5, abs=1e-15)
    metrics = mean_metrics(terms.metrics)
    assert metrics["linear_loss"] == pytest.approx(linear / 2)
    assert metrics["td_loss"] == pytest.approx(penalty / 2)


def over_the_vocabulary(batch: Any, *, alpha: float = 0.1, gamma: float = 0.99, q_min: float = -10.0) -> Tensor:
    """The same from whole rows of masked Q, as tensors padded to the longest response."""
    vocab_size = batch.logits_SV.shape[1]
    total, start = batch.logits_SV.new_zeros(()), 0
    for rollout in batch.rollouts:
        length = len(rollout.response_ids)
        states = range(start, start + length)
        q_TV = torch.stack([(batch.logits_SV[s] - batch.logits_SV[s].max()).clamp(min=q_min) for s in states])
        mask_TV = torch.zeros(length, vocab_size, dtype=torch.float64)
        for t, s in enumerate(states):
            mask_TV[t, batch.sets.ids_M[batch.sets.offsets_S1[s] : batch.sets.offsets_S1[s + 1]]] = 1
        value_T = (q_TV.exp() * mask_TV).sum(dim=1).log()
        # Padding is the stop token: the state of the stop token is masked with it.
        counted_T = torch.ones(length, dtype=torch.float64)
        counted_T[-1] = float(rollout.finish_reason == "length")
        next_T = gamma * (value_T * counted_T)[1:]
        masked_TV = (mask_TV * q_TV)[:-1]
        reward_TV = masked_TV - next_T[:, None]
        linear = -reward_TV.mean(dim=1) + value_T[:-1] - next_T
        row = (linear + reward_TV.square().mean(dim=1) / (4 * alpha)).sum() / max(length - 1, 1)
        total = total + row
        start += length + (rollout.finish_reason == "length")
    return total / len(batch.rollouts)


def test_formula_needs_no_vocabulary(make_batch: Callable) -> None:
    """From the sets alone comes what means over the whole vocabulary give, loss and gradient."""
    for seed in range(20):
        batch = make_batch(ROWS, seed=seed, vocab_size=30, spread=3.0)
        ours_SV, theirs_SV = (batch.logits_SV.clone().requires_grad_() for _ in range(2))
        loss = loss_of(batch, RELEASED, ours_SV)
        expected = over_the_vocabulary(replace(batch, logits_SV=theirs_SV))
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        loss.backward()
        expected.backward()
        torch.testing.assert_close(ours_SV.grad, theirs_SV.grad, rtol=1e-9, atol=1e-12)


def test_shuffled_responses_change_the_paper_and_not_the_released_code(make_batch: Callable) -> None:
    """The published objective learns from the tokens that were taken; the published code does not look at them."""
    batch = make_batch([(8, "stop"), (6, "length")], seed=60, vocab_size=20)
    order = torch.tensor([3, 1, 6, 0, 5, 2, 4, 7, 13, 8, 11, 9, 12, 10, 14])  # the stop and the state after a cut stay
    taken_S = batch.trajectories.taken_S[order]
    assert not torch.equal(taken_S, batch.trajectories.taken_S)
    shuffled = replace(batch, trajectories=replace(batch.trajectories, taken_S=taken_S))
    assert loss_of(shuffled, RELEASED) == loss_of(batch, RELEASED)
    paper = DistillConfig(preset="paper")
    assert abs(loss_of(shuffled, paper) - loss_of(batch, paper)) > 1e-2


def test_rows_of_one_token_count_as_rows_alone(make_batch: Callable) -> None:
    """The only state of such a row is its last: it gives no term and no NaN."""
    batch = make_batch([(1, "stop"), (1, "length")], seed=61)
    z_SV = batch.logits_SV.clone().requires_grad_()
    loss = loss_of(batch, RELEASED, z_SV)
    loss.backward()
    assert loss.item() == 0.0
    assert z_SV.grad is not None
    assert not z_SV.grad.any()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("linear_term", "expected"),
        ("out_of_set", "zero"),
        ("regulariser", "js"),
        ("terminal", "drop_chi"),
        ("truncated", "drop"),
        ("next_value_gradient", "stop"),
        ("reduction", "token"),
    ],
)
def test_options_that_the_code_does_not_have_are_refused(make_batch: Callable, name: str, value: str) -> None:
    """An option without effect would pass for one with."""
    chosen = DistillConfig.model_validate({"preset": "released", name: value})
    with pytest.raises(ConfigError, match=f"no {name} {value} .{name} {RELEASED_OPTIONS[name]} there."):
        loss_of(make_batch(ROWS), chosen)


def test_released_needs_a_mask(make_batch: Callable) -> None:
    """At p = 1 the sum of Q over the set would be one over the vocabulary."""
    with pytest.raises(ConfigError, match="use a top_p below 1"):
        loss_of(make_batch(ROWS), DistillConfig(preset="released", top_p=1.0))
