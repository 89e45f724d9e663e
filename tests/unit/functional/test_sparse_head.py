"""The sparse head answers every question as the dense one does, with the same gradients, and holds no [S, V] tensor."""

# S states, H hidden size, V vocabulary

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from openrlhf_bd.algorithms import StepContext, resolve_algorithm
from openrlhf_bd.config import DistillConfig
from openrlhf_bd.functional import tiles
from openrlhf_bd.functional.bellman import bellman_loss
from openrlhf_bd.functional.candidates import CandidateSets, top_p_candidates
from openrlhf_bd.functional.cross_entropy import token_cross_entropy
from openrlhf_bd.functional.head import DenseHead, StudentHead
from openrlhf_bd.functional.metrics import mean_metrics
from openrlhf_bd.functional.segments import segment_logsumexp
from openrlhf_bd.functional.sparse_head import SparseHead
from openrlhf_bd.functional.trajectories import Behaviour, Trajectories

S, H, V = 11, 6, 37


@dataclass
class Case:
    """Hidden states, output embedding and what is asked of the head."""

    hidden_SH: Tensor
    weight_VH: Tensor
    bias_V: Tensor | None
    sets: CandidateSets
    token_S: Tensor
    weight_S: Tensor
    teacher_SV: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.hidden_SH, self.weight_VH, self.bias_V) if x is not None]

    def dense(self) -> DenseHead:
        logits_SV = self.hidden_SH @ self.weight_VH.T
        return DenseHead(logits_SV if self.bias_V is None else logits_SV + self.bias_V)

    def sparse(self) -> SparseHead:
        return SparseHead(self.hidden_SH, self.weight_VH, self.bias_V)


