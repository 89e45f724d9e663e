"""Rows that the student sampled, in the Bellman Distill objective."""

# S states

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from openrlhf_bd.config import BellmanOptions, DistillConfig
from openrlhf_bd.errors import ConfigError
from openrlhf_bd.functional.bellman import BellmanTerms, bellman_loss_from_logits
from openrlhf_bd.functional.candidates import CandidateSets
from openrlhf_bd.functional.head import DenseHead
from openrlhf_bd.functional.metrics import mean_metrics
from openrlhf_bd.functional.trajectories import Behaviour, Trajectories
from openrlhf_bd.functional.values import action_values, transitions
from tests.unit.functional.conftest import as_online

LOG2 = math.log(2)

# A stopped row of two tokens, vocabulary 3. State 0: logits 1, 2, 2 (as exp), set {2, 1}, takes 0, which is outside.
# State 1: 2, 2, 4, set {0, 1}, takes the stop token 0. V_0 = log 4, V_1 = log 4; pibar is 1/2, 1/2 in both.
LOGITS = torch.log(torch.tensor([[1.0, 2.0, 2.0], [2.0, 2.0, 4.0]], dtype=torch.float64))
SETS = CandidateSets(
    torch.tensor([2, 1, 0, 1]),
    torch.tensor([0, 2, 4]),
    torch.tensor([-math.log(0.8), 0.0], dtype=torch.float64),
    torch.log(torch.tensor([0.6, 0.2, 0.5, 0.5], dtype=torch.float64)),
)
FORWARD = [0.8 * LOG2, LOG2]
REVERSE = [0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25), 0.0]
REWARDS = [-LOG2, LOG2]  # log 1 - (1/2) log 4, log 2 after the stop token
# Mass inside: teacher .8 and 1, student 4/5 and 4/8.
TAIL = [-0.8 * math.log(0.8) - 0.2 * math.log(0.2), LOG2]


def row(*, is_student: bool = True) -> Trajectories:
    return Trajectories(
        torch.tensor([0, 0]),
        torch.tensor([1, -1]),
        torch.tensor([False, True]),
        torch.tensor([0, 0]),
        Behaviour(
            torch.full((2,), is_student), torch.log(torch.tensor([0.25, 0.5])), torch.log(torch.tensor([0.1, 0.5]))
        ),
    )


def terms_of(trajectories: Trajectories | None = None, *, sets: CandidateSets = SETS, **values: object) -> BellmanTerms:
    plain = {"q_shift": "constant", "linear_term": "sampled", "gamma": 0.5, "alpha": 0.5, "tail_coef": 0.0}
    return bellman_loss_from_logits(
        LOGITS,
        sets,
        trajectories or row(),
        BellmanOptions.model_validate({**plain, **values}),
        num_tokens=2,
        num_rows=1,
        shift_constant=0.0,
    )


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"student_target": "none", "student_td": False}, [0.0, 0.0]),
        ({"student_target": "forward", "student_td": False}, FORWARD),
        ({"student_target": "reverse", "student_td": False}, REVERSE),
        # chi-squared with 1/(4 alpha) = 1/2, of the action that is in its set alone
        ({"student_target": "none"}, [0.0, REWARDS[1] ** 2 / 2]),
        # and r + r^2/(4 alpha) of the other
        (
            {"student_target": "none", "student_out_of_set": "penalise"},
            [REWARDS[0] + REWARDS[0] ** 2 / 2, REWARDS[1] ** 2 / 2],
        ),
        ({"student_target": "none", "student_td": False, "tail_coef": 3.0}, [3 * x for x in TAIL]),
        ({"student_target": "none", "student_td": False, "tail_coef": 3.0, "student_tail": False}, [0.0, 0.0]),
        # The teacher's rows' own choice for tokens outside their set does not reach the student's.
        ({"student_target": "none", "out_of_set": "zero"}, [0.0, REWARDS[1] ** 2 / 2]),
        ({"student_target": "forward", "linear_term": "expected", "student_td": False}, FORWARD),
    ],
)
def test_terms_of_known_numbers(values: dict[str, object], expected: list[float]) -> None:
    """Each option's term, worked out by hand."""
    assert float(terms_of(**values).loss) == pytest.approx(sum(expected) / 2, abs=1e-12)


