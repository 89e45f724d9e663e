"""What an algorithm is: the data it needs and the loss of a micro-batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Generator, Tensor

from openrlhf_bd.config import OBJECTIVE_OPTIONS, DistillConfig, OnlineOptions, changed_objective
from openrlhf_bd.errors import ConfigError
from openrlhf_bd.functional.candidates import CandidateSets
from openrlhf_bd.functional.head import StudentHead
from openrlhf_bd.functional.metrics import Metrics
from openrlhf_bd.functional.trajectories import Trajectories

Rollouts = Literal["teacher", "student", "mixed"]


@dataclass(frozen=True, slots=True)
class Needs:
    """What a run must prepare for an algorithm.

    Attributes:
        rollouts: gold responses of the data set, or responses that the teacher generates.
        candidate_sets: the teacher's top-p sets at every state; at those of gold responses a teacher's engine scores
            the responses.
        candidate_logprobs: the teacher's log-probabilities of the candidates.
        shift_constant: the mean log-sum-exp of the starting student's logits / tau (functional.head.mean_log_sum_exp).
        target_network: a moving average of the student's weights, whose logits StepContext.target_head has.
        live_teacher: the teacher's logits at every state, by StepContext.teacher_head.
        student_rollouts: responses that the student samples itself, with the log-probabilities under which it did:
            never (its loss has no meaning on them), optional beside the others, or required: then a run is online, or
            its store is what an online run left.
    """

    rollouts: Literal["gold", "teacher"]
    candidate_sets: bool = False
    candidate_logprobs: bool = False
    shift_constant: bool = False
    target_network: bool = False
    live_teacher: bool = False
    student_rollouts: Literal["never", "optional", "required"] = "never"

    @property
    def rows_by_teacher(self) -> bool:
        """Whether the teacher's engines make the rows: they sample the responses, or score gold ones."""
        return self.rollouts == "teacher" or self.candidate_sets

    def rollout_of(self, options: OnlineOptions) -> Rollouts:
        """Whose responses an online run has: what the options say, else what the algorithm learns from."""
        by_needs: dict[str, Rollouts] = {"never": "teacher", "optional": "mixed", "required": "student"}
        return options.rollout or by_needs[self.student_rollouts]

    def student_samples(self, options: OnlineOptions) -> bool:
        """Whether an online run has rows that the student samples."""
        rollout = self.rollout_of(options)
        return rollout == "student" or (rollout == "mixed" and options.student_fraction > 0)


@dataclass(frozen=True, slots=True)
class StepContext:
    """What a loss may know of the step that a micro-batch belongs to.

    Attributes:
        num_tokens: response tokens of the global batch.
        num_rows: rows of the global batch.
        step: optimizer step, counted from 1.
        target_head: the target network's logits at the same states, without gradient; None where `needs` asks for none.
        teacher_head: the live teacher's logits there, over the student's ids; None where `needs` asks for none.
        generator: for random numbers of the loss, on the head's device; None: torch's own.
        full_diagnostics: whether metrics that read the logits of the whole vocabulary are wanted.
    """

    num_tokens: float
    num_rows: float
    step: int = 1
    target_head: StudentHead | None = None
    teacher_head: StudentHead | None = None
    generator: Generator | None = None
    full_diagnostics: bool = True


@dataclass(frozen=True, slots=True)
class LossOutput:
    """Loss of a micro-batch, to be summed over micro-batches and ranks, and metrics: name -> (sum, weight)."""

    loss: Tensor
    metrics: Metrics


class Algorithm(ABC):
    """One way to distil. The first line of a subclass's docstring is its entry in `openrlhf-bd list`.

    A process resolves the class by name (registry.resolve_algorithm), asks `needs_of(options)` before anything
    starts, and builds an instance where the loss is computed.

    Args:
        options: `--algo.distill.*`.
        stop_ids: stop tokens of the student's tokenizer.
        shift_constant: nats, where `needs` asks for it.

    Attributes:
        reads: the objective's options (config.OBJECTIVE_OPTIONS) that this algorithm reads; None: not stated.

    Raises:
        ConfigError: options contradict each other, or shift_constant is missing.
    """

    reads: ClassVar[frozenset[str] | None] = None

    def __init__(self, options: DistillConfig, stop_ids: Sequence[int], shift_constant: float | None = None) -> None:
        self.options = options
        self.stop_ids = tuple(stop_ids)
        self.shift_constant = shift_constant
        self.needs = self.needs_of(options)

    @classmethod
    @abstractmethod
    def needs_of(cls, options: DistillConfig) -> Needs:
        """What a run with these options must prepare. Begins with `refuse_unread` where `reads` is stated.

        Raises:
            ConfigError: options contradict each other, or one was changed that the algorithm does not read.
        """

    @classmethod
    def refuse_unread(cls, options: DistillConfig, *, without: Collection[str] = (), when: str = "") -> None:
        """Refuse options that differ from their preset and that this algorithm does not read: a wish with no effect.

        Args:
            options: --algo.distill.*
            without: of `reads`, what these options leave unread.
            when: the option that does, for the message.

        Raises:
            ConfigError: the message names options and algorithm, and what the algorithm reads.
        """
        if cls.reads is None:
            return
        reads = cls.reads.difference(without)
        unread = {name: value for name, value in changed_objective(options).items() if name not in reads}
        if unread:
            flags = ", ".join(f"--algo.distill.{name} {str(value).lower()}" for name, value in unread.items())
            known = ", ".join(name for name in OBJECTIVE_OPTIONS if name in reads)
            raise ConfigError(
                f"--algo.distill.name {options.name}{when and f' with {when}'} does not read {flags}; leave "
                f"{'it' if len(unread) == 1 else 'them'} out (of the objective's options it reads {known})"
            )

    @abstractmethod
    def loss(
        self,
        head: StudentHead,
        sets: CandidateSets | None,
        trajectories: Trajectories,
        context: StepContext,
    ) -> LossOutput:
        """Loss of a micro-batch.

        Args:
            head: student's logits at the S states. Gradient flows.
            sets: candidate sets of the same states; None where `needs` asks for none.
            trajectories: taken tokens and what follows what.
            context: the step that the micro-batch belongs to.
        """


def require_mask(options: DistillConfig) -> None:
    """Refuse p = 1, for algorithms that need the teacher's distribution.

    Raises:
        ConfigError: options.top_p is 1.
    """
    if options.top_p == 1:
        raise ConfigError(
            f"--algo.distill.name {options.name} with --algo.distill.top_p 1 needs the teacher's log-probability of "
            "every token of the vocabulary, which no store holds; use a top_p below 1 (0.999 keeps nearly all)"
            + (", or --algo.distill.kd_support full" if options.name == "kd" else "")
        )
