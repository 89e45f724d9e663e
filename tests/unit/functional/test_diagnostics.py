import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from openrlhf_bd.config import BellmanOptions
from openrlhf_bd.functional.bellman import bellman_loss_from_logits
from openrlhf_bd.functional.candidates import CandidateSets
from openrlhf_bd.functional.metrics import at_most, mean_metrics, merge_metrics
from openrlhf_bd.functional.trajectories import Trajectories

LOG2, LOG3 = math.log(2), math.log(3)


def metrics_of(**values: object) -> dict[str, float]:
    """Two rows: a stopped one of two states, and a cut one of a token outside its set and a state to bootstrap from.

    As exp, vocabulary 3: logits 1 1 3 (set 2 1, takes 2), 2 2 4 (set 0 1, takes the stop token 0),
    8 1 1 (set 1, takes 0), 1 1 1 (set 0).
    """
    logits = torch.log(torch.tensor([[1, 1, 3], [2, 2, 4], [8, 1, 1], [1, 1, 1]], dtype=torch.float64))
    sets = CandidateSets(
        torch.tensor([2, 1, 0, 1, 1, 0]),
        torch.tensor([0, 2, 4, 5, 6]),
        torch.tensor([-math.log(0.8), 0.0, -math.log(0.6), 0.0], dtype=torch.float64),
        None,
    )
    trajectories = Trajectories(
        torch.tensor([2, 0, 0, -1]),
        torch.tensor([1, -1, 3, -1]),
        torch.tensor([False, True, False, False]),
        torch.tensor([0, 0, 1, 1]),
    )
    plain = {"q_shift": "constant", "linear_term": "sampled", "gamma": 0.5, "alpha": 0.5, "tail_coef": 2.0}
    terms = bellman_loss_from_logits(
        logits,
        sets,
        trajectories,
        BellmanOptions.model_validate({**plain, **values}),
        num_tokens=100,
        num_rows=50,
        shift_constant=0.0,
        stop_ids=[0],
    )
    return mean_metrics(terms.metrics)


def test_metrics_of_known_numbers() -> None:
    """Every metric by hand: means over the three states with an action."""
    metrics = metrics_of()
    linear = (math.log(4 / 3) + LOG2) / 3
    rewards = [LOG3 - LOG2, LOG2]  # log 3 - (1/2) log 4; log 2 after the stop token; the third is out of set
    td = (rewards[0] ** 2 + rewards[1] ** 2) / 2 / 3
    # Mass inside: teacher .8, 1, .6; student 4/5, 4/8, 1/10.
    tail = -0.8 * math.log(0.8) - 0.2 * math.log(0.2) + LOG2 - 0.6 * math.log(0.1) - 0.4 * math.log(0.9)
    tail *= 2 / 3
    assert metrics["linear_loss"] == pytest.approx(linear)
    assert metrics["td_loss"] == pytest.approx(td)
    assert metrics["tail_loss"] == pytest.approx(tail)
    assert metrics["policy_loss"] == pytest.approx(linear + td + tail)
    assert metrics["td_share"] == pytest.approx(td / (linear + td + tail))
    assert metrics["value"] == pytest.approx((math.log(4) + math.log(4) + 0) / 3)
    assert metrics["reward"] == pytest.approx(sum(rewards) / 2)
    assert metrics["reward_end"] == pytest.approx(LOG2)
    levels = [math.log(5), math.log(8), math.log(10)]
    mean = sum(levels) / 3
    assert metrics["logsumexp"] == pytest.approx(mean)
    assert metrics["logsumexp_spread"] == pytest.approx(math.sqrt(sum((x - mean) ** 2 for x in levels) / 3))
    assert metrics["out_of_set_rate"] == pytest.approx(1 / 3)
    assert metrics["clip_rate"] == 0.0
    assert metrics["teacher_mass"] == pytest.approx(2.4 / 3)
    assert metrics["student_mass"] == pytest.approx((0.8 + 0.5 + 0.1) / 3)
    assert metrics["set_size"] == pytest.approx(5 / 3)
    assert metrics["one_token_sets"] == pytest.approx(1 / 3)
    # Sizes 2, 2, 1: half and nine tenths of the sets have at most 2.
    assert (metrics["set_size_p50"], metrics["set_size_p90"], metrics["set_size_p99"]) == (2, 2, 2)
    probabilities = [[0.2, 0.2, 0.6], [0.25, 0.25, 0.5], [0.8, 0.1, 0.1]]
    entropies = [-sum(p * math.log(p) for p in row) for row in probabilities]
    assert metrics["entropy"] == pytest.approx(sum(entropies) / 3)
    assert metrics["stop_prob"] == pytest.approx((0.2 + 0.25 + 0.8) / 3)
    assert metrics["stop_prob_end"] == pytest.approx(0.25)
    # The student's most probable: 2, 2, 0; the teacher's: 2, 0, 1.
    assert metrics["top1_overlap"] == pytest.approx(1 / 3)
    assert metrics["nll"] == pytest.approx(-(math.log(0.6) + math.log(0.25) + math.log(0.8)) / 3)


