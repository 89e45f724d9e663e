"""What vLLM's engines cannot run, known before one starts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from openrlhf_bd.config import Config
from openrlhf_bd.driver.model_files import STUDENT_OPTION, ModelFacts
from openrlhf_bd.driver.resources import STUDENT_ENGINES, Stage, stage_actors
from openrlhf_bd.engines.arguments import CPU_HEAD_SIZES, Device, default_device
from openrlhf_bd.errors import ConfigError


def known_device() -> Device | None:
    """Where engines will run, as far as it is known without a Ray session; None: on the nodes of a cluster."""
    return None if "RAY_ADDRESS" in os.environ else default_device()


def check_head_sizes(
    config: Config, models: Mapping[str, ModelFacts], *, device: Device | None, stages: Sequence[Stage]
) -> None:
    """Refuse a model whose attention heads have a size that vLLM has no CPU kernels for.

    Args:
        config: the job.
        models: facts of its models, by the option that names each.
        device: where engines run; None: not known yet.
        stages: of the job.

    Raises:
        ConfigError: the message names the model, its head size and those that run.
    """
    if device != "cpu":
        return
    for option, facts in models.items():
        if facts.head_size is None or facts.head_size in CPU_HEAD_SIZES or not _has_engine(option, config, stages):
            continue
        raise ConfigError(
            f"{facts.name}: its attention heads have size {facts.head_size}, and on CPUs vLLM runs only "
            f"{', '.join(str(size) for size in CPU_HEAD_SIZES)} ({option}); take another model, or run on GPUs"
        )


def _has_engine(option: str, config: Config, stages: Sequence[Stage]) -> bool:
    if option == STUDENT_OPTION:
        in_training = "train" in stages and STUDENT_ENGINES in [group.what for group in stage_actors(config, "train")]
        return "evaluate" in stages or in_training
    return "generate" in stages or ("evaluate" in stages and (config.eval.teacher_nll or config.eval.exposure))
