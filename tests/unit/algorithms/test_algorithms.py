import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from openrlhf_bd.algorithms import resolve_algorithm
from openrlhf_bd.algorithms.base import Needs, StepContext
from openrlhf_bd.algorithms.registry import BUILT_IN
from openrlhf_bd.config import OBJECTIVE_OPTIONS, PRESETS, DistillConfig
from openrlhf_bd.errors import ConfigError
from openrlhf_bd.functional.bellman import bellman_loss
from openrlhf_bd.functional.candidates import CandidateSets, top_p_candidates
from openrlhf_bd.functional.head import DenseHead
from openrlhf_bd.functional.sparse_head import SparseHead
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
    output = algorithm.loss(DenseHead(LOGITS), None, trajectories(), StepContext(6, 4))
    assert float(output.loss) == pytest.approx(sum(NLL) / 6)
    assert float(output.metrics["gpt_loss"][0] / output.metrics["gpt_loss"][1]) == pytest.approx(sum(NLL) / 3)
    algorithm = resolve_algorithm(name)(DistillConfig(reduction="sequence"), [0])
    output = algorithm.loss(DenseHead(LOGITS), None, trajectories(), StepContext(6, 4))
    assert float(output.loss) == pytest.approx(((NLL[0] + NLL[1]) / 2 + NLL[2]) / 4)
    algorithm = resolve_algorithm(name)(DistillConfig(z_loss_coef=0.1), [0])
    output = algorithm.loss(DenseHead(LOGITS), None, trajectories(), StepContext(6, 4))
    squares = 2 * math.log(8) ** 2 + math.log(4) ** 2
    assert float(output.loss) == pytest.approx((sum(NLL) + 0.1 * squares) / 6)


def test_bd_is_the_bellman_loss_of_its_options() -> None:
    """bd hands its options, constant and stop tokens to the objective."""
    options = DistillConfig(reduction="sequence")
    algorithm = resolve_algorithm("bd")(options, [0], 1.5)
    counts = {"num_tokens": 3.0, "num_rows": 2.0}
    output = algorithm.loss(DenseHead(LOGITS), SETS, trajectories(), StepContext(**counts))
    terms = bellman_loss(DenseHead(LOGITS), SETS, trajectories(), options, shift_constant=1.5, stop_ids=[0], **counts)
    assert torch.equal(output.loss, terms.loss)
    assert output.metrics.keys() == terms.metrics.keys()
    assert "stop_prob" in output.metrics


def test_bd_uses_what_the_step_gives() -> None:
    """The step's number warms the regulariser up, and the target network's logits give the next values."""
    warm = DistillConfig(preset="paper", td_warmup_steps=4)
    losses = [
        float(
            resolve_algorithm("bd")(warm, [0])
            .loss(DenseHead(LOGITS), SETS, trajectories(), StepContext(3, 2, step))
            .loss
        )
        for step in (1, 2, 4, 5)
    ]
    assert losses[1] - losses[0] == pytest.approx((losses[2] - losses[1]) / 2)
    assert losses[3] == losses[2]
    target = DistillConfig(preset="paper", next_value_gradient="target")
    algorithm = resolve_algorithm("bd")(target, [0])
    assert algorithm.needs.target_network
    heads = [DenseHead(LOGITS), DenseHead(LOGITS.flip(1))]
    found = [
        float(algorithm.loss(DenseHead(LOGITS), SETS, trajectories(), StepContext(3, 2, target_head=head)).loss)
        for head in heads
    ]
    assert found[0] != found[1]
    with pytest.raises(ConfigError, match="target_head"):
        algorithm.loss(DenseHead(LOGITS), SETS, trajectories(), StepContext(3, 2))