def test_parts_follow_the_reduction() -> None:
    """sequence: the mean of the rows' means, here (a + b) / 2 of the first row and 0 of the second, over two rows."""
    assert metrics_of(reduction="sequence")["linear_loss"] == pytest.approx((math.log(4 / 3) + LOG2) / 2 / 2)


def test_clip_rate_counts_candidates() -> None:
    """Q_min = .5: of the Q log 3, 0, log 2, log 2, 0 at states with an action, two are held."""
    assert metrics_of(q_min=0.5)["clip_rate"] == pytest.approx(2 / 5)


def test_what_was_not_measured_is_left_out() -> None:
    """No reward at the end with drop_chi: no such metric, rather than 0."""
    assert "reward_end" not in metrics_of(terminal="drop_chi")


def test_metrics_merge_by_sum_and_weight() -> None:
    """(2, 1) and (4, 3) merge to a mean of 6 / 4; names of one part stay."""

    def pair(total: float, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor(total), torch.tensor(weight)

    merged = merge_metrics([{"a": pair(2, 1)}, {"a": pair(4, 3), "b": pair(1, 1)}])
    assert mean_metrics(merged) == {"a": 1.5, "b": 1.0}


def test_quantiles_are_those_of_the_merged_counts() -> None:
    """100 counts over two parts: 50 of 1, 41 of 3, 8 of 5 and one of 1,000; 91 % are at most 4, 99 % at most 8."""
    counts = torch.tensor([1] * 50 + [3] * 41 + [5] * 8 + [1000])
    parts = [at_most("size", part, torch.ones(len(part))) for part in (counts[:30], counts[30:])]
    assert mean_metrics(merge_metrics(parts)) == {"size_p50": 1.0, "size_p90": 4.0, "size_p99": 8.0}
    weighted_sizes = at_most("size", torch.tensor([1, 7]), torch.tensor([0.0, 2.0]))
    assert mean_metrics(weighted_sizes) == {"size_p50": 8.0, "size_p90": 8.0, "size_p99": 8.0}


class FloatScans(TorchDispatchMode):
    """Counts calls that torch refuses on CUDA under deterministic algorithms: cumulative sums of floats."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func.overloadpacket is torch.ops.aten.cumsum and args[0].is_floating_point()
        return func(*args, **(kwargs or {}))


def test_no_operation_that_has_no_deterministic_form_on_cuda() -> None:
    """The loss and its metrics run with --train.full_determinism_enable on CUDA."""
    with FloatScans() as scans:
        metrics_of()
    assert scans.calls == 0
    with FloatScans() as scans:
        torch.ones(2).cumsum(0)
    assert scans.calls == 1