def make_case(dtype: torch.dtype = torch.float64, *, bias: bool = True, seed: int = 0) -> Case:
    """Sets of 1 to V ids (the last state's is everything but one id); two states of weight 0, one without a token."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    teacher_SV = 3 * normal(S, V).double()
    teacher_SV[-1] = torch.linspace(0, 0.01, V)
    sets = top_p_candidates(teacher_SV, top_p=0.97)
    weight_S = torch.rand(S, generator=generator)
    weight_S[[2, 5]] = 0.0
    token_S = torch.randint(0, V, (S,), generator=generator)
    token_S[3] = -1
    leaves = [normal(S, H), normal(V, H), normal(V)]
    hidden_SH, weight_VH, bias_V = (x.requires_grad_() for x in leaves)
    return Case(hidden_SH, weight_VH, bias_V if bias else None, sets, token_S, weight_S, normal(S, V))


def inside(head: StudentHead, case: Case) -> Tensor:
    return segment_logsumexp(head.at_candidates(case.sets), case.sets.state_M, S)


def tail(head: StudentHead, case: Case, **options: Any) -> Tensor:
    values = {"num_samples": 7, "generator": torch.Generator().manual_seed(3), **options}
    return head.tail(case.sets, inside(head, case), case.weight_S, **values).sum


def shift(case: Case) -> Tensor:
    return case.hidden_SH[:, 0] * 0.3


QUESTIONS: dict[str, Callable[[StudentHead, Case], Tensor]] = {
    "at_candidates": lambda head, case: head.at_candidates(case.sets),
    "at": lambda head, case: head.at(case.token_S),
    "logsumexp": lambda head, case: head.logsumexp(),
    "soft value": lambda head, case: head.soft_value(None, None),
    "soft value, shift": lambda head, case: head.soft_value(shift(case), None),
    "soft value, floor": lambda head, case: head.soft_value(None, 0.2),
    "soft value, shift and floor": lambda head, case: head.soft_value(shift(case), -0.7),
    "logsumexp_outside": lambda head, case: head.logsumexp_outside(case.sets),
    "maximum": lambda head, case: head.maximum(),
    "log_prob": lambda head, case: head.log_prob(case.token_S),
    "tail": lambda head, case: tail(head, case),
    "tail, tolerance": lambda head, case: tail(head, case, tolerance=0.3),
    "tail, sampled": lambda head, case: tail(head, case, estimator="sampled"),
    "cross-entropy": lambda head, case: head.cross_entropy(case.token_S.clamp(min=0), case.weight_S).sum,
    "cross-entropy, z-loss": lambda head, case: (
        head.cross_entropy(case.token_S.clamp(min=0), case.weight_S, z_loss_coef=0.2).sum
    ),
    "forward KL": lambda head, case: head.forward_kl(DenseHead(case.teacher_SV), case.weight_S).sum,
    "tempered": lambda head, case: head.tempered(0.6).logsumexp() + head.tempered(0.6).at(case.token_S),
    "tempered tail": lambda head, case: tail(head.tempered(1.7), case),
    "tempered soft value": lambda head, case: head.tempered(0.6).soft_value(shift(case), 0.1),
    "tempered KL": lambda head, case: head.tempered(0.6).forward_kl(DenseHead(case.teacher_SV), case.weight_S).sum,
    "narrow": lambda head, case: head.narrow(3, 5).logsumexp() * head.narrow(3, 5).at(case.token_S[3:8]),
    "narrow, nothing left": lambda head, case: head.narrow(4, 0).logsumexp().sum() + head.at(case.token_S).sum(),
    "tempered and narrow": lambda head, case: head.tempered(2.0).narrow(1, 4).maximum(),
}


def answer_and_gradients(head: StudentHead, question: str, case: Case) -> list[Tensor]:
    """The answer, and the gradient of a sum of it in which each entry has a weight of its own."""
    answer = QUESTIONS[question](head, case)
    upstream = torch.linspace(-1, 2, answer.numel(), dtype=answer.dtype).reshape(answer.shape) + 0.01
    return [answer.detach(), *torch.autograd.grad(answer, case.leaves, upstream)]


@pytest.fixture(params=[1, 40, 1 << 20], ids=["one element", "blocks", "whole"])
def tile_elements(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Tiles of a single logit, of some rows and columns, and of everything."""
    monkeypatch.setattr(tiles, "CPU_TILE_ELEMENTS", request.param)
    monkeypatch.setattr(tiles, "MIN_COLUMNS", 4)
    return request.param


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("question", QUESTIONS)
def test_sparse_equals_dense(question: str, bias: bool, tile_elements: int) -> None:
    """Values and gradients of every question, whatever the tiles."""
    case = make_case(bias=bias)
    dense = answer_and_gradients(case.dense(), question, case)
    sparse = answer_and_gradients(case.sparse(), question, case)
    torch.testing.assert_close(sparse, dense, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("question", QUESTIONS)
def test_sparse_equals_dense_in_float32(question: str) -> None:
    """The same in single precision."""
    case = make_case(torch.float32)
    dense = answer_and_gradients(case.dense(), question, case)
    sparse = answer_and_gradients(case.sparse(), question, case)
    torch.testing.assert_close(sparse, dense, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("question", QUESTIONS)
def test_bfloat16_is_taken_at_its_exact_values(question: str) -> None:
    """Values are float32 answers for the bfloat16 numbers; gradients are bfloat16, right to a few roundings."""
    case = make_case(torch.bfloat16)
    exact = replace(
        case,
        hidden_SH=case.hidden_SH.detach().double().requires_grad_(),
        weight_VH=case.weight_VH.detach().double().requires_grad_(),
        bias_V=case.bias_V.detach().double().requires_grad_(),
    )
    low = answer_and_gradients(case.sparse(), question, case)
    high = answer_and_gradients(exact.dense(), question, exact)
    assert low[0].dtype == torch.float32
    # The shift of a soft value is itself made in bfloat16 by this test.
    tolerance = 1e-2 if "shift" in question or question == "tempered soft value" else 3e-5
    torch.testing.assert_close(low[0].double(), high[0], rtol=tolerance, atol=tolerance)
    for got, expected in zip(low[1:], high[1:], strict=True):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()) + 1e-9)


@pytest.mark.parametrize("question", QUESTIONS)
def test_gradients_agree_with_finite_differences(question: str) -> None:
    """Every question passes gradcheck with respect to hidden states, weight and bias."""
    case = make_case()
    if "tolerance" in question:  # a discontinuous gradient by intent
        return

    def ask(hidden_SH: Tensor, weight_VH: Tensor, bias_V: Tensor) -> Tensor:
        moved = replace(case, hidden_SH=hidden_SH, weight_VH=weight_VH, bias_V=bias_V)
        return QUESTIONS[question](moved.sparse(), moved)

    assert torch.autograd.gradcheck(ask, tuple(case.leaves), fast_mode=True)


