"""What options put into the memory of each student rank, beside the student and its optimizer."""

from __future__ import annotations

from openrlhf_bd.algorithms.base import Needs
from openrlhf_bd.config import Config
from openrlhf_bd.driver.disk import PARAMETER_BYTES
from openrlhf_bd.driver.model_files import ModelFacts
from openrlhf_bd.paths import format_bytes

# auto is the checkpoint's own type, at most float32.
TEACHER_BYTES = {"auto": 4, "float32": 4, "bfloat16": 2, "float16": 2}
AVERAGE_BYTES = 4  # kept in fp32


def rank_memory_notes(
    config: Config, needs: Needs, *, student: ModelFacts | None, teacher: ModelFacts | None
) -> list[str]:
    """A line for each further model in a rank's memory: the live teacher, and averages of the student's weights.

    Args:
        config: options of the job.
        needs: of the algorithm.
        student: facts of the student, or None where it is not trained.
        teacher: facts of the teacher, or None where it is not loaded.
    """
    notes = []
    holders = _teacher_holders(config, needs)
    if holders:
        size = _size(teacher, TEACHER_BYTES[config.teacher.dtype])
        notes.append(f"each student rank also holds the whole teacher, {size} ({', '.join(holders)})")
    averages = [
        ("--algo.distill.next_value_gradient target", needs.target_network),
        ("--train.enable_ema", config.train.enable_ema),
    ]
    for option, used in averages:
        if used:
            size = _size(student, AVERAGE_BYTES)
            place = "the student ranks together hold" if config.ds.zero_stage == 3 else "each student rank also holds"
            notes.append(f"{place} a slow copy of the trained weights in fp32, {size} at most ({option})")
    return notes


def _teacher_holders(config: Config, needs: Needs) -> list[str]:
    """Options for which a rank holds the teacher."""
    ratio = config.algo.distill.kd_ratio
    return [
        *([f"--algo.distill.kd_ratio {ratio}"] if ratio > 0 else []),
        *(["--algo.distill.kd_support full"] if needs.live_teacher else []),
    ]


def held_teacher_bytes(config: Config, needs: Needs, teacher: ModelFacts | None) -> int | None:
    """Memory of the teacher that each rank holds whole, whatever the ZeRO stage; 0 where it holds none.

    None where the teacher's size is not known.
    """
    if not _teacher_holders(config, needs):
        return 0
    if teacher is None or teacher.num_parameters is None:
        return None
    return teacher.num_parameters * TEACHER_BYTES[config.teacher.dtype]


def rank_parts(config: Config, student: ModelFacts | None) -> dict[str, int] | None:
    """Memory of one student rank without activations, bytes: weights, gradients, and optimizer.

    The optimizer has AdamW's moments in fp32, and a copy of the weights in fp32 where these are in 16 bits. ZeRO shares
    it over the ranks from stage 1 on, gradients from stage 2 on, weights at stage 3. None where the student's size is
    not known.
    """
    if student is None or student.num_parameters is None:
        return None
    num_ranks = config.actor.num_nodes * config.actor.num_gpus_per_node
    value_bytes, stage = PARAMETER_BYTES[config.ds.param_dtype], config.ds.zero_stage
    # Of adapters all this is little.
    trained = student.num_parameters if config.ds.lora.rank == 0 else 0
    moment_bytes = trained * (8 if config.ds.param_dtype == "fp32" else 12)
    return {
        "weights": student.num_parameters * value_bytes // (num_ranks if stage >= 3 else 1),
        "gradients": trained * value_bytes // (num_ranks if stage >= 2 else 1),
        "optimizer": moment_bytes // (num_ranks if stage >= 1 else 1),
    }


def rank_bytes(config: Config, student: ModelFacts | None) -> int | None:
    """The sum of `rank_parts`."""
    parts = rank_parts(config, student)
    return None if parts is None else sum(parts.values())


def _size(facts: ModelFacts | None, parameter_bytes: int) -> str:
    if facts is None or facts.num_parameters is None:
        return "of a size that is not known here"
    return format_bytes(facts.num_parameters * parameter_bytes)
