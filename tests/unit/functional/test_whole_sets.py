"""p = 1 is a flag: sets that list no ids give the loss of sets that list all of them."""

# S states, V vocabulary, M candidates

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from openrlhf_bd.config import BellmanOptions, DistillConfig
from openrlhf_bd.errors import ConfigError
from openrlhf_bd.functional.bellman import BellmanTerms, bellman_loss, bellman_loss_from_logits
from openrlhf_bd.functional.candidates import CandidateSets
from openrlhf_bd.functional.head import DenseHead
from openrlhf_bd.functional.metrics import mean_metrics
from openrlhf_bd.functional.sparse_head import SparseHead

ROWS = [(4, "stop"), (3, "length"), (1, "stop"), (1, "length")]
SHIFT = 0.6


def listed(teacher_SV: Tensor) -> CandidateSets:
    """Every id in every set, the most probable first."""
    num_states, vocab_size = teacher_SV.shape
    return CandidateSets(
        teacher_SV.argsort(dim=1, descending=True).flatten(),
        torch.arange(num_states + 1) * vocab_size,
        torch.zeros(num_states, dtype=torch.float64),
        None,
    )


def options(**values: Any) -> BellmanOptions:
    return BellmanOptions.model_validate({"top_p": 1.0, "linear_term": "sampled", "alpha": 0.4, **values})


def compute(
    batch: Any, sets: CandidateSets, chosen: BellmanOptions, *, sparse: bool = False
) -> tuple[BellmanTerms, Tensor]:
    z_SV = batch.logits_SV.clone().requires_grad_()
    # Hidden states times the identity are the same logits.
    head = SparseHead(z_SV, torch.eye(z_SV.shape[1], dtype=z_SV.dtype)) if sparse else DenseHead(z_SV)
    terms = bellman_loss(head, sets, batch.trajectories, chosen, shift_constant=SHIFT, stop_ids=[0], **batch.counts)
    terms.loss.backward()
    assert z_SV.grad is not None
    return terms, z_SV.grad


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("q_shift", ["none", "constant", "max", "max_detached", "topp_max", "logsumexp"])
def test_whole_sets_equal_sets_that_list_every_id(make_batch: Callable, q_shift: str, sparse: bool) -> None:
    """Loss, gradient and every metric that both have are equal, under each shift, clip, end and tail."""
    batch = make_batch(ROWS, seed=50, top_p=1.0)
    assert batch.sets.is_whole
    for q_min, (terminal, truncated), tau, gradient in itertools.product(
        [None, -1.5], [("drop_chi", "bootstrap"), ("absorbing", "drop")], [1.0, 0.7], ["full", "stop"]
    ):
        chosen = options(
            q_shift=q_shift, q_min=q_min, terminal=terminal, truncated=truncated, tau=tau, next_value_gradient=gradient
        )
        whole, grad_SV = compute(batch, batch.sets, chosen, sparse=sparse)
        all_ids, expected_SV = compute(batch, listed(batch.teacher_SV), chosen)
        torch.testing.assert_close(whole.loss, all_ids.loss, rtol=1e-13, atol=0)
        torch.testing.assert_close(grad_SV, expected_SV, rtol=1e-11, atol=1e-14)
        expected = mean_metrics(all_ids.metrics)
        found = mean_metrics(whole.metrics)
        of_sets = {"set_size", "one_token_sets", "teacher_mass", "student_mass", "clip_rate", "out_of_set_rate"}
        of_sets |= {"top1_overlap", "set_size_p50", "set_size_p90", "set_size_p99"}
        assert found.keys() == expected.keys() - of_sets
        assert found == pytest.approx({name: expected[name] for name in found}, rel=1e-11)


def test_whole_sets_have_no_tail(make_batch: Callable) -> None:
    """The mass outside is 0 for teacher and student: tail_coef changes nothing."""
    batch = make_batch(ROWS, seed=51, top_p=1.0)
    with_tail, without = (compute(batch, batch.sets, options(tail_coef=coef))[0] for coef in (1.0, 0.0))
    assert torch.equal(with_tail.loss, without.loss)
    assert mean_metrics(with_tail.metrics)["tail_loss"] == 0.0


def test_no_token_is_out_of_a_whole_set(make_batch: Callable) -> None:
    """The three treatments of out-of-set tokens are one."""
    batch = make_batch(ROWS, seed=52, top_p=1.0)
    losses = [compute(batch, batch.sets, options(q_min=-9.0, out_of_set=o))[0].loss for o in ("drop", "clip", "zero")]
    assert losses[0] == losses[1] == losses[2]


def test_expected_targets_need_a_mask() -> None:
    """No store has the log-probabilities of a whole vocabulary: `expected` at p = 1 is refused."""
    with pytest.raises(ConfigError, match=r"linear_term expected with --algo\.distill\.top_p 1"):
        bellman_loss_from_logits(
            torch.zeros(1, 3),
            CandidateSets.whole(1),
            None,  # type: ignore[arg-type]
            DistillConfig(top_p=1.0),
            num_tokens=1,
            num_rows=1,
        )
