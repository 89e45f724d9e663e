import math
from collections.abc import Callable

import pytest
import torch

from openrlhf_bd.config import BellmanOptions
from openrlhf_bd.errors import ConfigError
from openrlhf_bd.functional.candidates import CandidateSets
from openrlhf_bd.functional.head import DenseHead
from openrlhf_bd.functional.trajectories import Trajectories
from openrlhf_bd.functional.values import (
    ActionValues,
    action_values,
    negative_log_policy_expected,
    projected_log_policy,
    projected_log_teacher,
    soft_value,
    taken_candidate,
    transitions,
)

LOG2, LOG3 = math.log(2), math.log(3)

# Two states of a stopped row. State 0: tokens 1, 2 with Q log 1, log 3, takes 2. State 1: tokens 0, 1 with Q log 2,
# log 2, takes the stop token 0. So V_0 = log 4, V_1 = log 4.
SETS = CandidateSets(
    torch.tensor([1, 2, 0, 1]),
    torch.tensor([0, 2, 4]),
    torch.tensor([-math.log(0.8), 0.0]),
    torch.log(torch.tensor([0.6, 0.2, 0.5, 0.5], dtype=torch.float64)),
)
Q = torch.tensor([0.0, LOG3, LOG2, LOG2], dtype=torch.float64)


def log_teacher(sets: CandidateSets) -> torch.Tensor:
    return projected_log_teacher(sets, dtype=torch.float64, wanted_by="--linear")


def trajectories(taken: list[int], *, stopped: bool = True) -> Trajectories:
    """One row; a state without an action (-1) may follow."""
    num_states, num_tokens = len(taken), len([token for token in taken if token >= 0])
    return Trajectories(
        torch.tensor(taken),
        torch.tensor([*range(1, num_states), -1]),
        torch.arange(num_states) == (num_tokens - 1 if stopped else -1),
        torch.zeros(num_states, dtype=torch.int64),
    )


def options(**values: object) -> BellmanOptions:
    return BellmanOptions.model_validate({"q_shift": "max", "gamma": 0.5, **values})


def values_of(q_M: torch.Tensor, taken_S: torch.Tensor) -> ActionValues:
    """Values of given Q over SETS."""
    position_S = taken_candidate(SETS, taken_S)
    q_taken_S = torch.where(position_S >= 0, q_M[position_S.clamp(min=0)], 0.0)
    return ActionValues(q_M, q_M < q_M, soft_value(q_M, SETS.state_M, 2), q_taken_S, position_S >= 0, position_S < -1)


def shifted(chosen: BellmanOptions, z_SV: torch.Tensor, *, shift_constant: float | None = None) -> ActionValues:
    """Values of one state with logits z_SV over SHIFT_SETS."""
    head = DenseHead(z_SV)
    z_M = head.at_candidates(SHIFT_SETS)
    return action_values(head, z_M, SHIFT_SETS, torch.tensor([-1]), chosen, shift_constant=shift_constant)


def rewards(taken: list[int], *, stopped: bool = True, **values: object) -> tuple[list[float], list[bool]]:
    row = trajectories(taken, stopped=stopped)
    steps = transitions(values_of(Q, row.taken_S), row, options(**values))
    return steps.reward_S.tolist(), (steps.used_S & steps.has_next_S).tolist()


def test_soft_value_and_projected_policy() -> None:
    """V = log sum exp Q over the set; pibar = exp(Q - V): 1/4, 3/4 and 1/2, 1/2."""
    value = soft_value(Q, SETS.state_M, 2)
    assert value.tolist() == pytest.approx([2 * LOG2, 2 * LOG2])
    log_policy = projected_log_policy(Q, value, SETS.state_M)
    assert log_policy.exp().tolist() == pytest.approx([0.25, 0.75, 0.5, 0.5])
    # V = E_pibar[Q - log pibar] (below Eq. 17)
    expected = [float((log_policy.exp() * (Q - log_policy))[part].sum()) for part in (slice(0, 2), slice(2, 4))]
    assert value.tolist() == pytest.approx(expected)


def test_projected_teacher_is_renormalised() -> None:
    """.6 and .2 become 3/4 and 1/4."""
    assert log_teacher(SETS).exp().tolist() == pytest.approx([0.75, 0.25, 0.5, 0.5])


def test_expected_linear_term() -> None:
    """State 0: .8 [3/4 log 4 + 1/4 log(4/3)]; state 1: log 2."""
    value = soft_value(Q, SETS.state_M, 2)
    expected = [0.8 * (0.75 * math.log(4) + 0.25 * math.log(4 / 3)), LOG2]
    assert negative_log_policy_expected(Q, value, SETS, log_teacher(SETS)).tolist() == pytest.approx(expected)


def test_expected_needs_logprobs() -> None:
    """Sets without log-probabilities are refused, with the flag to set."""
    bare = CandidateSets(SETS.ids_M, SETS.offsets_S1, SETS.neg_log_mass_S, None)
    with pytest.raises(ConfigError, match=r"which --linear needs; .*--teacher\.record_logprobs"):
        log_teacher(bare)


