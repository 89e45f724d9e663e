"""The gradient: the closed form, autograd and finite differences agree; and what it must not touch."""

# S states, V vocabulary

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from openrlhf_bd.config import BellmanOptions
from openrlhf_bd.functional.bellman import bellman_loss_from_logits

ROWS = [(4, "stop"), (3, "length"), (1, "stop"), (1, "length")]
SHIFT = 0.7
CASES = list(
    itertools.product(
        ["none", "constant", "max", "max_detached", "topp_max", "logsumexp"],
        ["sampled", "expected"],
        [None, -1.5],
        ["full", "stop"],
        ["zero", "drop_chi"],
    )
)


def options(**values: Any) -> BellmanOptions:
    return BellmanOptions.model_validate({"alpha": 0.4, "gamma": 0.9, "tail_coef": 0.0, **values})


def loss(logits_SV: Tensor, batch: Any, chosen: BellmanOptions) -> Tensor:
    return bellman_loss_from_logits(
        logits_SV, batch.sets, batch.trajectories, chosen, shift_constant=SHIFT, **batch.counts
    ).loss


def closed_form(batch: Any, chosen: BellmanOptions) -> Tensor:
    """dL/dz, one state after another.

    dL/dQ_t(a) = (1/N) [ beta_t pibar_t(a) - u_t 1{a = a_t} + U_t 1{a = a_t} ] in A_t, zero where Q is clipped,
    U_t = 2 c u_t d_t r_t,  c = 1/(4 alpha),  beta_t = u_t - gamma U_{t-1}; expected: P_t (pibar - proj pi*) in place
    of u_t (pibar - 1{a = a_t}). Then the shift takes S_t = sum_a dL/dQ_t(a) from its own argument.
    """
    z_SV, sets, steps = batch.logits_SV, batch.sets, batch.trajectories
    taken = steps.taken_S.tolist()
    q_min = -float("inf") if chosen.q_min is None else chosen.q_min
    members = [sets.ids_M[sets.offsets_S1[s] : sets.offsets_S1[s + 1]].tolist() for s in range(len(z_SV))]
    q, value = [], []
    for s, ids in enumerate(members):
        shift = {
            "none": 0.0,
            "constant": SHIFT,
            "max": z_SV[s].max(),
            "max_detached": z_SV[s].max(),
            "topp_max": z_SV[s, ids].max(),
            "logsumexp": z_SV[s].exp().sum().log(),
        }[chosen.q_shift]
        q.append({a: max(float(z_SV[s, a] - shift), q_min) for a in ids})
        value.append(math.log(sum(math.exp(q_a) for q_a in q[s].values())))
    grad_SV, pull = torch.zeros_like(z_SV), 0.0
    for s, ids in enumerate(members):
        grad = dict.fromkeys(ids, 0.0)
        from_before = chosen.gamma * pull if s > 0 and steps.next_S[s - 1] == s else 0.0
        u = float(taken[s] in ids)
        follows = steps.next_S[s] >= 0
        has_next = taken[s] >= 0 and bool(follows or (steps.terminal_S[s] and chosen.terminal == "zero"))
        next_value = value[s + 1] if follows else 0.0
        reward = q[s][taken[s]] - chosen.gamma * next_value if u else 0.0
        pull = 2 / (4 * chosen.alpha) * u * has_next * reward
        mass = float(torch.exp(-sets.neg_log_mass_S[s]))
        start = int(sets.offsets_S1[s])
        for k, a in enumerate(ids):
            policy = math.exp(q[s][a] - value[s])
            if taken[s] >= 0 and chosen.linear_term == "expected":
                grad[a] += mass * (policy - float(sets.logprobs_M[start + k].exp()) / mass)
            elif taken[s] >= 0:
                grad[a] += u * (policy - (a == taken[s]))
            if chosen.next_value_gradient == "full":
                grad[a] -= from_before * policy
            grad[a] += pull * (a == taken[s])
            if q[s][a] == q_min:
                grad[a] = 0.0
        total = sum(grad.values())
        for a in ids:
            grad_SV[s, a] += grad[a]
        if chosen.q_shift == "max":
            grad_SV[s, z_SV[s].argmax()] -= total
        elif chosen.q_shift == "topp_max":
            grad_SV[s, max(ids, key=lambda a: float(z_SV[s, a]))] -= total
        elif chosen.q_shift == "logsumexp":
            grad_SV[s] -= torch.softmax(z_SV[s], dim=0) * total
        if taken[s] < 0 or steps.terminal_S[s] or not follows:
            pull = 0.0
    return grad_SV / batch.counts["num_tokens"]


@pytest.mark.parametrize("q_shift", ["none", "constant", "max", "max_detached", "topp_max", "logsumexp"])
def test_gradient_is_the_closed_form(make_batch: Callable, q_shift: str) -> None:
    """Autograd equals the closed form for every combination of shift, linear term, clip, next value and terminal."""
    for seed, case in enumerate(case for case in CASES if case[0] == q_shift):
        _, linear_term, q_min, next_value_gradient, terminal = case
        if q_shift == "none" and terminal == "zero":
            continue
        chosen = options(
            q_shift=q_shift,
            linear_term=linear_term,
            q_min=q_min,
            next_value_gradient=next_value_gradient,
            terminal=terminal,
        )
        batch = make_batch(ROWS, seed=seed)
        z_SV = batch.logits_SV.clone().requires_grad_()
        loss(z_SV, batch, chosen).backward()
        torch.testing.assert_close(z_SV.grad, closed_form(batch, chosen), rtol=1e-9, atol=1e-12)


