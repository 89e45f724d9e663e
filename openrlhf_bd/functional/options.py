"""Options of the objective that contradict each other, or what a run has: refused before anything is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from openrlhf_bd.errors import ConfigError

if TYPE_CHECKING:
    from openrlhf_bd.config import BellmanOptions

# What `objective released` computes whatever else is asked for: these options must not say otherwise.
RELEASED_OPTIONS = {
    "linear_term": "sampled",
    "out_of_set": "drop",
    "regulariser": "chi2",
    "terminal": "zero",
    "truncated": "bootstrap",
    "next_value_gradient": "full",
    "reduction": "sequence",
}


def validate_options(
    options: BellmanOptions, *, has_logprobs: bool | None = None, has_shift_constant: bool | None = None
) -> None:
    """Refuse options that contradict each other, or what the run has.

    Args:
        options: the objective's options.
        has_logprobs: whether the candidates' log-probabilities are (or will be) recorded; None: not known here.
        has_shift_constant: whether the run's constant shift is there; None: not known here.

    Raises:
        ConfigError: the message names the options to change.
    """
    _refuse_contradictions(options)
    _refuse_without_effect(options)
    if options.objective == "released":
        _refuse_for_released(options)
    if options.linear_term == "expected" and has_logprobs is False:
        raise ConfigError(
            "--algo.distill.linear_term expected needs the candidates' log-probabilities, and they are not recorded; "
            "use --teacher.record_logprobs true, or --algo.distill.linear_term sampled"
        )
    if options.q_shift == "constant" and has_shift_constant is False:
        raise ConfigError(
            "--algo.distill.q_shift constant needs the run's constant, the mean log-sum-exp of the starting student's "
            "logits, and none was given; use another --algo.distill.q_shift"
        )


def _refuse_contradictions(options: BellmanOptions) -> None:
    if options.q_shift == "none" and options.terminal == "zero" and options.regulariser != "none":
        raise ConfigError(
            "--algo.distill.q_shift none with --algo.distill.terminal zero teaches the student never to stop: the "
            "regulariser pulls the stop token's unshifted logit to 0, whatever the level of the others; use "
            "--algo.distill.terminal drop_chi, or a shift (constant)"
        )
    if options.out_of_set == "clip" and options.q_min is None:
        raise ConfigError(
            "--algo.distill.out_of_set clip puts Q_min in place of Q, and --algo.distill.q_min is none; set q_min "
            "(the paper uses -10) or use --algo.distill.out_of_set drop"
        )
    if options.linear_term == "expected" and options.top_p == 1:
        raise ConfigError(
            "--algo.distill.linear_term expected with --algo.distill.top_p 1 needs the teacher's log-probability of "
            "every token of the vocabulary, which no store holds; use --algo.distill.linear_term sampled, or a top_p "
            "below 1 (0.999 keeps nearly all)"
        )
    if options.student_out_of_set == "penalise" and not (options.student_td and options.regulariser == "chi2"):
        off = "student_td false" if not options.student_td else f"regulariser {options.regulariser}"
        raise ConfigError(
            "--algo.distill.student_out_of_set penalise pulls rewards to -2 alpha by chi-squared on the student's "
            f"transitions, and with --algo.distill.{off} there is none; use --algo.distill.student_out_of_set drop, or "
            "student_td true with regulariser chi2"
        )


def _refuse_without_effect(options: BellmanOptions) -> None:
    """An option that asks for something which another one has turned off is a mistake, not a wish."""
    if options.next_value_gradient == "target" and (options.gamma == 0 or options.regulariser == "none"):
        off = "--algo.distill.gamma 0" if options.gamma == 0 else "--algo.distill.regulariser none"
        raise ConfigError(
            f"--algo.distill.next_value_gradient target keeps a second copy of the student for the next values, and "
            f"with {off} no next value counts; use --algo.distill.next_value_gradient full"
        )
    if options.td_warmup_steps > 0 and options.regulariser == "none":
        raise ConfigError(
            f"--algo.distill.td_warmup_steps {options.td_warmup_steps} warms up the regulariser's weight, and "
            "--algo.distill.regulariser is none; use td_warmup_steps 0, or a regulariser (chi2)"
        )
    if options.tail_estimator == "sampled" and options.top_p == 1:
        raise ConfigError(
            "--algo.distill.tail_estimator sampled with --algo.distill.top_p 1: no mass is outside the sets, so there "
            "is no tail term to compute; leave the option out, or use a top_p below 1"
        )
    if options.tail_coef == 0 and (options.tail_estimator == "sampled" or options.tail_tolerance > 0):
        name = "tail_estimator sampled" if options.tail_estimator == "sampled" else "tail_tolerance above 0"
        raise ConfigError(
            f"--algo.distill.{name} with --algo.distill.tail_coef 0: there is no tail term to compute; set tail_coef "
            "(robust uses 1), or leave the option out"
        )


def _refuse_for_released(options: BellmanOptions) -> None:
    found = {name: getattr(options, name) for name in RELEASED_OPTIONS}
    others = {name: value for name, value in found.items() if value != RELEASED_OPTIONS[name]}
    if others:
        raise ConfigError(
            "--algo.distill.objective released computes what the authors' code does, which has no "
            + ", ".join(f"{name} {value}" for name, value in others.items())
            + f" ({', '.join(f'{name} {RELEASED_OPTIONS[name]}' for name in others)} there); leave "
            f"{'it' if len(others) == 1 else 'them'} out, or use --algo.distill.objective eq17"
        )
    if options.top_p == 1:
        raise ConfigError(
            "--algo.distill.objective released sums Q over the candidate sets, and with --algo.distill.top_p 1 that "
            "would be the whole vocabulary at every state; use a top_p below 1"
        )