def test_statistics_are_the_dense_ones(tile_elements: int) -> None:
    """Log-sum-exp, entropy and argmax; free after any walk over the vocabulary, also where states were left out."""
    case = make_case()
    expected = case.dense().statistics()
    for ask in (lambda head: head.maximum(), lambda head: tail(head, case), lambda head: head.statistics()):
        head = case.sparse()
        assert not head.statistics_are_free
        ask(head)
        torch.testing.assert_close(head.statistics().entropy_S, expected.entropy_S)
        torch.testing.assert_close(head.statistics().logsumexp_S, expected.logsumexp_S)
        assert torch.equal(head.statistics().argmax_S, expected.argmax_S)
        assert head.statistics_are_free
        assert torch.equal(head.narrow(2, 3).statistics().argmax_S, expected.argmax_S[2:5])


def test_value_of_a_term_is_its_value_per_state() -> None:
    """sum = (weight * value).sum(), with a value of 0 where the weight is 0."""
    case = make_case()
    for head in (case.dense(), case.sparse()):
        terms = [
            head.tail(case.sets, inside(head, case), case.weight_S),
            head.forward_kl(DenseHead(case.teacher_SV), case.weight_S),
        ]
        for term in terms:
            torch.testing.assert_close((case.weight_S * term.value_S).sum(), term.sum.detach())
            assert (term.value_S[case.weight_S == 0] == 0).all()
            assert not term.value_S.requires_grad
    # Each set's own KL: of softmax(teacher) from softmax(student).
    log_p, log_q = (torch.log_softmax(z, 1) for z in (case.teacher_SV, case.dense().logits_SV.detach()))
    expected_S = torch.where(case.weight_S > 0, (log_p.exp() * (log_p - log_q)).sum(1), 0.0)
    torch.testing.assert_close(terms[1].value_S, expected_S)


def test_a_sparse_teacher_gives_what_a_dense_one_gives() -> None:
    """The KL from a teacher of another hidden size, by either head, and no gradient in the teacher."""
    case, generator = make_case(), torch.Generator().manual_seed(8)
    teacher = [torch.randn(n, 9, generator=generator, dtype=torch.float64).requires_grad_() for n in (S, V)]
    dense_teacher = DenseHead(teacher[0] @ teacher[1].T)
    for head in (case.dense(), case.sparse()):
        values = [head.forward_kl(other, case.weight_S) for other in (dense_teacher, SparseHead(*teacher))]
        torch.testing.assert_close(values[0].value_S, values[1].value_S)
        values[1].sum.backward()
    assert teacher[0].grad is teacher[1].grad is None


def everything(head: StudentHead, case: Case) -> Tensor:
    """One loss of many terms, some of a tempered and of narrowed heads."""
    parts = [tail(head, case), tail(head.tempered(0.8), case, estimator="sampled"), head.maximum().sum()]
    parts.append(head.narrow(0, 4).cross_entropy(case.token_S[:4].clamp(min=0), case.weight_S[:4], z_loss_coef=0.1).sum)
    parts.append(head.narrow(4, 7).soft_value(None, 0.0).sum())
    return torch.stack(parts).sum() * 0.37