@pytest.mark.parametrize("preset", ["robust", "paper", "released"])
def test_kd_is_the_cross_entropy_of_the_coarsened_distributions(preset: str) -> None:
    """-sum pi* log pi over the candidates - (1 - P) log(1 - P_theta), whatever the options of the objective are.

    State 0: .6 and .3 against 5/8 and 2/8, the rest .1 against 1/8. State 1: .9 against 3/8, .1 against 5/8.
    State 2: .9 against 1/2, .1 against 1/2.
    """
    sets = replace(SETS, neg_log_mass_S=torch.full((3,), -math.log(0.9), dtype=torch.float64))
    sets = replace(sets, logprobs_M=torch.log(torch.tensor([0.6, 0.3, 0.9, 0.9], dtype=torch.float64)))
    pairs = [
        [(0.6, 5 / 8), (0.3, 2 / 8), (0.1, 1 / 8)],
        [(0.9, 3 / 8), (0.1, 5 / 8)],
        [(0.9, 1 / 2), (0.1, 1 / 2)],
    ]
    losses = [-sum(teacher * math.log(student) for teacher, student in state) for state in pairs]
    options = DistillConfig.model_validate({"preset": preset, "reduction": "token"})
    algorithm = resolve_algorithm("kd")(options, [0])
    z_SV = LOGITS.clone().requires_grad_()
    output = algorithm.loss(DenseHead(z_SV), sets, trajectories(), StepContext(6, 4))
    assert output.loss.item() == pytest.approx(sum(losses) / 6)
    # The gradient of a KL at each logit: the student's mass minus the teacher's, spread over the bucket by the student.
    output.loss.backward()
    assert z_SV.grad is not None
    assert z_SV.grad[0].tolist() == pytest.approx([(1 / 8 - 0.1) / 6, (2 / 8 - 0.3) / 6, (5 / 8 - 0.6) / 6])
    # Ids 1 and 2 share the bucket: student 1/8 and 4/8 of 5/8, teacher .1.
    assert z_SV.grad[1].tolist() == pytest.approx([(3 / 8 - 0.9) / 6, (1 / 8 - 0.1 / 5) / 6, (4 / 8 - 0.1 * 4 / 5) / 6])
    algorithm = resolve_algorithm("kd")(options.model_copy(update={"reduction": "sequence"}), [0])
    output = algorithm.loss(DenseHead(LOGITS), sets, trajectories(), StepContext(6, 4))
    assert float(output.loss) == pytest.approx(((losses[0] + losses[1]) / 2 + losses[2]) / 4)


@pytest.mark.parametrize("name", ["kd", "gkd", "rkl", "minillm"])
def test_distributions_need_a_mask(name: str) -> None:
    """At p = 1 no store has the teacher's distribution; the message names no option that they do not read."""
    with pytest.raises(ConfigError, match=rf"^--algo\.distill\.name {name} .* top_p below 1") as caught:
        resolve_algorithm(name).needs_of(DistillConfig(name=name, preset="paper", top_p=1.0))
    assert "linear_term" not in str(caught.value)


