"""What an algorithm is: the data it needs and the loss of a micro-batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Generator, Tensor

from openrlhf_bd.config import DistillConfig
from openrlhf_bd.functional.candidates import CandidateSets
from openrlhf_bd.functional.head import StudentHead
from openrlhf_bd.functional.metrics import Metrics
from openrlhf_bd.functional.trajectories import Trajectories


@dataclass(frozen=True, slots=True)
class Needs:
    """What a run must prepare for an algorithm.

    Attributes:
        rollouts: gold responses of the data set, or responses that the teacher generates.
        candidate_sets: the teacher's top-p sets at every state.
        candidate_logprobs: the teacher's log-probabilities of the candidates.
        shift_constant: the mean log-sum-exp of the starting student's logits / tau (functional.head.mean_log_sum_exp).
        target_network: a moving average of the student's weights, whose logits StepContext.target_head has.
    """

    rollouts: Literal["gold", "teacher"]
    candidate_sets: bool = False
    candidate_logprobs: bool = False
    shift_constant: bool = False
    target_network: bool = False


@dataclass(frozen=True, slots=True)
class StepContext:
    """What a loss may know of the step that a micro-batch belongs to.

    Attributes:
        num_tokens: response tokens of the global batch.
        num_rows: rows of the global batch.
        step: optimizer step, counted from 1.
        target_head: the target network's logits at the same states, without gradient; None where `needs` asks for none.
        generator: for random numbers of the loss, on the head's device; None: torch's own.
        full_diagnostics: whether metrics that read the logits of the whole vocabulary are wanted.
    """

    num_tokens: float
    num_rows: float
    step: int = 1
    target_head: StudentHead | None = None
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

    Raises:
        ConfigError: options contradict each other, or shift_constant is missing.
    """

    def __init__(self, options: DistillConfig, stop_ids: Sequence[int], shift_constant: float | None = None) -> None:
        self.options = options
        self.stop_ids = tuple(stop_ids)
        self.shift_constant = shift_constant
        self.needs = self.needs_of(options)

    @classmethod
    @abstractmethod
    def needs_of(cls, options: DistillConfig) -> Needs:
        """What a run with these options must prepare.

        Raises:
            ConfigError: options contradict each other.
        """

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