def test_taken_candidate() -> None:
    """Positions in the flat list, -1 for a token outside its set or no token."""
    assert taken_candidate(SETS, torch.tensor([2, 0])).tolist() == [1, 2]
    assert taken_candidate(SETS, torch.tensor([0, -1])).tolist() == [-1, -1]


def test_rewards_by_what_follows_the_stop_token() -> None:
    """zero: r = Q; drop_chi: no reward; absorbing: r = (1 - gamma) Q. Before it, r = Q - gamma V'."""
    first = LOG3 - 0.5 * 2 * LOG2
    assert rewards([2, 0], terminal="zero") == (pytest.approx([first, LOG2]), [True, True])
    assert rewards([2, 0], terminal="drop_chi") == (pytest.approx([first, 0.0]), [True, False])
    assert rewards([2, 0], terminal="absorbing") == (pytest.approx([first, 0.5 * LOG2]), [True, True])


def test_rewards_of_a_cut_response() -> None:
    """bootstrap: V' of the state after the last token; drop, or no such state: no reward."""
    first = LOG3 - 0.5 * 2 * LOG2
    assert rewards([2, -1], stopped=False) == (pytest.approx([first, 0.0]), [True, False])
    assert rewards([2, -1], stopped=False, truncated="drop") == ([0.0, 0.0], [False, False])
    assert rewards([2, 0], stopped=False) == (pytest.approx([first, 0.0]), [True, False])
    assert rewards([2, 0], stopped=False, truncated="drop") == (pytest.approx([first, 0.0]), [True, False])


def test_rewards_of_tokens_outside_their_set() -> None:
    """drop: none; clip: Q_min - gamma V'; zero: -gamma V'. Token 0 lies outside the set of state 0."""
    assert rewards([0, 0], out_of_set="drop") == (pytest.approx([0.0, LOG2]), [False, True])
    assert rewards([0, 0], out_of_set="clip", q_min=-10.0) == (pytest.approx([-10 - LOG2, LOG2]), [True, True])
    assert rewards([0, 0], out_of_set="zero") == (pytest.approx([-LOG2, LOG2]), [True, True])


@pytest.mark.parametrize("stopped", [True, False])
def test_values_telescope(make_batch: Callable, stopped: bool) -> None:
    """sum gamma^t (V_t - gamma V'_t) = V_0 after a stop, V_0 - gamma^T V(s_T) where the response was cut."""
    batch = make_batch([(9, "stop" if stopped else "length")], seed=3)
    chosen = BellmanOptions(gamma=0.9, q_shift="max", terminal="zero")
    head = DenseHead(batch.logits_SV)
    z_M = head.at_candidates(batch.sets)
    values = action_values(head, z_M, batch.sets, batch.trajectories.taken_S, chosen, shift_constant=None)
    steps = transitions(values, batch.trajectories, chosen)
    assert steps.has_next_S[:9].all()
    discount = 0.9 ** torch.arange(9, dtype=torch.float64)
    total = (discount * (steps.value_S - 0.9 * steps.next_value_S)[:9]).sum()
    residual = 0.0 if stopped else 0.9**9 * steps.value_S[9]
    torch.testing.assert_close(total, steps.value_S[0] - residual, rtol=0, atol=1e-12)


# Logits log 1, log 2, log 5, log 8 with candidates {1, 2}.
SHIFT_LOGITS = torch.log(torch.tensor([[1.0, 2.0, 5.0, 8.0]], dtype=torch.float64))
SHIFT_SETS = CandidateSets(torch.tensor([2, 1]), torch.tensor([0, 2]), torch.zeros(1), None)


@pytest.mark.parametrize(
    ("q_shift", "expected"),
    [
        ("none", [5, 2]),
        ("constant", [50, 20]),
        ("max", [5 / 8, 2 / 8]),
        ("max_detached", [5 / 8, 2 / 8]),
        ("topp_max", [1, 2 / 5]),
        ("logsumexp", [5 / 16, 2 / 16]),
    ],
)
def test_shifts_of_known_logits(q_shift: str, expected: list[float]) -> None:
    """exp Q is exp z over: 1, the constant (1/10), the maximum 8, the set's maximum 5, the sum 16."""
    values = shifted(options(q_shift=q_shift), SHIFT_LOGITS, shift_constant=-math.log(10))
    assert values.q_M.exp().tolist() == pytest.approx(expected)
    assert not values.clipped_M.any()


def test_clip_holds_q_and_stops_its_gradient() -> None:
    """With shift max, Q is log 5/8 and log 2/8; Q_min = -1 holds the second (-1.39)."""
    z = SHIFT_LOGITS.clone().requires_grad_()
    values = shifted(options(q_min=-1.0), z)
    assert values.q_M.tolist() == pytest.approx([math.log(5 / 8), -1.0])
    assert values.clipped_M.tolist() == [False, True]
    values.q_M.sum().backward()
    assert z.grad is not None
    assert z.grad.tolist() == [[0.0, 0.0, 1.0, -1.0]]


def test_constant_shift_needs_its_constant() -> None:
    """No constant is an error, never a shift of 0."""
    with pytest.raises(ConfigError, match="q_shift constant"):
        shifted(options(q_shift="constant"), SHIFT_LOGITS)