def test_penalised_reward_is_least_at_minus_two_alpha() -> None:
    """r + r^2/(4 alpha) is -alpha at r = -2 alpha, a logit of -2 alpha + gamma V', and has no gradient there."""
    z_SV = LOGITS.clone()
    z_SV[0, 0] = -2 * 0.5 + 0.5 * 2 * LOG2
    z_SV.requires_grad_()
    chosen = BellmanOptions.model_validate(
        {"q_shift": "constant", "gamma": 0.5, "alpha": 0.5, "tail_coef": 0.0, "student_target": "none"}
        | {"student_out_of_set": "penalise", "linear_term": "sampled", "terminal": "drop_chi"}
    )
    loss = bellman_loss_from_logits(z_SV, SETS, row(), chosen, num_tokens=1, num_rows=1, shift_constant=0.0).loss
    loss.backward()
    assert loss.item() == pytest.approx(-0.5)
    assert z_SV.grad is not None
    torch.testing.assert_close(z_SV.grad, torch.zeros_like(z_SV), rtol=0, atol=1e-15)


def test_targets_of_the_teachers_rows_stay() -> None:
    """The same row as the teacher's: -log pibar of the action in its set, whatever the student's rows would have."""
    expected = [0.0, LOG2 + REWARDS[1] ** 2 / 2]
    for values in ({}, {"student_target": "reverse"}, {"student_td": False}, {"student_out_of_set": "penalise"}):
        loss = terms_of(row(is_student=False), **values).loss
        assert float(loss) == pytest.approx(sum(expected) / 2, abs=1e-12)


PRESETS: list[dict[str, Any]] = [
    {},
    {"preset": "paper"},
    {"preset": "released"},
    {"reduction": "sequence", "q_shift": "logsumexp"},
    {"linear_term": "sampled", "out_of_set": "zero", "student_out_of_set": "penalise"},
]


@pytest.mark.parametrize("values", PRESETS)
def test_rows_of_the_teacher_alone_give_the_same_bits(make_batch: Callable, values: dict[str, Any]) -> None:
    """Without a row of the student an online batch has the loss, gradient and metrics of an offline one, to the bit."""
    batch = make_batch([(4, "stop"), (3, "length"), (1, "stop")], seed=60, always_include=[0])
    options = DistillConfig.model_validate(values)
    results = []
    for trajectories in (batch.trajectories, as_online(batch, []).trajectories):
        z_SV = batch.logits_SV.float().requires_grad_()
        terms = bellman_loss_from_logits(
            z_SV, batch.sets, trajectories, options, shift_constant=0.5, stop_ids=[0], **batch.counts
        )
        terms.loss.backward()
        results.append((terms.loss.detach(), z_SV.grad, mean_metrics(terms.metrics)))
    offline, online = results
    assert torch.equal(offline[0], online[0])
    assert torch.equal(offline[1], online[1])
    assert {name: online[2][name] for name in offline[2]} == offline[2]


def test_batch_of_both_is_the_sum_of_its_rows(make_batch: Callable) -> None:
    """A mixed batch's loss is that of its teacher's rows plus that of its student's, over one count of tokens."""
    batch = make_batch([(4, "stop"), (3, "length"), (5, "stop")], seed=61, always_include=[0])
    values = {"student_target": "reverse", "student_out_of_set": "penalise", "linear_term": "sampled"}
    losses = {
        students: bellman_loss_from_logits(
            batch.logits_SV,
            batch.sets,
            as_online(batch, students).trajectories,
            DistillConfig.model_validate(values),
            shift_constant=0.5,
            **batch.counts,
        ).loss
        for students in ((), (0,), (2,), (0, 2))
    }
    torch.testing.assert_close(
        losses[0, 2] - losses[()], losses[(0,)] + losses[(2,)] - 2 * losses[()], rtol=1e-12, atol=1e-14
    )
    assert abs(losses[(0,)] - losses[()]) > 1e-3


