"""What a job's teachers must have in common, and what the plan tells of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from openrlhf_bd.config import Config
from openrlhf_bd.data.limits import teacher_length
from openrlhf_bd.data.prompts import PromptTable
from openrlhf_bd.data.routes import DEFAULT_TEACHER, is_routed, teacher_models, teacher_option
from openrlhf_bd.driver.models import stop_tokens
from openrlhf_bd.driver.remote_teacher import is_remote
from openrlhf_bd.driver.resources import Stage, holds_teacher, makes_rows
from openrlhf_bd.errors import DataError
from openrlhf_bd.store.fingerprints import fingerprint_tokenizer


def asked_teachers(config: Config, stages: Sequence[Stage]) -> dict[str, str | None]:
    """Model of each teacher that the stages load, by name; None where one is needed and not given.

    All of them generate. The one of --teacher.model_name_or_path also looks at responses (eval.teacher_nll,
    eval.exposure) and gives its logits to the student's ranks (kd_ratio, kd_support full). A teacher behind a server is
    not loaded.

    Raises:
        ConfigError: see `teacher_models`.
    """
    if is_remote(config):
        return {}
    models = teacher_models(config)
    makes = makes_rows(config, stages)
    asked: dict[str, str | None] = {**models} if makes else {}
    scores = "evaluate" in stages and (config.eval.teacher_nll or config.eval.exposure)
    if scores or holds_teacher(config, stages) or (makes and not models):
        asked[DEFAULT_TEACHER] = models.get(DEFAULT_TEACHER)
    return asked


def check_stop_tokens(config: Config) -> None:
    """Refuse teachers that end their responses by different tokens: a store has one list of them.

    Raises:
        DataError: the message names both models.
    """
    models = teacher_models(config)
    if len(models) < 2:
        return
    (first, first_model), *others = models.items()
    expected = stop_tokens(first_model, config)
    for name, model in others:
        found = stop_tokens(model, config)
        if found != expected:
            raise DataError(
                f"{model} ({teacher_option(name)}) ends responses by the tokens {list(found)}, {first_model} "
                f"({teacher_option(first)}) by {list(expected)}; expected the same. Make the eos_token_id of their "
                "generation_config.json equal"
            )


def check_same_tokenizer(
    teacher_tokenizer: PreTrainedTokenizerBase,
    student_tokenizer: PreTrainedTokenizerBase,
    *,
    teacher: str,
    student: str,
) -> None:
    """Teacher and student must turn text into the same ids: the student learns the teacher's choices id by id.

    Raises:
        DataError: they differ; the message says where.
    """
    if fingerprint_tokenizer(teacher_tokenizer) == fingerprint_tokenizer(student_tokenizer):
        return
    differences = "; ".join(tokenizer_differences(teacher_tokenizer, student_tokenizer))
    raise DataError(
        f"the tokenizers of teacher {teacher} and student {student} differ: {differences}. Expected the same "
        "tokenizer; choose models of one family (--teacher.model_name_or_path, --actor.model_name_or_path)"
    )


def tokenizer_differences(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> list[str]:
    """In words, what tells two tokenizers apart: sizes, the first id with another token, the end of sequence."""
    found = []
    if len(first) != len(second):
        found.append(f"{len(first)} and {len(second)} tokens")
    token_of_first, token_of_second = (
        {index: token for token, index in tokenizer.get_vocab().items()} for tokenizer in (first, second)
    )
    for index in sorted(token_of_first.keys() & token_of_second.keys()):
        if token_of_first[index] != token_of_second[index]:
            found.append(f"id {index} is {token_of_first[index]!r} and {token_of_second[index]!r}")
            break
    if first.eos_token != second.eos_token:
        found.append(f"the end of sequence is {first.eos_token!r} and {second.eos_token!r}")
    return found or ["the same vocabulary, but other merges, normalisation or special tokens"]


def teacher_lines(config: Config, table: PromptTable) -> list[str]:
    """What each of several teachers answers."""
    if not is_routed(config):
        return []
    counts = Counter(prompt.teacher for prompt in table.prompts)
    return [f"teacher {name}: {counts[name]} prompts, {model}" for name, model in teacher_models(config).items()]


def teacher_warnings(config: Config, table: PromptTable) -> list[str]:
    """What is allowed and probably not meant."""
    found = []
    counts = Counter(prompt.teacher for prompt in table.prompts)
    idle = [name for name in teacher_models(config) if is_routed(config) and not counts[name]]
    if idle:
        found.append(f"no record has a {config.teacher.route_key} for teacher {', '.join(idle)}")
    num_cut = sum(_cuts_response(config, len(p.token_ids), len(p.seen_by_teacher)) for p in table.prompts)
    if num_cut:
        found.append(
            f"{num_cut} prompts are so much longer as the teacher sees them that their responses must be shorter; "
            f"raise --teacher.max_len (now {teacher_length(config)})"
        )
    if _is_own_student(config) and not table.has_teacher_prompts:
        found.append(
            "teacher and student are the same model and see the same prompts, so there is little to learn; give the "
            "teacher a text of its own (--teacher.privileged_key, --teacher.system_prompt)"
        )
    return found


def _cuts_response(config: Config, num_student: int, num_teacher: int) -> bool:
    """Whether the teacher's prompt leaves a response less room than the student's."""
    room = min(config.data.max_len - num_student, config.rollout.max_new_tokens or config.data.max_len)
    return num_teacher > num_student and teacher_length(config) - num_teacher < room


def _is_own_student(config: Config) -> bool:
    teacher, student = teacher_models(config).get(DEFAULT_TEACHER), config.actor.model_name_or_path
    if is_routed(config) or teacher is None or student is None:
        return False
    return teacher == student or Path(teacher).expanduser().resolve() == Path(student).expanduser().resolve()