def test_several_terms_and_micro_batches_meet_in_the_gradient() -> None:
    """One backward pass of many terms, twice: gradients add up in weight.grad, as those of the dense head do."""
    gradients = []
    for kind in ("dense", "sparse"):
        case, other = make_case(), make_case(seed=1)
        other = replace(other, weight_VH=case.weight_VH, bias_V=case.bias_V)
        for micro_batch in (case, other):
            everything(getattr(micro_batch, kind)(), micro_batch).backward()
        gradients.append([x.grad for x in (*case.leaves, other.hidden_SH)])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_tied_embedding_gets_both_gradients() -> None:
    """A weight that also embeds the input has the sum of its two gradients."""
    gradients = []
    for kind in ("dense", "sparse"):
        case = make_case(bias=False)
        hidden_SH = torch.tanh(case.weight_VH[torch.arange(S) * 3 % V]) + case.hidden_SH
        tied = replace(case, hidden_SH=hidden_SH)
        everything(getattr(tied, kind)(), tied).backward()
        gradients.append([case.hidden_SH.grad, case.weight_VH.grad])
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of a few rows and columns, so that nothing of a tile is as large as the weight."""
    monkeypatch.setattr(tiles, "CPU_TILE_ELEMENTS", 40)
    monkeypatch.setattr(tiles, "MIN_COLUMNS", 4)


def case_of_small_sets() -> Case:
    """Sets that together name fewer than V ids."""
    case = make_case()
    return replace(case, sets=top_p_candidates(5 * case.teacher_SV, top_p=0.6))


@pytest.mark.usefixtures("small_tiles")
def test_only_one_weight_sized_tensor_is_made() -> None:
    """Many terms with one backward pass allocate a single [V, H] tensor, the gradient itself."""
    case = case_of_small_sets()
    loss = everything(case.sparse(), case)
    with Allocations() as seen:
        loss.backward()
    assert seen.of_shape(V, H) == 1
    assert case.weight_VH.grad is not None


def test_backward_passes_do_not_mix() -> None:
    """A graph that is kept gives its gradient again; a pass for the hidden states alone leaves nothing behind."""
    case = make_case()
    loss = everything(case.sparse(), case)
    torch.autograd.grad(loss, case.hidden_SH, retain_graph=True)
    first = torch.autograd.grad(loss, case.leaves, retain_graph=True)
    second = torch.autograd.grad(loss, case.leaves)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(list(first), list(torch.autograd.grad(everything(case.dense(), case), case.leaves)))


@pytest.mark.usefixtures("small_tiles")
def test_what_is_frozen_gets_no_gradient() -> None:
    """A frozen weight or frozen hidden states: the other's gradient is unchanged, and no buffer is made."""
    case = case_of_small_sets()
    whole = torch.autograd.grad(everything(case.sparse(), case), case.leaves)
    frozen = replace(case, weight_VH=case.weight_VH.detach(), bias_V=case.bias_V.detach())
    loss = everything(frozen.sparse(), frozen)
    with Allocations() as seen:
        torch.testing.assert_close(torch.autograd.grad(loss, case.hidden_SH)[0], whole[0])
    assert seen.of_shape(V, H) == 0
    frozen = replace(case, hidden_SH=case.hidden_SH.detach(), bias_V=case.bias_V.detach())
    loss = everything(frozen.sparse(), frozen)
    torch.testing.assert_close(torch.autograd.grad(loss, case.weight_VH)[0], whole[1])
    with torch.no_grad():
        assert not everything(case.sparse(), case).requires_grad
    SparseHead(*case.leaves).statistics()
    assert all(leaf.grad is None for leaf in case.leaves)


def test_storage_may_come_and_go_between_forward_and_backward() -> None:
    """As ZeRO-3 does: the parameter is empty in between, and whole again in the backward pass."""
    case = make_case()
    expected = torch.autograd.grad(everything(case.sparse(), case), case.leaves)
    loss, storage = everything(case.sparse(), case), case.weight_VH.data
    case.weight_VH.data = torch.empty(0, dtype=torch.float64)
    case.weight_VH.data = storage.clone()
    torch.testing.assert_close(torch.autograd.grad(loss, case.leaves), expected)


def test_a_weight_changed_before_the_backward_pass_is_an_error() -> None:
    """An optimizer step between forward and backward would give wrong gradients silently; autograd refuses."""
    case = make_case()
    loss = case.sparse().logsumexp().sum()
    with torch.no_grad():
        case.weight_VH.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_states_without_weight_or_gradient_cost_nothing() -> None:
    """Products are made for states of weight > 0 alone, backward for those beyond the tolerance alone."""
    case = make_case(bias=False)
    weight_S = torch.zeros(S)
    weight_S[[1, 4, 9]] = 0.5
    head = case.sparse()
    inside_S = inside(head, case).detach()
    with Allocations() as seen:
        term = head.tail(case.sets, inside_S, weight_S)
    assert seen.products() == 3 * V
    with Allocations() as seen:
        torch.autograd.grad(term.sum, case.weight_VH)
    assert seen.products() == 3 * V  # the logits again; the product with the hidden states goes to the buffer in place
    none = head.tail(case.sets, inside_S, weight_S, tolerance=1.1)
    with Allocations() as seen:
        assert (torch.autograd.grad(none.sum, case.weight_VH)[0] == 0).all()
    assert seen.products() == 0
    assert none.sum == term.sum