class TestKdVariants:
    """Word-level distillation on the data set's own responses, and over the whole vocabulary."""

    def test_needs(self) -> None:
        """Gold responses are scored for sets; the whole vocabulary needs the teacher itself, and no store of sets."""
        sets = Needs("gold", candidate_sets=True, candidate_logprobs=True)
        found = {
            (responses, support): resolve_algorithm("kd").needs_of(
                DistillConfig(name="kd", responses=responses, kd_support=support)
            )
            for responses in ("teacher", "gold")
            for support in ("sets", "full")
        }
        assert found["gold", "sets"] == sets
        assert found["gold", "full"] == Needs("gold", live_teacher=True)
        assert found["teacher", "full"] == Needs("teacher", live_teacher=True, student_rollouts="optional")
        assert [needs.rows_by_teacher for needs in found.values()] == [True, True, True, False]

    @pytest.mark.parametrize(
        ("values", "flag"),
        [
            ({"responses": "gold", "top_p": 0.5}, "top_p 0.5"),
            ({"responses": "gold", "include_eos": False}, "include_eos false"),
            ({"tail_tolerance": 0.1}, "tail_tolerance 0.1"),
        ],
    )
    def test_options_of_the_sets_are_refused_without_sets(self, values: dict[str, object], flag: str) -> None:
        """Over the whole vocabulary what concerns sets is refused; with the teacher's rows they are still recorded."""
        options = DistillConfig.model_validate({"name": "kd", "kd_support": "full", **values})
        with pytest.raises(ConfigError, match=rf"kd with --algo.distill.kd_support full does not read .*{flag}"):
            resolve_algorithm("kd").needs_of(options)
        recorded = DistillConfig(name="kd", kd_support="full", top_p=1.0)
        assert not resolve_algorithm("kd").needs_of(recorded).candidate_sets

    @pytest.mark.parametrize("head", ["dense", "sparse"])
    @pytest.mark.parametrize("reduction", ["token", "sequence"])
    def test_full_is_the_kl_of_the_whole_distributions(self, head: str, reduction: str) -> None:
        """Value and gradient in float64, against softmaxes written out: tau, counts, a state without action."""
        generator = torch.Generator().manual_seed(1)
        student_SH, teacher_SH = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
        student_VH, teacher_VH = 2 * torch.randn(2, 300, 4, generator=generator, dtype=torch.float64)
        # Rows of two tokens and of three, of which the last state has no action.
        rows = Trajectories(
            torch.tensor([3, 1, 4, 7, -1]),
            torch.tensor([1, -1, 3, 4, -1]),
            torch.tensor([False, True, False, False, False]),
            torch.tensor([0, 0, 1, 1, 1]),
        )
        share_S = torch.tensor([1, 1, 1, 1, 0], dtype=torch.float64) / (7 if reduction == "token" else 2 * 3)
        tau, losses, gradients = 1.5, [], []
        for exact in (True, False):
            hidden_SH, weight_VH = student_SH.clone().requires_grad_(), student_VH.clone().requires_grad_()
            if exact:
                student = torch.softmax(hidden_SH @ weight_VH.T / tau, dim=1)
                teacher = torch.softmax(teacher_SH @ teacher_VH.T, dim=1)
                loss = (share_S * (teacher * (teacher.log() - student.log())).sum(dim=1)).sum()
            else:
                options = DistillConfig.model_validate(
                    {"name": "kd", "kd_support": "full", "tau": tau, "reduction": reduction}
                )
                heads = [
                    DenseHead(z_SH @ z_VH.T) if head == "dense" else SparseHead(z_SH, z_VH)
                    for z_SH, z_VH in ((hidden_SH, weight_VH), (teacher_SH, teacher_VH))
                ]
                context = StepContext(7, 3, teacher_head=heads[1])
                output = resolve_algorithm("kd")(options, [1]).loss(heads[0], None, rows, context)
                loss = output.loss
                assert {"forward_kl", "nll", "entropy", "stop_prob"} <= output.metrics.keys()
            loss.backward()
            losses.append(loss.item())
            gradients.append((hidden_SH.grad, weight_VH.grad))
        assert losses[1] == pytest.approx(losses[0], rel=1e-12)
        for found, expected in zip(gradients[1], gradients[0], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)

    def test_sets_approach_it_as_p_grows(self) -> None:
        """Less the teacher's entropy the loss over sets is a lower bound that rises to the full KL; so do gradients."""
        generator = torch.Generator().manual_seed(2)
        student_SV, teacher_SV = 2 * torch.randn(2, 3, 200, generator=generator, dtype=torch.float64)

        def computed(values: dict[str, object], sets: CandidateSets | None) -> tuple[float, torch.Tensor]:
            z_SV = student_SV.clone().requires_grad_()
            algorithm = resolve_algorithm("kd")(DistillConfig.model_validate({"name": "kd", **values}), [0])
            context = StepContext(3, 2, teacher_head=DenseHead(teacher_SV))
            loss = algorithm.loss(DenseHead(z_SV), sets, trajectories(), context).loss
            loss.backward()
            assert z_SV.grad is not None
            return float(loss), z_SV.grad

        full, gradient_SV = computed({"kd_support": "full"}, None)
        gaps, distances = [], []
        for top_p in (0.5, 0.9, 0.99, 0.99999):
            sets = top_p_candidates(teacher_SV, top_p=top_p)
            assert sets.logprobs_M is not None
            log_inside_M, outside_S = sets.logprobs_M, -torch.expm1(-sets.neg_log_mass_S)
            entropy = -(log_inside_M.exp() * log_inside_M).sum() - torch.special.xlogy(outside_S, outside_S).sum()
            loss, found_SV = computed({"top_p": top_p}, sets)
            gaps.append(full - (loss - float(entropy) / 3))
            distances.append(float((found_SV - gradient_SV).norm() / gradient_SV.norm()))
        assert gaps == sorted(gaps, reverse=True)
        assert distances == sorted(distances, reverse=True)
        assert gaps[-1] == pytest.approx(0, abs=1e-4)
        assert gaps[-1] > -1e-9
        assert distances[-1] < 1e-3

    def test_teacher_is_missing(self) -> None:
        """Without the teacher's logits the loss says what is missing."""
        algorithm = resolve_algorithm("kd")(DistillConfig(name="kd", kd_support="full"), [0])
        with pytest.raises(ValueError, match="no logits of the teacher"):
            algorithm.loss(DenseHead(LOGITS), None, trajectories(), StepContext(3, 2))


