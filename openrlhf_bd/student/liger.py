"""Liger's kernels in the student: norms, rotary positions and feed-forward layers. CUDA only.

Its losses stay out: the student's own output head computes the loss without logits.
"""

from __future__ import annotations

import importlib.util

from transformers import PreTrainedModel

from openrlhf_bd.config import Config
from openrlhf_bd.errors import ConfigError

LIGER_FAMILIES = ("llama", "qwen2", "qwen3")


def check_liger(config: Config, family: str, *, on_cpu: bool) -> None:
    """Refuse --ds.use_liger_kernel where it cannot work.

    Args:
        config: options of the job.
        family: `model_type` of the student.
        on_cpu: whether the student trains on CPUs.

    Raises:
        ConfigError: no CUDA device, no liger-kernel package, or a family that it has no kernels for.
    """
    if not config.ds.use_liger_kernel:
        return
    if family not in LIGER_FAMILIES:
        raise ConfigError(
            f"--ds.use_liger_kernel: there are kernels for {', '.join(LIGER_FAMILIES)}, none for {family} "
            f"({config.actor.model_name_or_path}); leave the option away"
        )
    if on_cpu:
        raise ConfigError("--ds.use_liger_kernel: its kernels need CUDA, there is none here; leave the option away")
    if importlib.util.find_spec("liger_kernel") is None:
        raise ConfigError(
            "--ds.use_liger_kernel: the package liger-kernel is not installed; run `pip install liger-kernel` on every "
            "node, or leave the option away"
        )


def apply_liger(model: PreTrainedModel) -> None:
    """Replace a loaded model's norms, rotary positions and feed-forward layers in place; parameters stay."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False)
