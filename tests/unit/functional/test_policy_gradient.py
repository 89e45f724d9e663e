"""MiniLLM's loss: its gradient is that of the reverse KL of whole responses, enumerated; literals of every option."""

# S states, V vocabulary, T response tokens

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from openrlhf_bd.config import DistillConfig
from openrlhf_bd.functional.candidates import CandidateSets
from openrlhf_bd.functional.head import DenseHead
from openrlhf_bd.functional.metrics import mean_metrics
from openrlhf_bd.functional.policy_gradient import policy_gradient_loss
from openrlhf_bd.functional.trajectories import Behaviour, Trajectories

VOCAB_SIZE, DEPTH = 3, 3
PREFIXES = [p for length in range(DEPTH) for p in itertools.product(range(1, VOCAB_SIZE), repeat=length)]
STATE = {prefix: index for index, prefix in enumerate(PREFIXES)}


def responses() -> list[tuple[int, ...]]:
    """Every response of at most three tokens; token 0 ends it."""
    return [(*p, token) for p in PREFIXES for token in range(VOCAB_SIZE) if (*p, token) not in STATE]


def policies(seed: int) -> list[Tensor]:
    """Logits of a student, its teacher and a behaviour, at every prefix."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(len(PREFIXES), VOCAB_SIZE, generator=generator, dtype=torch.float64) for _ in range(3)]


def log_probability(logits_SV: Tensor, response: tuple[int, ...]) -> Tensor:
    states = [STATE[response[:t]] for t in range(len(response))]
    return torch.log_softmax(logits_SV, dim=1)[states, list(response)]


def options(**values: object) -> DistillConfig:
    plain = {"name": "minillm", "importance_clip": 1e9, "length_normalisation": False}
    return DistillConfig.model_validate({**plain, **values})


def loss_of(
    z_SV: Tensor, teacher_SV: Tensor, behaviour_SV: Tensor, response: tuple[int, ...], chosen: DistillConfig
) -> Tensor:
    """Loss of one response, sum over its tokens; sets of the whole vocabulary, so that every KL is exact."""
    num_tokens = len(response)
    states = [STATE[response[:t]] for t in range(num_tokens)]
    ids = torch.arange(VOCAB_SIZE).repeat(num_tokens)
    sets = CandidateSets(
        ids,
        torch.arange(num_tokens + 1) * VOCAB_SIZE,
        torch.zeros(num_tokens, dtype=torch.float64),
        torch.log_softmax(teacher_SV, dim=1)[states].flatten(),
    )
    trajectories = Trajectories(
        torch.tensor(response),
        torch.tensor([*range(1, num_tokens), -1]),
        torch.arange(num_tokens) == num_tokens - 1,
        torch.zeros(num_tokens, dtype=torch.int64),
        Behaviour(
            torch.ones(num_tokens, dtype=torch.bool),
            log_probability(behaviour_SV, response).detach(),
            log_probability(teacher_SV, response),
        ),
    )
    return policy_gradient_loss(DenseHead(z_SV[states]), sets, trajectories, chosen, num_tokens=1, num_rows=1)[0]


def exact_gradient(z_SV: Tensor, teacher_SV: Tensor) -> Tensor:
    """Autograd of KL(student || teacher) over whole responses."""
    y_SV = z_SV.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for response in responses():
        log_q, log_p = (log_probability(logits, response).sum() for logits in (y_SV, teacher_SV))
        total = total + log_q.exp() * (log_q - log_p)
    total.backward()
    assert y_SV.grad is not None
    return y_SV.grad


def expected_gradient(z_SV: Tensor, teacher_SV: Tensor, behaviour_SV: Tensor, chosen: DistillConfig) -> Tensor:
    """Gradient of the loss, averaged over the responses that the behaviour samples."""
    y_SV, mass = z_SV.clone().requires_grad_(), 0.0
    for response in responses():
        probability = float(log_probability(behaviour_SV, response).sum().exp())
        (probability * loss_of(y_SV, teacher_SV, behaviour_SV, response, chosen)).backward()
        mass += probability
    assert mass == pytest.approx(1.0)
    assert y_SV.grad is not None
    return y_SV.grad


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_on_policy_gradient_is_exact(seed: int, importance: str) -> None:
    """Sampled from the student itself: the expected gradient is that of the reverse KL of responses."""
    student_SV, teacher_SV, _ = policies(seed)
    found_SV = expected_gradient(student_SV, teacher_SV, student_SV, options(importance=importance))
    torch.testing.assert_close(found_SV, exact_gradient(student_SV, teacher_SV), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("seed", range(5))
def test_off_policy_gradient_is_exact_with_weights_of_the_sequence(seed: int) -> None:
    """Sampled from any other policy, as old weights or the teacher mixed in: weights of the sequence correct for it."""
    student_SV, teacher_SV, behaviour_SV = policies(seed)
    exact_SV = exact_gradient(student_SV, teacher_SV)
    found_SV = expected_gradient(student_SV, teacher_SV, behaviour_SV, options(importance="sequence"))
    torch.testing.assert_close(found_SV, exact_SV, rtol=1e-6, atol=1e-7)
    # The authors' weights of single tokens are an approximation: nearer than none, not exact.
    token_SV = expected_gradient(student_SV, teacher_SV, behaviour_SV, options(importance="token"))
    assert (token_SV - exact_SV).abs().max() > 1e-3


@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_teacher_is_stationary(importance: str) -> None:
    """A student equal to its teacher has no gradient, whoever sampled."""
    _, teacher_SV, behaviour_SV = policies(7)
    found_SV = expected_gradient(teacher_SV, teacher_SV, behaviour_SV, options(importance=importance))
    torch.testing.assert_close(found_SV, torch.zeros_like(found_SV), rtol=0, atol=1e-7)


# Two states, vocabulary 2, sets {0} with a bucket: the student has 1/2 1/2, the teacher 4/5 1/5.
def two_tokens(
    behaviour: list[float], chosen: DistillConfig, *, taken: tuple[int, int] = (0, 0)
) -> tuple[Tensor, dict]:
    z_SV = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    sets = CandidateSets(
        torch.tensor([0, 0]),
        torch.arange(3),
        torch.full((2,), -math.log(0.8), dtype=torch.float64),
        torch.full((2,), math.log(0.8), dtype=torch.float64),
    )
    teacher = [math.log(0.8 if token == 0 else 0.2) for token in taken]
    trajectories = Trajectories(
        torch.tensor(taken),
        torch.tensor([1, -1]),
        torch.tensor([False, True]),
        torch.tensor([0, 0]),
        Behaviour(torch.ones(2, dtype=torch.bool), torch.tensor(behaviour).log(), torch.tensor(teacher)),
    )
    loss, metrics = policy_gradient_loss(DenseHead(z_SV), sets, trajectories, chosen, num_tokens=2, num_rows=1)
    loss.backward()
    assert z_SV.grad is not None
    return z_SV.grad[:, 0] * 2, mean_metrics(metrics)


# d KL / d z_0 = q_0 (log q_0/p_0 - KL) = 1/2 (log 5/8 - 1/2 log 5/8 - 1/2 log 5/2) = -1/4 log 4, and
# d log q(0) / d z_0 = 1/2.
SINGLE = -0.25 * math.log(4)
REWARD = math.log(0.8 / 0.5)


@pytest.mark.parametrize(
    ("behaviour", "values", "expected"),
    [
        # On-policy: A_0 = r_1 = log 8/5.
        ([0.5, 0.5], {}, [SINGLE - 0.5 * REWARD, SINGLE]),
        # rho = 2 at both: single and long part twice; with the sequence's weights 1 and 2, r_1 counts rho_1 too.
        ([0.25, 0.25], {}, [2 * SINGLE - 2 * 0.5 * REWARD, 2 * SINGLE]),
        ([0.25, 0.25], {"importance": "sequence"}, [SINGLE - 2 * 2 * 0.5 * REWARD, 2 * SINGLE]),
        # Clip at 1.2: the single part counts 1.2, and a good action that has become likelier gets no more gradient.
        ([0.25, 0.25], {"importance_clip": 0.2}, [1.2 * SINGLE, 1.2 * SINGLE]),
        # rho = 5/8: a good action that has become rarer is still pushed up.
        ([0.8, 0.5], {"importance_clip": 0.2}, [0.625 * SINGLE - 0.625 * 0.5 * REWARD, SINGLE]),
    ],
)
def test_gradients_of_known_numbers(behaviour: list[float], values: dict[str, object], expected: list[float]) -> None:
    """Each part with its weight, worked out by hand."""
    assert two_tokens(behaviour, options(**values))[0].tolist() == pytest.approx(expected, abs=1e-7)


def test_clip_of_a_bad_action() -> None:
    """A_0 = log 2/5 < 0 with rho_0 = 5/8 below 1 - .2: no more gradient; with rho_0 = 2 it is pushed down."""
    bad = math.log(0.2 / 0.5)
    found, metrics = two_tokens([0.8, 0.5], options(importance_clip=0.2), taken=(0, 1))
    assert found.tolist() == pytest.approx([0.625 * SINGLE, SINGLE], abs=1e-7)
    assert metrics["clipped_rate"] == pytest.approx(1 / 2)
    assert metrics["advantage"] == pytest.approx(bad / 2)
    assert metrics["importance"] == pytest.approx((0.625 + 1) / 2)
    found, _ = two_tokens([0.25, 0.5], options(importance_clip=0.2), taken=(0, 1))
    assert found.tolist() == pytest.approx([1.2 * SINGLE - 2 * 0.5 * bad, SINGLE], abs=1e-7)


def test_length_normalisation_is_a_mean_over_later_tokens(make_batch: Callable) -> None:
    """A_t of six tokens: the sum of the later rewards over 5, 4, 3, 2, 1 tokens, 0 at the last; also of a cut row."""
    rewards = []
    for response in ((1, 2, 0), (1, 2, 1)):
        student_SV, teacher_SV, _ = policies(8)
        log_q, log_p = (log_probability(logits, response) for logits in (student_SV, teacher_SV))
        rewards.append((log_p - log_q).tolist())
        results = []
        for normalised in (False, True):
            y_SV = student_SV.clone().requires_grad_()
            chosen = options(length_normalisation=normalised)
            loss_of(y_SV, teacher_SV, student_SV, response, chosen).backward()
            assert y_SV.grad is not None
            results.append(y_SV.grad)
        # Only the first of three tokens has two behind it: halving its advantage adds half of it times grad log q.
        first = torch.log_softmax(student_SV, dim=1)[0].exp()
        score = -first
        score[response[0]] += 1
        difference_SV = torch.zeros_like(student_SV)
        difference_SV[0] = 0.5 * sum(rewards[-1][1:]) * score
        torch.testing.assert_close(results[1] - results[0], difference_SV, rtol=1e-6, atol=1e-7)


def test_rows_without_a_behaviour_are_refused() -> None:
    """The message says where such rows come from."""
    with pytest.raises(ValueError, match=r"--algo\.distill\.mode online, or a store"):
        policy_gradient_loss(
            DenseHead(torch.zeros(1, 2)),
            CandidateSets(torch.tensor([0]), torch.tensor([0, 1]), torch.zeros(1), torch.zeros(1)),
            Trajectories(torch.tensor([0]), torch.tensor([-1]), torch.tensor([True]), torch.tensor([0])),
            options(),
            num_tokens=1,
            num_rows=1,
        )