def test_needs() -> None:
    """What a run prepares: gold or teacher rollouts, sets, log-probabilities, the constant."""
    needs = {name: resolve_algorithm(name).needs_of(DistillConfig(name=name)) for name in BUILT_IN}
    distribution = Needs("teacher", candidate_sets=True, candidate_logprobs=True)
    optional, required = (replace(distribution, student_rollouts=kind) for kind in ("optional", "required"))
    assert needs == {
        "sft": Needs("gold"),
        "seqkd": Needs("teacher"),
        "kd": optional,
        "bd": replace(optional, shift_constant=True),
        "gkd": optional,
        "rkl": required,
        "minillm": required,
    }
    paper = DistillConfig(preset="paper")
    assert resolve_algorithm("bd").needs_of(paper) == replace(
        needs["bd"], candidate_logprobs=False, shift_constant=False
    )
    assert resolve_algorithm("bd")(paper, [0]).needs == resolve_algorithm("bd").needs_of(paper)
    assert resolve_algorithm("bd").needs_of(DistillConfig(preset="released")).student_rollouts == "never"


def test_bd_needs_log_probabilities_for_targets_at_the_students_states() -> None:
    """Where the student samples and the target is white-box; not for the teacher's rows alone, and not offline."""
    sampled = {"linear_term": "sampled", "q_shift": "max"}
    for values, expected in (
        ({}, False),
        ({"mode": "online"}, True),
        ({"mode": "offline_then_online", "rollout": "student"}, True),
        ({"mode": "online", "student_target": "none"}, False),
        ({"mode": "online", "rollout": "teacher"}, False),
        ({"mode": "online", "student_fraction": 0.0}, False),
    ):
        options = DistillConfig.model_validate({**sampled, **values})
        assert resolve_algorithm("bd").needs_of(options).candidate_logprobs == expected
    without_mask = DistillConfig.model_validate({**sampled, "mode": "online", "top_p": 1.0})
    with pytest.raises(ConfigError, match=r"student_target forward with .*top_p 1 .*student_target none"):
        resolve_algorithm("bd").needs_of(without_mask)


# A value of each option that no preset has.
OTHER_VALUES = {
    "objective": "released", "top_p": 0.5, "include_eos": False, "alpha": 7.0, "gamma": 0.5, "tau": 2.0,
    "q_shift": "max", "q_min": -3.0, "linear_term": "sampled", "out_of_set": "zero", "regulariser": "js",
    "terminal": "absorbing", "truncated": "drop", "next_value_gradient": "stop", "target_decay": 0.5,
    "td_warmup_steps": 3,
    "reduction": "sequence", "tail_coef": 0.5, "tail_estimator": "sampled", "tail_samples": 5, "tail_tolerance": 0.1,
    "student_target": "reverse", "student_tail": False, "student_td": False, "student_out_of_set": "penalise",
    "jsd_beta": 0.1, "divergence_support": "set", "importance": "sequence", "importance_clip": 3.0,
    "length_normalisation": False, "responses": "gold", "kd_support": "full",
}  # fmt: skip


@pytest.mark.parametrize("name", BUILT_IN)
def test_options_that_are_not_read_are_refused(name: str) -> None:
    """Each objective option, one by one: read, or refused by its flag and the algorithm's name."""
    assert set(OTHER_VALUES) == set(OBJECTIVE_OPTIONS)
    algorithm = resolve_algorithm(name)
    assert algorithm.reads is not None
    assert algorithm.reads <= set(OBJECTIVE_OPTIONS)
    for option, value in OTHER_VALUES.items():
        options = DistillConfig.model_validate({"name": name, option: value})
        if option in algorithm.reads:
            algorithm.refuse_unread(options)
        else:
            with pytest.raises(ConfigError) as caught:
                algorithm.needs_of(options)
            assert str(caught.value).startswith(f"--algo.distill.name {name} does not read --algo.distill.{option} ")


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_ask_for_nothing_that_is_not_read(name: str, preset: str) -> None:
    """A preset is a set of defaults; given in full, as a printed configuration has them, they are no wishes either."""
    options = DistillConfig.model_validate({"name": name, "preset": preset})
    resolve_algorithm(name).needs_of(options)
    resolve_algorithm(name).needs_of(DistillConfig.model_validate(options.model_dump()))


def test_bd_refuses_what_cannot_work() -> None:
    """Contradicting options, a missing constant and missing sets are errors before or at the first loss."""
    algorithm = resolve_algorithm("bd")
    with pytest.raises(ConfigError, match="never to stop"):
        algorithm.needs_of(DistillConfig(q_shift="none"))
    with pytest.raises(ConfigError, match="constant"):
        algorithm(DistillConfig(), [0])
    with pytest.raises(ValueError, match="no candidate sets"):
        algorithm(DistillConfig(preset="paper"), [0]).loss(DenseHead(LOGITS), None, trajectories(), StepContext(1, 1))
