"""The loss itself: literals, equivalences that define it, and refused options."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from openrlhf_bd.config import BellmanOptions
from openrlhf_bd.errors import ConfigError
from openrlhf_bd.functional.bellman import bellman_loss, bellman_loss_from_logits, td_scale_at
from openrlhf_bd.functional.candidates import CandidateSets, top_p_candidates
from openrlhf_bd.functional.head import DenseHead, HeadStatistics
from openrlhf_bd.functional.metrics import mean_metrics
from openrlhf_bd.functional.segments import segment_logsumexp
from openrlhf_bd.functional.trajectories import Trajectories

LOG2, LOG3 = math.log(2), math.log(3)

# One stopped row of two tokens, vocabulary 3. State 0: logits 1, 1, 3 (as exp), set {2, 1}, takes 2.
# State 1: 2, 2, 4, set {0, 1}, takes the stop token 0. V_0 = log(3 + 1), V_1 = log(2 + 2).
LOGITS = torch.log(torch.tensor([[1.0, 1.0, 3.0], [2.0, 2.0, 4.0]], dtype=torch.float64))
SETS = CandidateSets(
    torch.tensor([2, 1, 0, 1]),
    torch.tensor([0, 2, 4]),
    torch.tensor([-math.log(0.8), 0.0], dtype=torch.float64),
    torch.log(torch.tensor([0.6, 0.2, 0.5, 0.5], dtype=torch.float64)),
)
ROW = Trajectories(torch.tensor([2, 0]), torch.tensor([1, -1]), torch.tensor([False, True]), torch.tensor([0, 0]))
LINEAR = [math.log(4 / 3), LOG2]  # pibar(2 | s_0) = 3/4, pibar(0 | s_1) = 2/4
# .8 and .2 inside and outside for the teacher, 4/5 and 1/5 for the student; 1 and 0 against 4/8 and 4/8.
TAIL = [-0.8 * math.log(0.8) - 0.2 * math.log(0.2), LOG2]


def options(**values: object) -> BellmanOptions:
    plain = {"q_shift": "none", "terminal": "drop_chi", "linear_term": "sampled", "tail_coef": 0.0}
    return BellmanOptions.model_validate({**plain, "gamma": 0.5, "alpha": 0.5, **values})


def loss_of(chosen: BellmanOptions, *, num_tokens: float = 2.0, num_rows: float = 1.0, **given: object) -> float:
    terms = bellman_loss_from_logits(
        LOGITS,
        SETS,
        ROW,
        chosen,
        num_tokens=num_tokens,
        num_rows=num_rows,
        **given,  # type: ignore[arg-type]
    )
    return float(terms.loss)


def test_loss_of_known_numbers() -> None:
    """Eq. 17 worked out: linear log 4/3 and log 2, reward r_0 = log 3 - (1/2) log 4, chi-squared r_0^2 / 2."""
    reward = LOG3 - LOG2
    assert loss_of(options()) == pytest.approx((sum(LINEAR) + reward**2 / 2) / 2, abs=1e-15)
    # terminal zero with the maximum as shift (3 and 4): Q_0 = log 1, V_0 = log 4/3, Q_1 = log 1/2, V_1 = log 1.
    chosen = options(q_shift="max", terminal="zero")
    assert loss_of(chosen) == pytest.approx((sum(LINEAR) + 0.0 + LOG2**2 / 2) / 2, abs=1e-15)
    # absorbing: r_1 = (1 - 1/2) log 1/2.
    chosen = options(q_shift="max", terminal="absorbing")
    assert loss_of(chosen) == pytest.approx((sum(LINEAR) + (LOG2 / 2) ** 2 / 2) / 2, abs=1e-15)
    # A constant of log 2: r_0 = log 3/2 - (1/2) log 2.
    chosen = options(q_shift="constant")
    reward = math.log(1.5) - LOG2 / 2
    assert loss_of(chosen, shift_constant=LOG2) == pytest.approx((sum(LINEAR) + reward**2 / 2) / 2, abs=1e-15)


def test_temperature_divides_the_logits() -> None:
    """tau = 1/2 squares the exp of the logits: pibar = 9/10 and 1/2."""
    chosen = options(tau=0.5, regulariser="none")
    assert loss_of(chosen) == pytest.approx((math.log(10 / 9) + LOG2) / 2, abs=1e-15)


def test_expected_linear_term_of_known_numbers() -> None:
    """State 0: .8 [3/4 log 4/3 + 1/4 log 4]; state 1: log 2; chi-squared stays at the sampled action."""
    linear = 0.8 * (0.75 * math.log(4 / 3) + 0.25 * math.log(4)) + LOG2
    expected = (linear + (LOG3 - LOG2) ** 2 / 2) / 2
    assert loss_of(options(linear_term="expected")) == pytest.approx(expected, abs=1e-15)


def test_tail_of_known_numbers() -> None:
    """-P log P_theta - (1 - P) log(1 - P_theta), times its coefficient, at every state with an action."""
    chosen = options(tail_coef=3.0, regulariser="none")
    assert loss_of(chosen) == pytest.approx((sum(LINEAR) + 3 * sum(TAIL)) / 2, abs=1e-15)


def test_denominators_are_arguments() -> None:
    """token: sum over this micro-batch / global tokens; sequence: sum of per-row means / global rows."""
    chosen = options(regulariser="none")
    assert loss_of(chosen, num_tokens=10, num_rows=4) == pytest.approx(sum(LINEAR) / 10, abs=1e-15)
    chosen = options(regulariser="none", reduction="sequence")
    assert loss_of(chosen, num_tokens=10, num_rows=4) == pytest.approx(sum(LINEAR) / 2 / 4, abs=1e-15)


def iq_learn_value_expert(
    logits_SV: Tensor, rows: list[list[int]], reasons: list[str], *, alpha: float, gamma: float
) -> Tensor:
    """-E[phi(r)] + E[V(s) - gamma V(s')] over the full vocabulary (Garg et al. 2021), row by row, state by state."""
    total, start = logits_SV.new_zeros(()), 0
    num_tokens = sum(len(row) for row in rows)
    for row, reason in zip(rows, reasons, strict=True):
        for t, action in enumerate(row):
            q_V = logits_SV[start + t]
            if reason == "stop" and t == len(row) - 1:
                discounted = logits_SV.new_zeros(())
            else:
                discounted = gamma * logits_SV[start + t + 1].exp().sum().log()
            reward = q_V[action] - discounted
            phi = reward - reward**2 / (4 * alpha)
            total = total - phi + q_V.exp().sum().log() - discounted
        start += len(row) + (reason == "length")
    return total / num_tokens


def test_p_of_one_is_iq_learn(make_batch: Callable) -> None:
    """Without a mask the loss and its gradient are IQ-Learn's value_expert with chi-squared."""
    rows = [(5, "stop"), (4, "length"), (1, "stop"), (1, "length")]
    batch = make_batch(rows, top_p=1.0, seed=4)
    chosen = BellmanOptions.model_validate(
        {"top_p": 1.0, "q_shift": "constant", "terminal": "zero", "linear_term": "sampled", "tail_coef": 0.0}
        | {"alpha": 0.3, "gamma": 0.9}
    )
    ours = batch.logits_SV.clone().requires_grad_()
    loss = bellman_loss_from_logits(
        ours, batch.sets, batch.trajectories, chosen, shift_constant=0.0, **batch.counts
    ).loss
    theirs = batch.logits_SV.clone().requires_grad_()
    tokens = [rollout.response_ids.tolist() for rollout in batch.rollouts]
    reference = iq_learn_value_expert(theirs, tokens, [reason for _, reason in rows], alpha=0.3, gamma=0.9)
    torch.testing.assert_close(loss, reference, rtol=1e-13, atol=0)
    loss.backward()
    reference.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-11, atol=1e-13)


def chi_squared(batch: Any, next_SV: Tensor, chosen: BellmanOptions, *, shift_constant: float) -> Tensor:
    """sum r^2 / (4 alpha) where a next state exists, Q from the batch's logits and V' from others, one by one."""

    def shifted(z_SV: Tensor, s: int, ids: Tensor) -> Tensor:
        shift = {
            "constant": shift_constant,
            "max": z_SV[s].max(),
            "topp_max": z_SV[s, ids].max(),
            "logsumexp": z_SV[s].logsumexp(0),
        }[chosen.q_shift]
        return z_SV[s, ids] - shift

    total = next_SV.new_zeros(())
    for s, (taken, following) in enumerate(
        zip(batch.trajectories.taken_S.tolist(), batch.trajectories.next_S.tolist(), strict=True)
    ):
        ids, after = (batch.sets.ids_M[batch.sets.state_M == state] for state in (s, following))
        if following >= 0 and taken in ids.tolist():
            q = shifted(batch.logits_SV, s, ids)[ids.tolist().index(taken)]
            reward = q - chosen.gamma * shifted(next_SV, following, after).logsumexp(0)
            total = total + reward**2 / (4 * chosen.alpha)
    return total


@pytest.mark.parametrize("q_shift", ["constant", "max", "max_detached", "topp_max", "logsumexp"])
def test_linear_part_is_the_projected_log_likelihood(make_batch: Callable, q_shift: str) -> None:
    """-Q(a) + V = -log pibar(a), pointwise and for any shift, pibar by renormalised softmax."""
    batch = make_batch([(6, "stop"), (5, "length")], seed=5)
    probs_SV = torch.softmax(batch.logits_SV, dim=1)
    expected = 0.0
    for state, taken in enumerate(batch.trajectories.taken_S.tolist()):
        ids = batch.sets.ids_M[batch.sets.offsets_S1[state] : batch.sets.offsets_S1[state + 1]].tolist()
        if taken in ids:
            expected -= math.log(probs_SV[state, taken] / probs_SV[state, ids].sum())
    chosen = options(q_shift=q_shift, regulariser="none")
    terms = bellman_loss_from_logits(
        batch.logits_SV, batch.sets, batch.trajectories, chosen, num_tokens=1, num_rows=1, shift_constant=2.5
    )
    assert float(terms.loss) == pytest.approx(expected, rel=1e-12)


def test_expected_is_the_conditional_mean_of_sampled(make_batch: Callable) -> None:
    """Averaged over the teacher's tokens at each state, the sampled linear term is the expected one."""
    batch = make_batch([(4, "length")], seed=6, vocab_size=6, always_include=[0])
    teacher_SV = torch.softmax(batch.teacher_SV, dim=1)

    def linear_loss(term: str, taken: int) -> float:
        trajectories = replace(batch.trajectories, taken_S=torch.tensor([taken] * 4 + [-1]))
        chosen = options(linear_term=term, regulariser="none")
        return bellman_loss_from_logits(  # the first state alone: the others have weight 0
            batch.logits_SV[:1],
            CandidateSets(
                batch.sets.ids_M[: batch.sets.sizes_S[0]],
                batch.sets.offsets_S1[:2],
                batch.sets.neg_log_mass_S[:1],
                batch.sets.logprobs_M[: batch.sets.sizes_S[0]],
            ),
            Trajectories(trajectories.taken_S[:1], torch.tensor([-1]), torch.tensor([False]), torch.tensor([0])),
            chosen,
            num_tokens=1,
            num_rows=1,
        ).loss.item()

    mean = sum(float(teacher_SV[0, token]) * linear_loss("sampled", token) for token in range(6))
    assert linear_loss("expected", 0) == pytest.approx(mean, rel=1e-12)
    assert linear_loss("expected", 0) == linear_loss("expected", 5)


def test_expected_with_tail_is_the_coarsened_cross_entropy(make_batch: Callable, exact: Callable) -> None:
    """P E[-log pibar] + tail = cross-entropy of {each candidate, everything else}; of all ids, the full one."""
    batch = make_batch([(5, "length")], seed=7)
    chosen = options(linear_term="expected", regulariser="none", tail_coef=1.0)
    all_ids = exact(batch.teacher_SV, top_p_candidates(batch.teacher_SV, top_p=0.5, always_include=range(7)))
    assert all_ids.num_candidates == batch.teacher_SV.numel()
    for sets in (batch.sets, all_ids):
        loss = bellman_loss_from_logits(
            batch.logits_SV, sets, batch.trajectories, chosen, num_tokens=1, num_rows=1
        ).loss
        expected = 0.0
        teacher_SV, student_SV = (torch.softmax(z, dim=1) for z in (batch.teacher_SV, batch.logits_SV))
        for state in range(5):
            ids = sets.ids_M[sets.offsets_S1[state] : sets.offsets_S1[state + 1]]
            teacher, student = teacher_SV[state, ids], student_SV[state, ids]
            expected -= float((teacher * student.log()).sum())
            if len(ids) < teacher_SV.shape[1]:
                expected -= float((1 - teacher.sum()) * (1 - student.sum()).log())
        assert float(loss) == pytest.approx(expected, rel=1e-10)


def test_tail_holds_a_student_far_too_sure_in_float32() -> None:
    """Logits 60 nats apart: loss and gradient are right where 1 - P_theta is 0 in float32."""
    z = torch.tensor([[60.0, 0.0, 0.0]], requires_grad=True)
    sets = CandidateSets(torch.tensor([0]), torch.tensor([0, 1]), torch.tensor([-math.log(0.9)]), None)
    head = DenseHead(z)
    tail = head.tail(
        sets,
        segment_logsumexp(head.at_candidates(sets), sets.state_M, 1),
        torch.ones(1),
        estimator="exact",
        num_samples=1,
        tolerance=0.0,
        generator=None,
    ).sum
    # -.9 log P_theta is 0 and log(1 - P_theta) = log 2 - 60.
    assert float(tail.detach()) == pytest.approx(0.1 * (60 - LOG2), rel=1e-6)
    tail.backward()
    # P_theta - P on the inside logit; minus half of it on each of the two outside.
    torch.testing.assert_close(z.grad, torch.tensor([[0.1, -0.05, -0.05]]))


def test_constant_shift_must_be_given() -> None:
    """The robust preset without its constant is an error."""
    with pytest.raises(ConfigError, match="constant"):
        loss_of(BellmanOptions())


def test_mismatched_inputs_are_refused() -> None:
    """Different numbers of states, or a count that is not positive, are errors."""
    with pytest.raises(ValueError, match="numbers of states differ"):
        bellman_loss_from_logits(LOGITS[:1], SETS, ROW, options(), num_tokens=2, num_rows=1)
    with pytest.raises(ValueError, match="must be positive"):
        loss_of(options(), num_tokens=0)
    with pytest.raises(ConfigError, match=r"top_p is 0\.95"):
        bellman_loss_from_logits(LOGITS, CandidateSets.whole(2), ROW, options(), num_tokens=2, num_rows=1)


def test_warm_up_scales_the_regulariser_alone() -> None:
    """td_scale w: linear + w r^2 / 2, and the metric td_loss is the scaled one; the tail keeps its weight."""
    reward = LOG3 - LOG2
    for scale in (0.0, 0.25, 1.0):
        chosen = options(tail_coef=1.0)
        expected = (sum(LINEAR) + scale * reward**2 / 2 + sum(TAIL)) / 2
        assert loss_of(chosen, td_scale=scale) == pytest.approx(expected, abs=1e-15)
    terms = bellman_loss_from_logits(LOGITS, SETS, ROW, options(), num_tokens=2, num_rows=1, td_scale=0.25)
    assert mean_metrics(terms.metrics)["td_loss"] == pytest.approx(0.25 * reward**2 / 2 / 2)


def test_warm_up_is_linear_in_the_step() -> None:
    """Over 4 steps: 1/4, 2/4, 3/4, 1, and 1 from then on; without a warm-up 1 at once."""
    chosen = options(td_warmup_steps=4)
    assert [td_scale_at(step, chosen) for step in range(1, 7)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert td_scale_at(1, options()) == 1.0


@pytest.mark.parametrize("q_shift", ["constant", "max", "topp_max", "logsumexp"])
def test_next_values_of_a_target_network(make_batch: Callable, q_shift: str) -> None:
    """`target`: V' is the slow copy's, under the same shift rule, without gradient; all else is the student's."""
    batch = make_batch([(4, "stop"), (3, "length")], seed=8)
    z_SV, slow_SV = batch.logits_SV.clone().requires_grad_(), batch.logits_SV.flip(0).requires_grad_()
    given = {"shift_constant": 0.4, **batch.counts}
    target, stop = (options(q_shift=q_shift, gamma=0.9, next_value_gradient=mode) for mode in ("target", "stop"))
    loss = bellman_loss_from_logits(
        z_SV, batch.sets, batch.trajectories, target, target_logits_SV=slow_SV, **given
    ).loss
    loss.backward()
    assert slow_SV.grad is None
    # The linear part is that of `stop`; the rewards are worked out state by state.
    plain = bellman_loss_from_logits(batch.logits_SV, batch.sets, batch.trajectories, stop, **given).loss
    penalties = [chi_squared(batch, z.detach(), stop, shift_constant=0.4) for z in (slow_SV, batch.logits_SV)]
    expected = plain + (penalties[0] - penalties[1]) / batch.counts["num_tokens"]
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-12, atol=0)


def test_student_as_its_own_target_is_stop_gradient(make_batch: Callable) -> None:
    """A target network equal to the student gives loss and gradient of `stop`."""
    batch = make_batch([(4, "stop"), (3, "length")], seed=9)
    results = []
    for mode, target in (("target", batch.logits_SV), ("stop", None)):
        z_SV = batch.logits_SV.clone().requires_grad_()
        chosen = options(q_shift="max", terminal="absorbing", next_value_gradient=mode)
        terms = bellman_loss_from_logits(
            z_SV, batch.sets, batch.trajectories, chosen, target_logits_SV=target, **batch.counts
        )
        terms.loss.backward()
        results.append((terms.loss.detach(), z_SV.grad))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=0)


def test_target_network_must_be_given() -> None:
    """Without the target's logits the option is an error, never a silent `stop`."""
    with pytest.raises(ConfigError, match="target_head"):
        loss_of(options(next_value_gradient="target"))


def test_metrics_of_the_vocabulary_only_where_they_are_free(make_batch: Callable) -> None:
    """A head whose statistics cost a pass of their own is asked for them only with full_diagnostics."""
    batch = make_batch([(4, "stop")], seed=10)

    class CountingHead(DenseHead):
        statistics_are_free = False
        asked = 0

        def statistics(self) -> HeadStatistics:
            CountingHead.asked += 1
            return super().statistics()

    names = []
    for full in (False, True):
        terms = bellman_loss(
            CountingHead(batch.logits_SV),
            batch.sets,
            batch.trajectories,
            options(),
            full_diagnostics=full,
            **batch.counts,
        )
        names.append(set(terms.metrics))
        assert CountingHead.asked == int(full)
    of_vocabulary = {"logsumexp", "logsumexp_second_moment", "student_mass", "entropy", "top1_overlap", "nll"}
    assert names[1] - names[0] == of_vocabulary
