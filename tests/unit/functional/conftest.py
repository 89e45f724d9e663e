"""Micro-batches with a teacher, its candidate sets and a student, all random."""

# S states, V vocabulary, T response tokens

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from openrlhf_bd.functional.candidates import CandidateSets, top_p_candidates
from openrlhf_bd.functional.trajectories import Trajectories, num_states
from openrlhf_bd.records import Origin, RecordedSets, Rollout

STOP_ID = 0


@dataclass
class Batch:
    """One micro-batch: float64 student and teacher logits, sets whose masses are exact in float64, rollouts."""

    logits_SV: Tensor
    teacher_SV: Tensor
    sets: CandidateSets
    trajectories: Trajectories
    rollouts: list[Rollout]

    @property
    def counts(self) -> dict[str, float]:
        return {
            "num_tokens": float(self.trajectories.has_action_S.sum()),
            "num_rows": float(len(self.rollouts)),
        }


def exact_sets(teacher_SV: Tensor, sets: CandidateSets) -> CandidateSets:
    """The same ids with log-probabilities and masses in float64."""
    logprobs_M = torch.log_softmax(teacher_SV.double(), dim=1)[sets.state_M, sets.ids_M]
    mass_S = torch.zeros(sets.num_states, dtype=torch.float64).index_add(0, sets.state_M, logprobs_M.exp())
    return replace(sets, logprobs_M=logprobs_M, neg_log_mass_S=(-mass_S.log()).clamp(min=0.0))


def build_batch(
    rows: Sequence[tuple[int, str]],
    *,
    seed: int = 0,
    vocab_size: int = 7,
    top_p: float = 0.8,
    always_include: Sequence[int] = (),
    spread: float = 2.0,
) -> Batch:
    """Rows of (response tokens, finish reason); "length" rows have the set of the following state too.

    Tokens are drawn from the teacher, so some lie outside their set; a "stop" row ends with STOP_ID.
    """
    rng = np.random.default_rng(seed)
    rollouts, teacher, student, recorded = [], [], [], []
    for index, (num_tokens, reason) in enumerate(rows):
        num_states = num_tokens + (reason == "length")
        teacher_TV = torch.from_numpy(rng.normal(size=(num_states, vocab_size)) * spread)
        sets = exact_sets(teacher_TV, top_p_candidates(teacher_TV, top_p=top_p, always_include=always_include))
        probs_TV = torch.softmax(teacher_TV, dim=1).numpy()
        tokens = [int(rng.choice(vocab_size, p=probs_TV[t])) for t in range(num_tokens)]
        if reason == "stop":
            tokens[-1] = STOP_ID
        assert sets.logprobs_M is not None
        row_sets = RecordedSets(
            sets.ids_M.numpy().astype(np.int32),
            sets.offsets_S1.numpy(),
            sets.neg_log_mass_S.numpy().astype(np.float32),
            sets.logprobs_M.numpy().astype(np.float32),
        )
        rollouts.append(
            Rollout(f"p{index}:0", np.array([1, 2], np.int32), np.array(tokens, np.int32), reason, None, row_sets)  # type: ignore[arg-type]
        )
        teacher.append(teacher_TV)
        student.append(torch.from_numpy(rng.normal(size=(num_states, vocab_size)) * spread))
        recorded.append(row_sets)
    teacher_SV = torch.cat(teacher)
    return Batch(
        torch.cat(student),
        teacher_SV,
        exact_sets(teacher_SV, CandidateSets.from_recorded(recorded)),
        Trajectories.from_rollouts(rollouts),
        rollouts,
    )


def select_rows(batch: Batch, rows: list[int]) -> Batch:
    """The micro-batch of some rows of a batch, in the order given; counts stay those of the whole."""
    row_S = batch.trajectories.row_S.tolist()
    states = [s for row in rows for s in range(len(row_S)) if row_S[s] == row]
    offsets, sizes = batch.sets.offsets_S1.tolist(), batch.sets.sizes_S[states]
    candidates = torch.tensor([m for s in states for m in range(offsets[s], offsets[s + 1])])
    assert batch.sets.logprobs_M is not None
    sets = CandidateSets(
        batch.sets.ids_M[candidates],
        torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]),
        batch.sets.neg_log_mass_S[states],
        batch.sets.logprobs_M[candidates],
    )
    rollouts = [batch.rollouts[row] for row in rows]
    trajectories = Trajectories.from_rollouts(rollouts)
    return replace(batch, logits_SV=batch.logits_SV[states], sets=sets, trajectories=trajectories, rollouts=rollouts)


def as_online(batch: Batch, student_rows: Sequence[int], *, seed: int = 0) -> Batch:
    """The same rows as an online run's: some sampled by the student, under logits near those that it has now."""
    rng = np.random.default_rng(seed)
    log_teacher_SV = torch.log_softmax(batch.teacher_SV, dim=1).numpy()
    near_SV = batch.logits_SV + torch.from_numpy(rng.normal(size=batch.logits_SV.shape)) / 4
    log_near_SV = torch.log_softmax(near_SV, dim=1).numpy()
    rollouts, start = [], 0
    for index, rollout in enumerate(batch.rollouts):
        tokens = rollout.response_ids
        states = range(start, start + len(tokens))
        start += num_states(rollout)
        origin = Origin(step=1, source="teacher")
        if index in student_rows:
            origin = Origin(1, "student", 0, log_near_SV[states, tokens].astype(np.float32))
        logprobs_T = log_teacher_SV[states, tokens].astype(np.float32)
        rollouts.append(replace(rollout, logprobs_T=logprobs_T, origin=origin))
    return replace(batch, rollouts=rollouts, trajectories=Trajectories.from_rollouts(rollouts))


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    return build_batch


@pytest.fixture
def exact() -> Callable[[Tensor, CandidateSets], CandidateSets]:
    return exact_sets