def test_tolerance_leaves_out_small_differences_only() -> None:
    """Gradients of states with |P_theta - P| above the tolerance are untouched, of the others 0."""
    case = make_case()
    head, ones_S = case.dense(), torch.ones(S)
    p_S = torch.exp(inside(head, case) - head.logsumexp())
    distance_S = (p_S - torch.exp(-case.sets.neg_log_mass_S)).abs().detach()
    cut = float(distance_S.median()) + 1e-9
    gradients = []
    for tolerance in (0.0, cut):
        sparse = case.sparse()
        term = sparse.tail(case.sets, inside(sparse, case), ones_S, tolerance=tolerance)
        gradients.append(torch.autograd.grad(term.sum, case.hidden_SH)[0])
    small_S = distance_S < cut
    assert 0 < int(small_S.sum()) < S
    torch.testing.assert_close(gradients[1], torch.where(small_S[:, None], 0.0, gradients[0]))


def test_sets_of_the_whole_vocabulary() -> None:
    """p = 1: no candidates are listed, nothing lies outside, and the tail is 0; so is that of a set that lists all."""
    case = make_case()
    whole = CandidateSets.whole(S)
    every = CandidateSets(torch.arange(V).repeat(S), torch.arange(S + 1) * V, torch.zeros(S), None)
    for head in (case.dense(), case.sparse()):
        assert head.at_candidates(whole).shape == (0,)
        for sets in (whole, every):
            assert (head.logsumexp_outside(sets) == -float("inf")).all()
            for estimator in ("exact", "sampled"):
                term = head.tail(sets, head.logsumexp(), case.weight_S, estimator=estimator, num_samples=4)
                assert term.sum.item() == 0.0
                assert (term.value_S == 0).all()
                assert (torch.autograd.grad(term.sum, case.hidden_SH, retain_graph=True)[0] == 0).all()


def test_minus_infinity_in_the_bias_is_a_masked_token() -> None:
    """A bias of -inf takes a token out of every sum, without NaN in values, entropy or gradients."""
    case = make_case()
    bias_V = case.bias_V.detach().clone()
    bias_V[::3] = -float("inf")
    masked = replace(case, bias_V=bias_V)
    dense, sparse = masked.dense(), masked.sparse()
    torch.testing.assert_close(sparse.logsumexp(), dense.logsumexp())
    torch.testing.assert_close(sparse.statistics().entropy_S, dense.statistics().entropy_S)
    gradients = [torch.autograd.grad(head.logsumexp().sum(), case.hidden_SH)[0] for head in (dense, sparse)]
    torch.testing.assert_close(gradients[1], gradients[0])


def test_nan_is_not_hidden() -> None:
    """A hidden state with NaN gives NaN, so that a training step can refuse it."""
    case = make_case()
    hidden_SH = case.hidden_SH.detach().clone()
    hidden_SH[1, 2] = float("nan")
    head = SparseHead(hidden_SH, case.weight_VH)
    assert head.logsumexp().isnan().tolist() == [state == 1 for state in range(S)]
    assert tail(head, case).isnan()


def test_wrong_shapes_are_refused() -> None:
    """Hidden sizes that differ, a bias of another length, mixed float64, another vocabulary of the teacher."""
    case = make_case()
    with pytest.raises(ValueError, match=r"\[S, H\] and \[V, H\]"):
        SparseHead(case.hidden_SH[:, 1:], case.weight_VH)
    with pytest.raises(ValueError, match=r"\[V\] are needed"):
        SparseHead(case.hidden_SH, case.weight_VH, case.bias_V[1:])
    with pytest.raises(ValueError, match="float64 does not mix"):
        SparseHead(case.hidden_SH, case.weight_VH.float())
    for head in (case.dense(), case.sparse()):
        with pytest.raises(ValueError, match="same states over the same tokens"):
            head.forward_kl(DenseHead(case.teacher_SV[:, 1:]), case.weight_S)


OBJECTIVES = [
    {"preset": "robust"},
    {"preset": "robust", "tail_estimator": "sampled", "tail_samples": 5},
    {"preset": "robust", "tau": 1.3, "q_shift": "logsumexp", "tail_tolerance": 0.05},
    {"preset": "robust", "q_shift": "topp_max", "tail_coef": 0.0},
    {"preset": "paper"},
    {"preset": "paper", "top_p": 1.0},
    {"preset": "paper", "top_p": 1.0, "q_min": None, "q_shift": "logsumexp"},
]


