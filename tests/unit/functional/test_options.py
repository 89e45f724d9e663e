"""Presets, and options that contradict each other or what a run has."""

import pytest

from openrlhf_bd.config import PRESETS, BellmanOptions, DistillConfig
from openrlhf_bd.errors import ConfigError
from openrlhf_bd.functional.options import validate_options


def options(**values: object) -> BellmanOptions:
    plain = {"q_shift": "constant", "linear_term": "sampled"}
    return BellmanOptions.model_validate({**plain, **values})


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"q_shift": "none", "terminal": "zero"}, "never to stop.*terminal drop_chi, or a shift"),
        ({"out_of_set": "clip", "q_min": None}, "set q_min"),
        ({"linear_term": "expected", "top_p": 1.0}, "linear_term sampled, or a top_p below 1"),
        ({"next_value_gradient": "target", "gamma": 0.0}, "with --algo.distill.gamma 0 no next value counts"),
        ({"next_value_gradient": "target", "regulariser": "none"}, "regulariser none no next value counts"),
        (
            {"td_warmup_steps": 10, "regulariser": "none"},
            "td_warmup_steps 10 .*use td_warmup_steps 0, or a regulariser",
        ),
        ({"tail_estimator": "sampled", "tail_coef": 0.0}, "tail_estimator sampled .*no tail term to compute"),
        ({"tail_tolerance": 0.01, "tail_coef": 0.0}, "tail_tolerance above 0 .*no tail term to compute"),
        ({"tail_estimator": "sampled", "top_p": 1.0}, "no mass is outside the sets"),
        ({"objective": "released"}, "no reduction token .reduction sequence there.; leave it out"),
        ({"objective": "released", "reduction": "sequence", "top_p": 1.0}, "use a top_p below 1"),
    ],
)
def test_contradictions_are_refused(values: dict[str, object], match: str) -> None:
    """Options that cannot mean what they say are errors that name them and what to change."""
    with pytest.raises(ConfigError, match=match):
        validate_options(options(**values))


def test_neighbours_of_refused_pairs_are_fine() -> None:
    """Only the pair itself is refused."""
    for values in (
        {"q_shift": "none", "terminal": "drop_chi"},
        {"q_shift": "none", "terminal": "zero", "regulariser": "none"},
        {"out_of_set": "clip", "q_min": -10.0},
        {"linear_term": "expected", "top_p": 0.999},
        {"top_p": 1.0},
        {"next_value_gradient": "target", "gamma": 0.1},
        {"next_value_gradient": "stop", "gamma": 0.0},
        {"td_warmup_steps": 10},
        {"tail_estimator": "sampled", "tail_tolerance": 0.01},
    ):
        validate_options(options(**values))


def test_options_are_checked_against_the_run() -> None:
    """expected without log-probabilities, constant without its constant: errors that say what to change."""
    with pytest.raises(ConfigError, match="record_logprobs"):
        validate_options(options(linear_term="expected"), has_logprobs=False)
    with pytest.raises(ConfigError, match="constant"):
        validate_options(options(), has_shift_constant=False)
    validate_options(options(linear_term="expected"), has_logprobs=True, has_shift_constant=True)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid(preset: str) -> None:
    """Each preset is accepted; all but robust run from a store without log-probabilities, and need no constant."""
    chosen = DistillConfig.model_validate({"preset": preset})
    validate_options(chosen, has_logprobs=preset == "robust", has_shift_constant=preset == "robust")


def test_published_presets() -> None:
    """paper is the method to the letter; released is its code: the same hyper-parameters, terms of its own."""
    paper, released = DistillConfig(preset="paper"), DistillConfig(preset="released")
    assert (paper.top_p, paper.alpha, paper.gamma, paper.q_shift, paper.q_min) == (0.8, 0.1, 0.99, "max", -10.0)
    assert (paper.linear_term, paper.out_of_set, paper.tail_coef, paper.pretrain_coef) == ("sampled", "drop", 0.0, 1.0)
    assert (paper.include_eos, paper.kd_ratio, paper.objective, paper.reduction) == (False, 0.0, "eq17", "token")
    differing = {name: value for name, value in released.model_dump().items() if value != paper.model_dump()[name]}
    assert differing == {"preset": "released", "objective": "released", "reduction": "sequence"}