def test_closed_form_agrees_with_finite_differences(make_batch: Callable) -> None:
    """400 random micro-batches and options: the closed form along a random direction is the central difference."""
    names = ("q_shift", "linear_term", "q_min", "next_value_gradient", "terminal")
    # Where a gradient is stopped, the formula is not the derivative of the loss as a whole.
    whole = [case for case in CASES if case[0] != "max_detached" and case[3] == "full"]
    cases = [case for case in whole if (case[0], case[4]) != ("none", "zero")]
    worst, step = 0.0, 1e-5
    for seed in range(400):
        case = cases[seed % len(cases)]
        chosen = options(**dict(zip(names, case, strict=True)), alpha=0.1 + seed % 7, gamma=(seed % 11) / 10)
        batch = make_batch(ROWS, seed=1000 + seed, vocab_size=5 + seed % 4)
        direction_SV = torch.randn(batch.logits_SV.shape, dtype=torch.float64, generator=torch.manual_seed(seed))
        with torch.no_grad():
            up, down = (loss(batch.logits_SV + sign * step * direction_SV, batch, chosen) for sign in (1, -1))
        along = float((closed_form(batch, chosen) * direction_SV).sum())
        worst = max(worst, abs(along - float(up - down) / (2 * step)) / max(1.0, abs(along)))
    assert worst < 2e-8


VARIANTS = [
    {"q_shift": "max", "linear_term": "sampled"},
    {"q_shift": "topp_max", "tail_coef": 0.7},
    {"q_shift": "logsumexp", "tail_coef": 1.0, "reduction": "sequence"},
    {"q_shift": "constant", "tau": 1.3, "tail_coef": 0.5, "terminal": "absorbing"},
    {"q_shift": "constant", "q_min": -1.0, "out_of_set": "clip", "linear_term": "sampled"},
    {"q_shift": "constant", "out_of_set": "zero", "linear_term": "sampled", "truncated": "drop"},
    {"q_shift": "constant", "regulariser": "kl_fix"},
    {"q_shift": "constant", "regulariser": "hellinger"},
    {"q_shift": "constant", "regulariser": "js"},
]


@pytest.mark.parametrize("values", VARIANTS)
def test_gradient_agrees_with_finite_differences(make_batch: Callable, values: dict[str, Any]) -> None:
    """Central differences of the float64 loss at every logit, for variants that the closed form leaves out too."""
    batch, chosen, step = make_batch([(3, "stop"), (2, "length")], seed=11, vocab_size=5), options(**values), 1e-6
    z_SV = batch.logits_SV.clone().requires_grad_()
    loss(z_SV, batch, chosen).backward()
    numeric_SV = torch.zeros_like(z_SV)
    for s, a in itertools.product(range(z_SV.shape[0]), range(z_SV.shape[1])):
        moved_SV = torch.zeros_like(z_SV)
        moved_SV[s, a] = step
        with torch.no_grad():
            up, down = (loss(z_SV + sign * moved_SV, batch, chosen) for sign in (1, -1))
        numeric_SV[s, a] = (up - down) / (2 * step)
    torch.testing.assert_close(z_SV.grad, numeric_SV, rtol=1e-6, atol=2e-8)


@pytest.mark.parametrize("q_shift", ["constant", "max", "max_detached", "topp_max"])
def test_gradient_stays_inside_the_sets(make_batch: Callable, q_shift: str) -> None:
    """Logits outside A_t get exactly zero; with shift max the row's argmax is the one exception."""
    batch = make_batch(ROWS, seed=12, vocab_size=9)
    z_SV = batch.logits_SV.clone().requires_grad_()
    loss(z_SV, batch, options(q_shift=q_shift)).backward()
    outside_SV = torch.ones_like(batch.logits_SV, dtype=torch.bool)
    outside_SV[batch.sets.state_M, batch.sets.ids_M] = False
    argmax_SV = torch.nn.functional.one_hot(batch.logits_SV.argmax(dim=1), 9).bool()
    assert (outside_SV & argmax_SV).any()
    if q_shift == "max":
        assert (z_SV.grad[outside_SV & argmax_SV] != 0).any()
        outside_SV &= ~argmax_SV
    assert (z_SV.grad[outside_SV] == 0).all()
    assert (z_SV.grad[~outside_SV] != 0).any()


def test_stopped_next_value_gets_no_gradient(make_batch: Callable) -> None:
    """With `stop`, the state after a cut response, which only serves as a next state, has zero gradient."""
    batch = make_batch([(3, "length")], seed=13, vocab_size=6, top_p=0.95)
    for mode, expect_zero in (("stop", True), ("full", False)):
        z_SV = batch.logits_SV.clone().requires_grad_()
        loss(z_SV, batch, options(q_shift="constant", next_value_gradient=mode)).backward()
        assert bool((z_SV.grad[-1] == 0).all()) == expect_zero
