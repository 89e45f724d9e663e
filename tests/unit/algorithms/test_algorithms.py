import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from openrlhf_bd.algorithms import resolve_algorithm
from openrlhf_bd.algorithms.base import Needs
from openrlhf_bd.config import DistillConfig
from openrlhf_bd.errors import ConfigError
from openrlhf_bd.functional.bellman import bellman_loss
from openrlhf_bd.functional.candidates import CandidateSets
from openrlhf_bd.functional.head import DenseHead
from openrlhf_bd.functional.trajectories import Trajectories
from openrlhf_bd.records import Rollout

# As exp: 1 2 5, 3 1 4 and 2 1 1; rows of two tokens and of one.
LOGITS = torch.log(torch.tensor([[1, 2, 5], [3, 1, 4], [2, 1, 1]], dtype=torch.float64))
NLL = [-math.log(5 / 8), -math.log(3 / 8), -math.log(1 / 2)]


def trajectories() -> Trajectories:
    rows = [([2, 0], "stop"), ([0], "length")]
    return Trajectories.from_rollouts(
        [
            Rollout(f"p{i}:0", np.array([1], np.int32), np.array(tokens, np.int32), reason)  # type: ignore[arg-type]
            for i, (tokens, reason) in enumerate(rows)
        ]
    )


SETS = CandidateSets(
    torch.tensor([2, 1, 0, 0]),
    torch.tensor([0, 2, 3, 4]),
    torch.full((3,), 0.1),
    torch.log(torch.tensor([0.6, 0.3, 0.9, 0.9])),
)


@pytest.mark.parametrize("name", ["sft", "seqkd"])
def test_cross_entropy_algorithms(name: str) -> None:
    """Cross-entropy of the rows' tokens over the global count, per token or per row, with the z-loss if asked for."""
    algorithm = resolve_algorithm(name)(DistillConfig(), [0])
    output = algorithm.loss(DenseHead(LOGITS), None, trajectories(), num_tokens=6, num_rows=4)
    assert float(output.loss) == pytest.approx(sum(NLL) / 6)
    assert float(output.metrics["gpt_loss"][0] / output.metrics["gpt_loss"][1]) == pytest.approx(sum(NLL) / 3)
    algorithm = resolve_algorithm(name)(DistillConfig(reduction="sequence"), [0])
    output = algorithm.loss(DenseHead(LOGITS), None, trajectories(), num_tokens=6, num_rows=4)
    assert float(output.loss) == pytest.approx(((NLL[0] + NLL[1]) / 2 + NLL[2]) / 4)
    algorithm = resolve_algorithm(name)(DistillConfig(z_loss_coef=0.1), [0])
    output = algorithm.loss(DenseHead(LOGITS), None, trajectories(), num_tokens=6, num_rows=4)
    squares = 2 * math.log(8) ** 2 + math.log(4) ** 2
    assert float(output.loss) == pytest.approx((sum(NLL) + 0.1 * squares) / 6)


def test_bd_is_the_bellman_loss_of_its_options() -> None:
    """bd hands its options, constant and stop tokens to the objective."""
    options = DistillConfig(reduction="sequence")
    algorithm = resolve_algorithm("bd")(options, [0], 1.5)
    counts = {"num_tokens": 3.0, "num_rows": 2.0}
    output = algorithm.loss(DenseHead(LOGITS), SETS, trajectories(), **counts)
    terms = bellman_loss(DenseHead(LOGITS), SETS, trajectories(), options, shift_constant=1.5, stop_ids=[0], **counts)
    assert torch.equal(output.loss, terms.loss)
    assert output.metrics.keys() == terms.metrics.keys()
    assert "stop_prob" in output.metrics


def test_needs() -> None:
    """What a run prepares: gold or teacher rollouts, sets, log-probabilities, the constant."""
    needs = {name: resolve_algorithm(name).needs_of(DistillConfig()) for name in ("sft", "seqkd", "bd")}
    assert needs == {
        "sft": Needs("gold"),
        "seqkd": Needs("teacher"),
        "bd": Needs("teacher", candidate_sets=True, candidate_logprobs=True, shift_constant=True),
    }
    paper = DistillConfig(preset="paper")
    assert resolve_algorithm("bd").needs_of(paper) == replace(
        needs["bd"], candidate_logprobs=False, shift_constant=False
    )
    assert resolve_algorithm("bd")(paper, [0]).needs == resolve_algorithm("bd").needs_of(paper)


def test_bd_refuses_what_cannot_work() -> None:
    """Contradicting options, a missing constant and missing sets are errors before or at the first loss."""
    algorithm = resolve_algorithm("bd")
    with pytest.raises(ConfigError, match="never to stop"):
        algorithm.needs_of(DistillConfig(q_shift="none"))
    with pytest.raises(ConfigError, match="constant"):
        algorithm(DistillConfig(), [0])
    with pytest.raises(ValueError, match="no candidate sets"):
        algorithm(DistillConfig(preset="paper"), [0]).loss(
            DenseHead(LOGITS), None, trajectories(), num_tokens=1, num_rows=1
        )
