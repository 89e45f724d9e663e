"""Which metrics of a run the report draws, in which group, under which name and unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from openrlhf_bd.evaluation.figures import Drawing, LegendEntry, curves
from openrlhf_bd.evaluation.run_data import Curve, RunData


@dataclass(frozen=True, slots=True)
class Metric:
    """One logged metric: its full name, and how it is shown.

    Attributes:
        name: as in metrics.jsonl.
        title: heading of its figure.
        unit: label of the y axis.
        caption: what it is, one sentence or none.
        scale: factor from the logged value to the shown one.
        smooth: long curves get a moving mean.
    """

    name: str
    title: str
    unit: str
    caption: str
    scale: float = 1.0
    smooth: bool = True


_RATE = "states, %"

VALIDATION = (
    Metric("eval/loss", "Validation loss", "nats/token", "Cross-entropy of the validation references.", smooth=False),
    Metric("eval/rouge_l", "Validation Rouge-L", "Rouge-L, 0-100", "One seed on the validation set.", smooth=False),
    Metric("eval/accuracy", "Validation accuracy", "accuracy, %", "Responses that the checker accepts.", 100.0, False),
    Metric(
        "eval/stop_rate", "Stop rate", "ended by itself, %", "Responses that end before the length limit.", 100.0, False
    ),
    Metric(
        "eval/response_tokens", "Response length", "tokens", "Mean length of the validation responses.", smooth=False
    ),
)

GROUPS: dict[str, tuple[Metric, ...]] = {
    "Loss and its parts": (
        Metric("train/loss", "Loss", "nats/token", "The whole objective, as it is minimised."),
        Metric(
            "train/policy_loss", "Loss on the responses", "nats/token", "What the algorithm minimises, without J_PT."
        ),
        Metric("train/linear_loss", "Linear term", "nats/token", "V minus Q: cross-entropy inside the candidate sets."),
        Metric("train/td_loss", "Temporal difference", "nats/token", "Squared implied reward, times its weight."),
        Metric("train/td_share", "Share of the temporal difference", "of the response loss, %", "", 100.0),
        Metric("train/tail_loss", "Tail", "nats/token", "Cross-entropy of the mass inside and outside the sets."),
        Metric("train/forward_kl", "Forward KL", "nats/token", "Teacher to student, over sets and bucket."),
        Metric("train/reverse_kl", "Reverse KL", "nats/token", "Student to teacher, over sets and bucket."),
        Metric("train/td_scale", "Warm-up of the temporal difference", "of its weight", "", smooth=False),
        Metric("train/ptx_loss", "Pre-training loss", "nats/token", "Loss on pre-training text, J_PT."),
        Metric("train/ptx_nll", "NLL of the pre-training text", "nats/token", "Its language-model part."),
        Metric("train/ptx_kl", "KL to the teacher on the text", "nats/token", "Its part of kd_ratio."),
        Metric("train/gpt_loss", "Cross-entropy", "nats/token", "Of the response tokens, with its z-loss."),
        Metric("train/nll", "Student NLL", "nats/token", "Of the tokens in the data, under the student."),
    ),
    "Values and rewards": (
        Metric("train/reward", "Implied reward r", "nats", "Q(s, a) minus the discounted next value."),
        Metric("train/reward_end", "Implied reward at the end", "nats", "The same, after the stop token."),
        Metric("train/value", "Soft value V", "nats", "Log-sum-exp of Q over the candidate set."),
        Metric("train/logsumexp", "Log-sum-exp of the logits", "nats", "Level of the logits over the vocabulary."),
        Metric("train/logsumexp_spread", "Spread of the log-sum-exp", "nats", "Its standard deviation over states."),
        Metric("train/clip_rate", "Clipped candidates", "candidates, %", "At the lower clip of Q.", 100.0),
    ),
    "Inside the candidate sets": (
        Metric("train/teacher_mass", "Teacher's mass P", "probability", "On its candidate sets; at least p."),
        Metric("train/student_mass", "Student's mass P_theta", "probability", "On the same sets."),
        Metric("train/out_of_set_rate", "Out-of-set rate", _RATE, "Tokens in the data that are no candidates.", 100.0),
        Metric("train/set_size", "Set size", "tokens", "Mean over the states of a step."),
        Metric("train/one_token_sets", "One-token sets", _RATE, "The loss inside such a set is zero.", 100.0),
        Metric(
            "train/top1_overlap", "Agreement on the top token", _RATE, "First choice of student and teacher.", 100.0
        ),
    ),
    "Responses by source": (
        Metric("train/student/share", "Student's share", "of the tokens, %", "Tokens that the student sampled.", 100.0),
        Metric("train/teacher/policy_loss", "Loss on the teacher's responses", "nats/token", ""),
        Metric("train/student/policy_loss", "Loss on the student's responses", "nats/token", ""),
        Metric("train/teacher/td_loss", "Temporal difference, teacher's responses", "nats/token", ""),
        Metric("train/student/td_loss", "Temporal difference, student's responses", "nats/token", ""),
        Metric("train/teacher/reward", "Implied reward, teacher's responses", "nats", ""),
        Metric("train/student/reward", "Implied reward, student's responses", "nats", ""),
        Metric("train/teacher/reverse_kl", "Reverse KL, teacher's responses", "nats/token", ""),
        Metric("train/student/reverse_kl", "Reverse KL, student's responses", "nats/token", ""),
        Metric("train/teacher/out_of_set_rate", "Out-of-set rate, teacher's responses", _RATE, "", 100.0),
        Metric("train/student/out_of_set_rate", "Out-of-set rate, student's responses", _RATE, "", 100.0),
        Metric("train/student/teacher_nll", "Teacher's NLL of the student's tokens", "nats/token", "Lower is better."),
        Metric(
            "train/student/sampled_kl", "Reverse KL as sampled", "nats/token", "Of the student when it sampled them."
        ),
        Metric(
            "train/student/log_ratio", "Move since sampling", "nats/token", "Log-probability now minus when sampled."
        ),
    ),
    "Policy gradient": (
        Metric("train/advantage", "Advantage", "nats", "Later rewards of a token, as minillm weighs it."),
        Metric("train/importance", "Importance weight", "policy / behaviour", "Before it is clipped; 1 on-policy."),
        Metric("train/clipped_rate", "Clipped tokens", "tokens, %", "Without a gradient, for PPO's clip.", 100.0),
    ),
    "The student's distribution": (
        Metric("train/entropy", "Entropy", "nats", "Of the student's next-token distribution."),
        Metric("train/stop_prob", "Probability of stopping", "probability", "Mean over all states."),
        Metric(
            "train/stop_prob_end", "Probability of stopping at the end", "probability", "Where the response stopped."
        ),
        Metric(
            "train/accuracy", "Token accuracy", "tokens, %", "Student's first choice is the token in the data.", 100.0
        ),
    ),
    "Optimisation": (
        Metric("train/actor_grad_norm", "Gradient norm", "L2 norm", "Before clipping."),
        Metric("train/actor_lr", "Learning rate", "learning rate", "", smooth=False),
    ),
    "Speed": (
        Metric("train/tokens_per_s", "Throughput, computing", "tokens/s", "Rows and text, without padding."),
        Metric("train/tokens_per_s_wall", "Throughput, wall clock", "tokens/s", "From step to step, data included."),
        Metric("train/mfu", "Model FLOP utilisation, computing", "of the peak, %", "Useful operations only.", 100.0),
        Metric("train/mfu_wall", "Model FLOP utilisation, wall clock", "of the peak, %", "From step to step.", 100.0),
        Metric("train/padding_share", "Padding", "of the positions, %", "Positions computed for nothing.", 100.0),
        Metric("train/fill", "Fill", "of the token budget, %", "Tokens over all micro-batches' budget.", 100.0),
        Metric("train/token_imbalance", "Imbalance of tokens", "largest / mean", "Tokens of the ranks."),
        Metric("train/square_imbalance", "Imbalance of attention", "largest / mean", "Squared lengths of the ranks."),
        Metric("train/time_forward_backward_s", "Forward and backward", "seconds", "Of one step."),
        Metric("train/time_optimizer_s", "Optimizer", "seconds", "Of one step."),
        Metric("train/time_data_s", "Reading the batch", "seconds", "Of one step."),
    ),
    "Rows made while training": (
        Metric("train/student_rows", "Student's rows", "of the batch, %", "Sampled by the student itself.", 100.0),
        Metric("train/staleness", "Staleness", "steps", "Of the student's rows, when they are used."),
        Metric("train/staleness_max", "Largest staleness", "steps", "Of the step's rows."),
        Metric("train/discarded_rows", "Discarded rows", "rows", "Too stale at their turn, and made again."),
        Metric("train/time_rollout_wait_s", "Training waits for rows", "seconds", "Of one step."),
        Metric("train/time_back_pressure_s", "Engines wait for training", "seconds", "All of them, held back."),
        Metric("train/time_teacher_engines_s", "Teacher samples", "engine seconds", "Over all engines."),
        Metric("train/time_student_engines_s", "Student samples", "engine seconds", "Over all engines."),
        Metric("train/time_scoring_s", "Teacher scores", "engine seconds", "The student's rows."),
        Metric("train/time_seal_s", "Sealing", "seconds", "Of the rows of one step."),
        Metric("train/sync_s", "Update of the engines", "seconds", "From the ranks to the engines, in all."),
        Metric("train/sync_pause_s", "Update: pause", "seconds", "Until the engines stood still."),
        Metric("train/sync_gather_s", "Update: gather", "seconds", "Parameters put together from the ranks."),
        Metric("train/sync_transfer_s", "Update: transfer", "seconds", "From rank 0 to the engines."),
        Metric("train/sync_load_s", "Update: load", "seconds", "Into the engines' model."),
        Metric("train/sync_reset_s", "Update: reset", "seconds", "Of the engines' prefix cache."),
    ),
}


def validation_drawings(runs: Sequence[RunData], legend: dict[str, LegendEntry]) -> list[Drawing]:
    """Validation scores over steps, all methods in one figure each."""
    drawings = (_drawing(metric, runs, legend, size=(5.0, 2.9)) for metric in VALIDATION)
    return [drawing for drawing in drawings if drawing is not None]


def training_drawings(runs: Sequence[RunData], legend: dict[str, LegendEntry]) -> list[tuple[str, list[Drawing]]]:
    """(group, figures) of the training metrics that any run has; those without a description come last."""
    groups = [
        (title, [drawing for metric in metrics if (drawing := _drawing(metric, runs, legend)) is not None])
        for title, metrics in GROUPS.items()
    ]
    known = {metric.name for metric in (*VALIDATION, *(m for metrics in GROUPS.values() for m in metrics))}
    others = sorted({name for run in runs for name in run.curves} - known)
    rest = [_drawing(Metric(name, name, name.rpartition("/")[2], ""), runs, legend) for name in others]
    groups.append(("Other metrics", [drawing for drawing in rest if drawing is not None]))
    return [(title, drawings) for title, drawings in groups if drawings]


def chosen_drawings(runs: Sequence[RunData], legend: dict[str, LegendEntry], names: Sequence[str]) -> list[Drawing]:
    """Figures of some training metrics, in this order, as far as any run has them."""
    known = {metric.name: metric for metrics in GROUPS.values() for metric in metrics}
    drawings = (_drawing(known[name], runs, legend) for name in names)
    return [drawing for drawing in drawings if drawing is not None]


def _drawing(
    metric: Metric,
    runs: Sequence[RunData],
    legend: dict[str, LegendEntry],
    *,
    size: tuple[float, float] = (3.7, 2.3),
) -> Drawing | None:
    by_label: dict[str, Curve] = {run.label: run.curves[metric.name] for run in runs if metric.name in run.curves}
    if not any(curve.num_not_finite < len(curve.values) for curve in by_label.values()):
        return None
    caption = metric.caption
    bad = {label: curve.num_not_finite for label, curve in by_label.items() if curve.num_not_finite}
    if bad:
        caption = f"{caption} Not finite, left out: {', '.join(f'{label} at {n} steps' for label, n in bad.items())}."
    return curves(
        metric.name.replace("/", "_"),
        metric.title,
        caption.strip(),
        metric.unit,
        by_label,
        legend,
        size=size,
        scale=metric.scale,
        smooth=metric.smooth,
    )
