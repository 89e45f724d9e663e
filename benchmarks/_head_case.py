"""Cases of the loss-with-head benchmarks: inputs that look like a student half-way, and one step of each side."""

# S states, V vocabulary, H hidden size, M candidates of all states

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from benchmarks._options import objective_options
from openrlhf_bd.functional.bellman import bellman_loss
from openrlhf_bd.functional.candidates import CandidateSets
from openrlhf_bd.functional.cross_entropy import token_cross_entropy
from openrlhf_bd.functional.head import DenseHead, StudentHead
from openrlhf_bd.functional.segments import segment_logsumexp
from openrlhf_bd.functional.sparse_head import SparseHead
from openrlhf_bd.functional.trajectories import Trajectories

ROW_TOKENS = 128  # states of a response
STOP_ID = 0
LEVEL = 16.0  # nats: log sum exp of the candidates' logits, where the mass outside the sets is about 2
BACKGROUND = 2.0  # nats: spread of the other logits
ONE_TOKEN_SHARE = 0.6
LARGEST_SET = 4096

NO_TAIL = {"tail_coef": 0.0}
CASES: dict[str, dict[str, object]] = {
    "sets only, shift none": {"preset": "robust", "q_shift": "none", "terminal": "drop_chi", **NO_TAIL},
    "sets only, shift constant": {"preset": "robust", "q_shift": "constant", **NO_TAIL},
    "sets only, shift topp_max": {"preset": "robust", "q_shift": "topp_max", **NO_TAIL},
    "paper": {"preset": "paper"},
    "paper, all metrics": {"preset": "paper", "full_diagnostics": True},
    "robust, exact tail": {"preset": "robust"},
    "robust, exact tail, all metrics": {"preset": "robust", "full_diagnostics": True},
    "robust, sampled tail": {"preset": "robust", "tail_estimator": "sampled"},
    "cross-entropy": {},
    "forward KL": {},
}


@dataclass(frozen=True)
class Shape:
    """What a case is measured at.

    Attributes:
        num_states: positions.
        vocab_size: ids.
        hidden_size: of the hidden states.
        mean_set: mean number of candidates; sizes are heavy-tailed.
        dtype: of hidden states and weight.
        device: where they lie.
    """

    num_states: int
    vocab_size: int
    hidden_size: int
    mean_set: float
    dtype: str
    device: str


@dataclass
class Inputs:
    """A micro-batch at the output embedding. Hidden states and weight want gradients.

    The hidden states are sums of the candidates' rows plus noise, so that the student's logits at the candidates
    follow the teacher's log-probabilities, and those of the other ids spread around 0.
    """

    hidden_SH: Tensor
    weight_VH: Tensor
    sets: CandidateSets
    trajectories: Trajectories

    @property
    def num_states(self) -> int:
        return len(self.hidden_SH)


def make_inputs(shape: Shape, *, seed: int = 0) -> Inputs:
    """The same inputs for every side."""
    random, device = np.random.default_rng(seed), torch.device(shape.device)
    generator = torch.Generator().manual_seed(seed)
    weight_VH = torch.randn(shape.vocab_size, shape.hidden_size, generator=generator).mul_(shape.hidden_size**-0.5)
    sets = _sets(shape, random)
    assert sets.logprobs_M is not None
    hidden_SH = torch.randn(shape.num_states, shape.hidden_size, generator=generator) * BACKGROUND
    target_M = LEVEL + sets.logprobs_M + torch.randn(sets.num_candidates, generator=generator)
    for start in range(0, sets.num_candidates, 1 << 14):
        block = slice(start, start + (1 << 14))
        rows = weight_VH[sets.ids_M[block]] * target_M[block, None].clamp(min=0.0)
        hidden_SH.index_add_(0, sets.state_M[block], rows * sets.sizes_S[sets.state_M[block], None] ** -0.5)
    dtype = getattr(torch, shape.dtype)
    return Inputs(
        hidden_SH.to(device, dtype).requires_grad_(),
        weight_VH.to(device, dtype).requires_grad_(),
        sets.to(device),
        _trajectories(sets, random).to(device),
    )