@pytest.mark.parametrize("values", OBJECTIVES)
def test_the_whole_loss_is_the_dense_one(make_batch: Callable, values: dict[str, Any], tile_elements: int) -> None:
    """bellman_loss: value, gradients and metrics."""
    options = DistillConfig.model_validate(values)
    batch = make_batch([(5, "stop"), (4, "length"), (1, "stop")], seed=4, vocab_size=30, top_p=0.9)
    sets = CandidateSets.whole(len(batch.logits_SV)) if options.top_p == 1.0 else batch.sets
    results = []
    for sparse in (True, False):
        generator = torch.Generator().manual_seed(5)
        hidden_SH = torch.randn(len(batch.logits_SV), H, dtype=torch.float64, generator=generator).requires_grad_()
        weight_VH = torch.randn(30, H, dtype=torch.float64, generator=generator).requires_grad_()
        head = SparseHead(hidden_SH, weight_VH) if sparse else DenseHead(hidden_SH @ weight_VH.T)
        terms = bellman_loss(
            head,
            sets,
            batch.trajectories,
            options,
            shift_constant=1.5,
            stop_ids=[0],
            generator=generator,
            **batch.counts,
        )
        terms.loss.backward()
        results.append((terms.loss.detach(), hidden_SH.grad, weight_VH.grad, mean_metrics(terms.metrics)))
    torch.testing.assert_close(results[0][:3], results[1][:3], rtol=1e-10, atol=1e-13)
    assert results[0][3] == pytest.approx(results[1][3], rel=1e-6)


class Allocations(TorchDispatchMode):
    """Records the storages that operations make, and the elements of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self._shapes: list[tuple[str, torch.Size]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        taken = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in taken:
                self._shapes.append((str(func), x.shape))
        return out

    @property
    def largest(self) -> int:
        return max(shape.numel() for _, shape in self._shapes)

    def of_shape(self, *shape: int) -> int:
        return sum(seen == torch.Size(shape) for _, seen in self._shapes)

    def products(self) -> int:
        return sum(shape.numel() for name, shape in self._shapes if "mm" in name)


@pytest.mark.parametrize("values", [*OBJECTIVES, {"name": "gkd"}, {"name": "rkl"}, {"name": "minillm"}])
def test_no_tensor_of_states_times_vocabulary_exists(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward of the loss with metrics, and of a cross-entropy, make no tensor beyond [V, H] or a tile."""
    monkeypatch.setattr(tiles, "CPU_TILE_ELEMENTS", 2000)
    monkeypatch.setattr(tiles, "MIN_COLUMNS", 8)
    num_states, vocab_size, hidden_size = 400, 500, 5
    options = DistillConfig.model_validate(values)
    generator = torch.Generator().manual_seed(0)
    teacher_SV = 6 * torch.randn(num_states, vocab_size, generator=generator)
    sets = top_p_candidates(teacher_SV, top_p=options.top_p)
    taken_S, number_S = teacher_SV.argmax(1), torch.arange(num_states)
    behaviour = Behaviour(number_S >= 0, torch.full((num_states,), -1.0), torch.full((num_states,), -1.0))
    next_S = torch.where(number_S < num_states - 1, number_S + 1, -1)
    steps = Trajectories(taken_S, next_S, number_S < 0, number_S * 0, behaviour if options.name != "bd" else None)
    hidden_SH = torch.randn(num_states, hidden_size, generator=generator).requires_grad_()
    weight_VH = torch.randn(vocab_size, hidden_size, generator=generator).requires_grad_()
    with Allocations() as seen:
        head = SparseHead(hidden_SH, weight_VH)
        output = resolve_algorithm(options.name)(options, [0], 1.5).loss(head, sets, steps, StepContext(1.0, 1.0))
        loss, _ = token_cross_entropy(head, taken_S, torch.ones(num_states), denominator=1.0)
        (output.loss + loss).backward()
    assert weight_VH.grad is not None
    # Beyond the weight: gathered rows of the candidates, and the two tiles.
    allowed = max(vocab_size * hidden_size, sets.num_candidates * hidden_size, 2 * 2000)
    assert seen.largest <= allowed < num_states * vocab_size / 10