@pytest.mark.parametrize("stopped", [True, False])
def test_discounted_linear_term_of_a_response_reaches_its_first_state_alone(
    make_batch: Callable, stopped: bool
) -> None:
    """sum gamma^t (V_t - gamma V'_t) = V(s_0) - gamma^T V(s_T): no state in between has a gradient of it."""
    batch = as_online(make_batch([(6, "stop" if stopped else "length")], seed=62), [0])
    chosen = BellmanOptions(gamma=0.9, q_shift="constant", terminal="zero")
    head = DenseHead(batch.logits_SV.clone().requires_grad_())
    z_M = head.at_candidates(batch.sets)
    values = action_values(head, z_M, batch.sets, batch.trajectories.taken_S, chosen, shift_constant=0.0)
    steps = transitions(values, batch.trajectories, chosen)
    discount_S = 0.9 ** torch.arange(6, dtype=torch.float64)
    (discount_S * (steps.value_S - 0.9 * steps.next_value_S)[:6]).sum().backward()
    reached = (head.logits_SV.grad.abs() > 1e-15).any(dim=1).tolist()
    assert reached == [True] + [False] * 5 + ([] if stopped else [True])


def test_released_has_no_rows_of_the_student() -> None:
    """The authors' code was made for the teacher's rows: others are refused, with what to change."""
    with pytest.raises(ConfigError, match=r"--algo\.distill\.rollout teacher, or .*objective eq17"):
        terms_of(objective="released", reduction="sequence")
    assert math.isfinite(terms_of(row(is_student=False), objective="released", reduction="sequence").loss)


@pytest.mark.parametrize("target", ["forward", "reverse"])
def test_white_box_targets_need_log_probabilities(target: str) -> None:
    """Sets without them are refused by the option's name; without a row of the student nothing is missing."""
    bare = replace(SETS, logprobs_M=None)
    with pytest.raises(ConfigError, match=f"student_target {target} needs"):
        terms_of(sets=bare, student_target=target)
    terms_of(row(is_student=False), sets=bare, student_target=target)
    terms_of(sets=bare, student_target="none")


@pytest.mark.parametrize("values", [{"student_td": False}, {"regulariser": "none"}])
def test_penalty_without_chi_squared_is_refused(values: dict[str, object]) -> None:
    """penalise pulls by chi-squared on the student's transitions."""
    with pytest.raises(ConfigError, match="pulls rewards to -2 alpha"):
        terms_of(student_out_of_set="penalise", **values)


def test_metrics_by_source(make_batch: Callable) -> None:
    """teacher/ and student/ have the means over their own rows, and the two weigh up to the mean of all."""
    batch = as_online(make_batch([(4, "stop"), (3, "length"), (1, "stop")], seed=63, always_include=[0]), [1])
    terms = bellman_loss_from_logits(
        batch.logits_SV, batch.sets, batch.trajectories, DistillConfig(), shift_constant=0.5, **batch.counts
    )
    metrics = mean_metrics(terms.metrics)
    assert metrics["student/share"] == pytest.approx(3 / 8)
    for name in ("policy_loss", "td_loss", "out_of_set_rate"):
        both = 3 / 8 * metrics[f"student/{name}"] + 5 / 8 * metrics[f"teacher/{name}"]
        assert both == pytest.approx(metrics[name])
    behaviour = batch.trajectories.behaviour
    assert behaviour is not None
    gap_T = (behaviour.logprob_S - behaviour.teacher_logprob_S)[4:7].double()
    assert metrics["student/sampled_kl"] == pytest.approx(float(gap_T.mean()))
    log_policy_S = torch.log_softmax(batch.logits_SV, dim=1)[range(4, 7), batch.trajectories.taken_S[4:7]]
    assert metrics["student/log_ratio"] == pytest.approx(float((log_policy_S - behaviour.logprob_S[4:7]).mean()))
    assert not any("/" in name for name in mean_metrics(terms_of(replace(row(), behaviour=None)).metrics))