def _sets(shape: Shape, random: np.random.Generator) -> CandidateSets:
    """Sets of one id mostly, some of thousands, with the given mean; the stop token is in each."""
    sizes_S = np.ones(shape.num_states, np.int64)
    long_S = random.random(shape.num_states) >= ONE_TOKEN_SHARE
    largest = min(LARGEST_SET, shape.vocab_size // 4)
    pareto = 1.0 + random.pareto(1.1, int(long_S.sum()))
    wanted = shape.num_states * shape.mean_set - (~long_S).sum()
    for _ in range(20):  # the cap changes the mean: approach it
        pareto *= wanted / np.clip(pareto, 2, largest).sum()
    sizes_S[long_S] = np.clip(np.rint(pareto), 2, largest).astype(np.int64)
    ids, logprobs, mass = [], [], []
    for size in sizes_S:
        drawn = np.unique(np.append(random.zipf(1.15, 3 * size) % (shape.vocab_size - 1) + 1, STOP_ID))
        while len(drawn) < size:
            drawn = np.unique(np.append(drawn, random.integers(0, shape.vocab_size, size)))
        chosen = random.permutation(drawn[drawn != STOP_ID])[: max(0, size - 1)]
        chosen = np.append(chosen, STOP_ID) if size > 1 else random.permutation(drawn)[:1]
        total = random.uniform(0.95, 0.9999)
        share = np.sort(random.exponential(size=len(chosen)) ** 3 + 1e-6)[::-1]
        share = total * share / share.sum()
        ids.append(chosen)
        logprobs.append(np.log(share))
        mass.append(-np.log(total))
    return CandidateSets(
        ids_M=torch.from_numpy(np.concatenate(ids)),
        offsets_S1=torch.from_numpy(np.concatenate([[0], np.cumsum([len(x) for x in ids])])),
        neg_log_mass_S=torch.tensor(mass, dtype=torch.float32),
        logprobs_M=torch.from_numpy(np.concatenate(logprobs).astype(np.float32)),
    )


def _trajectories(sets: CandidateSets, random: np.random.Generator) -> Trajectories:
    """Responses of ROW_TOKENS tokens, each token from its set."""
    number = np.arange(sets.num_states)
    offset = random.integers(0, 1 << 30, sets.num_states) % sets.sizes_S.numpy()
    taken_S = sets.ids_M.numpy()[sets.offsets_S1.numpy()[:-1] + offset]
    last_S = (number % ROW_TOKENS == ROW_TOKENS - 1) | (number == sets.num_states - 1)
    return Trajectories(
        torch.from_numpy(taken_S),
        torch.from_numpy(np.where(last_S, -1, number + 1)),
        torch.from_numpy(last_S),
        torch.from_numpy(number // ROW_TOKENS),
    )


class PlainHead(DenseHead):
    """The dense reference without the statistics that it could give for the metrics: both sides compute the same."""

    statistics_are_free = False


def build_head(inputs: Inputs, side: str) -> StudentHead:
    """The head of a side: dense (logits of every state and id) or sparse."""
    if side == "sparse":
        return SparseHead(inputs.hidden_SH, inputs.weight_VH)
    return PlainHead(inputs.hidden_SH @ inputs.weight_VH.T)


def make_step(case: str, side: str, inputs: Inputs, *, seed: int = 0) -> Callable[[], Tensor]:
    """Forward pass of a case on a side: what gives the loss whose backward pass is timed too."""
    if case == "forward KL":
        return _kl_step(side, inputs, teacher=make_teacher(inputs))
    if case == "cross-entropy":
        return partial(_cross_entropy, side, inputs)
    return partial(_bellman, case, side, inputs, seed)


def _bellman(case: str, side: str, inputs: Inputs, seed: int) -> Tensor:
    values = dict(CASES[case])
    full_diagnostics = bool(values.pop("full_diagnostics", False))
    options = objective_options(str(values.pop("preset")), **values)
    return bellman_loss(
        build_head(inputs, side),
        inputs.sets,
        inputs.trajectories,
        options,  # type: ignore[arg-type]
        num_tokens=float(inputs.num_states),
        num_rows=1.0 + float(inputs.trajectories.row_S[-1]),
        shift_constant=LEVEL,
        generator=torch.Generator().manual_seed(seed),
        full_diagnostics=full_diagnostics,
    ).loss


def _cross_entropy(side: str, inputs: Inputs) -> Tensor:
    every_S = torch.ones(inputs.num_states, device=inputs.hidden_SH.device)
    target_S = inputs.trajectories.taken_S
    if side == "dense":
        logits_SV = (inputs.hidden_SH @ inputs.weight_VH.T).float()
        return torch.nn.functional.cross_entropy(logits_SV, target_S)
    head = build_head(inputs, side)
    return token_cross_entropy(head, target_S, every_S, denominator=float(inputs.num_states))[0]


def make_teacher(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Hidden states and weight of a teacher near the student."""
    hidden_SH, weight_VH = inputs.hidden_SH.detach(), inputs.weight_VH.detach()
    return hidden_SH + 0.1 * torch.randn_like(hidden_SH), weight_VH.clone()


def _kl_step(side: str, inputs: Inputs, *, teacher: tuple[Tensor, Tensor]) -> Callable[[], Tensor]:
    weight_S = torch.full((inputs.num_states,), 1.0 / inputs.num_states, device=inputs.hidden_SH.device)
    teacher_SH, teacher_VH = teacher

    def ours() -> Tensor:
        head = build_head(inputs, side)
        with torch.no_grad():
            other = SparseHead(teacher_SH, teacher_VH) if side == "sparse" else DenseHead(teacher_SH @ teacher_VH.T)
        return head.forward_kl(other, weight_S).sum

    def trl() -> Tensor:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        divergence_S, _ = ChunkedDivergenceFunction.apply(
            inputs.hidden_SH, inputs.weight_VH, None, teacher_SH, teacher_VH, None, 0.0
        )
        return divergence_S.mean()

    return trl if side == "trl" else ours


def has_trl(path: str | None) -> bool:
    """Whether TRL's chunked divergence can be imported, from an unpacked wheel where a path is given."""
    if path is not None:
        sys.path.append(path)
    try:
        from trl.kernels import chunked_divergence  # noqa: F401
    except ImportError:
        return False
    return True


def tail_error(inputs: Inputs, *, draws: int = 16, sizes: tuple[int, ...] = (1024, 4096, 16384)) -> dict[str, object]:
    """Bias and spread of the sampled tail, of its sum over states / S and of the gradient of the hidden states."""
    exact, exact_grad_SH = _tail(inputs, estimator="exact")
    lines = []
    for num_samples in sizes:
        found = [_tail(inputs, estimator="sampled", num_samples=num_samples, seed=seed) for seed in range(draws)]
        losses = torch.tensor([loss for loss, _ in found], dtype=torch.float64)
        errors = [grad_SH - exact_grad_SH for _, grad_SH in found]
        norm = exact_grad_SH.norm()
        lines.append(
            {
                "num_samples": num_samples,
                "loss_bias": float(losses.mean() - exact),
                "loss_error": float(losses.std() / draws**0.5),
                "gradient_one": float(torch.stack([error.norm() / norm for error in errors]).mean()),
                "gradient_mean": float(torch.stack(errors).mean(dim=0).norm() / norm),
            }
        )
    return {"exact": exact, "draws": draws, "lines": lines}


def _tail(inputs: Inputs, *, seed: int = 0, **options: object) -> tuple[float, Tensor]:
    head = SparseHead(inputs.hidden_SH, inputs.weight_VH.detach())
    sets, weight_S = inputs.sets, torch.full((inputs.num_states,), 1.0 / inputs.num_states, device=head.device)
    inside_S = segment_logsumexp(head.at_candidates(sets), sets.state_M, sets.num_states)
    term = head.tail(sets, inside_S, weight_S, generator=torch.Generator().manual_seed(seed), **options)  # type: ignore[arg-type]
    return float(term.sum.detach()), torch.autograd.grad(term.sum, inputs.hidden_SH)[0].float()
