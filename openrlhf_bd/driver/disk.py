"""What a job writes to which disk, and whether there is room."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from openrlhf_bd.config import Config
from openrlhf_bd.data.prompts import PromptTable
from openrlhf_bd.driver.model_files import ModelFacts
from openrlhf_bd.driver.objective import uses_pretrain
from openrlhf_bd.errors import ConfigError
from openrlhf_bd.paths import existing_parent, format_bytes, free_bytes

if TYPE_CHECKING:
    from openrlhf_bd.driver.plan import StagePlan

STUDENTS = "checkpoints and students"
TEACHER_DATA = "teacher's data"
ONLINE_ROWS = "rows made while the student trains"

PARAMETER_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# fp32 weights and the two moments of Adam, beside the parameters themselves.
_OPTIMIZER_BYTES = 12
_AVERAGE_BYTES = 4
# A stored response token at top_p 0.95: ids of its candidates, their log-probabilities, and what every token has. Of a
# teacher without peaks it is thousands of times as much.
_STORE_BYTES_PER_TOKEN = 40
# Of a prompt its ids alone are stored.
_ID_BYTES = 4


@dataclass(frozen=True, slots=True)
class DiskUse:
    """Files that take disk space.

    Attributes:
        what: name in messages, "teacher's data".
        num_bytes: their size.
        basis: where the number comes from, in words.
        path: where they are written.
    """

    what: str
    num_bytes: int
    basis: str
    path: Path


@dataclass(frozen=True, slots=True)
class DiskPlace:
    """A disk that files are written to.

    Attributes:
        path: the first of their folders.
        used_bytes: of all of them.
        free_bytes: that there are.
    """

    path: Path
    used_bytes: int
    free_bytes: int


def disk_places(uses: Iterable[DiskUse]) -> list[DiskPlace]:
    """The disks that files go to, each with what they take there and what is free."""
    by_device: dict[int, list[DiskUse]] = {}
    for use in uses:
        by_device.setdefault(existing_parent(use.path).stat().st_dev, []).append(use)
    return [
        DiskPlace(group[0].path, sum(use.num_bytes for use in group), free_bytes(group[0].path))
        for group in by_device.values()
    ]


def disk_uses(
    config: Config, stages: Sequence[StagePlan], tables: Mapping[str, PromptTable], *, student: ModelFacts | None
) -> tuple[DiskUse, ...]:
    """What the stages write, as far as it is known before anything is measured.

    Raises:
        ConfigError: checkpoints, whose size is known, do not fit.
    """
    uses = []
    for stage in stages:
        if stage.name == "generate":
            passes = float(config.rollout.n_samples_per_prompt)
            uses.append(_rows(TEACHER_DATA, config, tables["train"], Path(stage.files), passes=passes))
        elif stage.name == "train":
            uses.append(DiskUse(STUDENTS, student_bytes(config, student), "at most", Path(stage.files)))
            _require_room(uses[-1])
            if config.algo.distill.mode != "offline":
                passes = stage.rows / max(len(tables["train"].prompts), 1)
                uses.append(_rows(ONLINE_ROWS, config, tables["train"], Path(stage.files), passes=passes))
            if uses_pretrain(config):
                num_blocks = (stage.steps or 0) * (config.train.pretrain_batch_size or config.train.batch_size)
                num_bytes = num_blocks * config.data.max_len * _ID_BYTES
                uses.append(DiskUse("pre-training blocks", num_bytes, "at most", Path(stage.files)))
    return tuple(uses)


def _rows(what: str, config: Config, table: PromptTable, path: Path, *, passes: float) -> DiskUse:
    """A store of so many responses to each prompt."""
    num_tokens = round(passes * num_response_tokens(config, table, config.rollout.max_new_tokens))
    num_bytes = num_tokens * _STORE_BYTES_PER_TOKEN + round(passes * num_prompt_tokens(table)) * _ID_BYTES
    basis = f"assumed: at most {num_tokens:,} response tokens of {_STORE_BYTES_PER_TOKEN} bytes"
    if what == TEACHER_DATA:
        basis += "; plan --measure measures it"
    return DiskUse(what, num_bytes, basis, path)


def _require_room(students: DiskUse) -> None:
    free = free_bytes(students.path)
    if students.num_bytes > free:
        raise ConfigError(
            f"--ckpt.output_dir {students.path}: {format_bytes(free)} are free there, checkpoints and students take "
            f"{format_bytes(students.num_bytes)}; lower --ckpt.max_num, or name a folder on another disk"
        )


def disk_warnings(uses: Iterable[DiskUse]) -> list[str]:
    """A line for each disk that may be too small."""
    return [
        f"{format_bytes(place.used_bytes)} may not fit into the {format_bytes(place.free_bytes)} that are free in "
        f"{place.path}"
        for place in disk_places(uses)
        if place.used_bytes > place.free_bytes
    ]


def num_prompt_tokens(table: PromptTable) -> int:
    """Tokens of all prompts."""
    return sum(len(prompt.token_ids) for prompt in table.prompts)


def num_response_tokens(config: Config, table: PromptTable, max_new_tokens: int | None) -> int:
    """Tokens of one response to each prompt, if every response is as long as it may be."""
    longest = max_new_tokens or config.data.max_len
    return sum(min(longest, config.data.max_len - len(prompt.token_ids)) for prompt in table.prompts)


def student_bytes(config: Config, student: ModelFacts | None) -> int:
    """Disk space of checkpoints and students; 0 where the student's size is not known.

    A new checkpoint is whole before an old one goes, so there is one more than are kept.
    """
    if student is None or student.num_parameters is None:
        return 0
    weights = student.num_parameters * PARAMETER_BYTES[config.ds.param_dtype]
    copies = 3 if config.eval.dataset else 2
    copies += config.ckpt.max_num + 1 if config.ckpt.save_hf and config.ckpt.save_steps > 0 else 0
    if config.ckpt.disable_ds or config.ckpt.save_steps < 0:
        return copies * weights
    num_averages = config.train.enable_ema + (config.algo.distill.next_value_gradient == "target")
    # Of adapters all this is little.
    trained = student.num_parameters if config.ds.lora.rank == 0 else 0
    checkpoint = weights + trained * (_OPTIMIZER_BYTES + num_averages * _AVERAGE_BYTES)
    kept = min(config.ckpt.max_num * checkpoint, config.ckpt.max_mem * 1e9)
    return int(copies * weights + kept + checkpoint)
