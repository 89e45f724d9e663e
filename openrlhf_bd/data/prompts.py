"""Prompts of a data set, tokenised as the models see them, and the rows of a data set's own responses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from openrlhf_bd.config import Config
from openrlhf_bd.data.fields import reference_field, reference_fields
from openrlhf_bd.data.formats import student_format
from openrlhf_bd.data.limits import prompt_limit, teacher_length
from openrlhf_bd.data.readers import Record
from openrlhf_bd.data.sources import load_records
from openrlhf_bd.data.teacher_view import TeacherView
from openrlhf_bd.data.test_sets import RecordChecks
from openrlhf_bd.errors import ConfigError, DataError
from openrlhf_bd.records import Prompt, Rollout

Purpose = Literal["train", "validation", "test"]

_OPTIONS: dict[Purpose, str] = {
    "train": "--data.prompt_dataset",
    "validation": "--eval.dataset",
    "test": "--eval.test_datasets",
}
_BATCH_SIZE = 1024
_NO_RECORD: Mapping[str, Any] = {}


@dataclass(frozen=True, slots=True)
class PromptTable:
    """The prompts of one data set.

    Attributes:
        prompts: in the order of the data set; at least one.
        num_records: records read.
        num_dropped_overlong: records whose prompt was over the limit and left out.
        num_kept_overlong: prompts over the limit of which the last tokens were kept.
        max_prompt_len: the limit, tokens.
        num_dropped_by_teacher: records left out because the teacher's prompt was over its own limit.
        num_kept_by_teacher: teacher's prompts over that limit of which the last tokens were kept.
        max_teacher_prompt_len: that limit, tokens.
        num_unscored: of an evaluation, records without a reference.
        repeats: of an evaluation, records whose prompt and references an earlier one has, each with both places.
        first_overlong: place and tokens of the first record over a limit; None where there is none.
    """

    prompts: list[Prompt]
    num_records: int
    num_dropped_overlong: int
    num_kept_overlong: int
    max_prompt_len: int
    num_dropped_by_teacher: int
    num_kept_by_teacher: int
    max_teacher_prompt_len: int
    num_unscored: int = 0
    repeats: tuple[str, ...] = ()
    first_overlong: str | None = None

    @property
    def num_dropped(self) -> int:
        """Records that were left out."""
        return self.num_records - len(self.prompts)

    @property
    def num_tokens(self) -> int:
        return sum(len(prompt.token_ids) for prompt in self.prompts)

    @property
    def has_teacher_prompts(self) -> bool:
        """Whether the teacher sees other prompts than the student."""
        return any(prompt.teacher_ids is not None for prompt in self.prompts)

    def summary(self) -> str:
        """One line for the log and the plan."""
        text = f"{len(self.prompts)} prompts, {self.num_tokens} tokens"
        if self.num_dropped_overlong:
            dropped = f"{self.num_dropped_overlong} of {self.num_records} records dropped"
            text += f"; {dropped}, over {self.max_prompt_len} tokens"
        if self.num_kept_overlong:
            text += f"; {self.num_kept_overlong} prompts cut to their last {self.max_prompt_len} tokens"
        if self.has_teacher_prompts:
            num_tokens = sum(len(prompt.teacher_ids) for prompt in self.prompts if prompt.teacher_ids is not None)
            text += f"; the teacher sees {num_tokens} tokens"
        if self.num_dropped_by_teacher:
            dropped = f"{self.num_dropped_by_teacher} of {self.num_records} records dropped"
            text += f"; {dropped}, over {self.max_teacher_prompt_len} tokens as the teacher sees them"
        if self.num_kept_by_teacher:
            cut = f"{self.num_kept_by_teacher} teacher's prompts cut"
            text += f"; {cut} to their last {self.max_teacher_prompt_len} tokens"
        if self.first_overlong is not None:
            text += f" (the first: {self.first_overlong})"
        if self.num_unscored:
            text += f"; {self.num_unscored} without a reference get no Rouge-L"
        if self.repeats:
            text += f"; {len(self.repeats)} records count twice (the first: {self.repeats[0]})"
        return text


def load_prompts(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    *,
    spec: str,
    split: str,
    purpose: Purpose,
    need_reference: bool,
    teacher: TeacherView | None = None,
) -> PromptTable:
    """Read, format and tokenise the prompts of a data set.

    Args:
        config: the `data` and `eval` sections: keys, template, limits.
        tokenizer: of the models.
        spec: data sets, see `openrlhf_bd.data.sources`.
        split: split of hub data sets.
        purpose: decides which limit on records holds, and which option messages name. Only "train" is blended by
            `data.prompt_probs`; only "train" wants exactly one reference a record.
        need_reference: every record must have a reference response in `data.label_key`; in an evaluation
            `eval.missing_references` may let them pass.
        teacher: how the teacher sees the prompts; None: nobody asks.

    Raises:
        ConfigError: templates contradict each other, or limits leave no room for a response.
        DataError: see `load_records` and `text_field`; or every prompt is over the limit.
    """
    student = student_format(config, tokenizer)
    limits = _Limit(prompt_limit(config)), _Limit(teacher_length(config) - 1)
    if need_reference and config.data.label_key is None:
        raise ConfigError("--data.label_key is not given; name the key of the reference response in a record")
    max_samples = config.data.max_samples
    if purpose == "validation" and config.eval.max_samples is not None:
        max_samples = config.eval.max_samples
    probs = config.data.prompt_probs if purpose == "train" else None
    records = load_records(spec, split=split, max_samples=max_samples, probs=probs, option=_OPTIONS[purpose])

    keep = config.data.overlong_prompts == "keep"
    checks = RecordChecks(
        config.data.label_key if need_reference else None, allow_missing=config.eval.missing_references == "skip"
    )
    prompts: list[Prompt] = []
    num_records, first_overlong = 0, None
    for batch in _batches(records, _BATCH_SIZE):
        encoded = student.token_ids(batch)
        views = teacher.of(batch) if teacher is not None else [(None, None)] * len(batch)
        if purpose != "train":
            checks.see(batch, encoded)
        elif need_reference and config.data.label_key is not None:
            for record in batch:
                reference_field(record, config.data.label_key)
        for record, ids, (teacher_ids, name) in zip(batch, encoded, views, strict=True):
            # A teacher's job has many prompts, and nobody reads their records again.
            kept = record.values if need_reference or purpose != "train" else _NO_RECORD
            prompt = Prompt(f"{num_records:08d}", ids, kept, teacher_ids, name)
            num_records += 1
            fitting = _fitted(prompt, *limits, keep=keep)
            if fitting is not prompt and first_overlong is None:
                first_overlong = f"{record.where}, {max(len(ids), len(prompt.seen_by_teacher))} tokens"
            if fitting is not None:
                prompts.append(fitting)
    if not prompts:
        raise _all_overlong(spec, num_records, *limits)
    if purpose != "train":
        checks.require_scores(spec, num_records=num_records, has_checker=config.eval.checker is not None)
    of_student, of_teacher = limits
    return PromptTable(
        prompts=prompts,
        num_records=num_records,
        num_dropped_overlong=0 if keep else of_student.num_over,
        num_kept_overlong=of_student.num_over if keep else 0,
        max_prompt_len=of_student.tokens,
        num_dropped_by_teacher=0 if keep else of_teacher.num_over,
        num_kept_by_teacher=of_teacher.num_over if keep else 0,
        max_teacher_prompt_len=of_teacher.tokens,
        num_unscored=checks.num_without_reference,
        repeats=tuple(checks.repeats),
        first_overlong=first_overlong,
    )


class _Limit:
    """A limit on prompts, and what it met."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.num_over = 0
        self.shortest: int | None = None

    def allows(self, ids: NDArray[np.int32]) -> bool:
        self.shortest = len(ids) if self.shortest is None else min(self.shortest, len(ids))
        self.num_over += len(ids) > self.tokens
        return len(ids) <= self.tokens


def _fitted(prompt: Prompt, of_student: _Limit, of_teacher: _Limit, *, keep: bool) -> Prompt | None:
    """The prompt within the limits: as it is, its last tokens, or None."""
    if not of_student.allows(prompt.token_ids) and not keep:
        return None
    teacher_ids = prompt.teacher_ids
    if teacher_ids is not None and not of_teacher.allows(teacher_ids) and not keep:
        return None
    if len(prompt.token_ids) > of_student.tokens:
        prompt = replace(prompt, token_ids=prompt.token_ids[-of_student.tokens :])
    if teacher_ids is not None and len(teacher_ids) > of_teacher.tokens:
        prompt = replace(prompt, teacher_ids=teacher_ids[-of_teacher.tokens :])
    return prompt


def _all_overlong(spec: str, num_records: int, of_student: _Limit, of_teacher: _Limit) -> DataError:
    if of_teacher.num_over:
        limit, options = of_teacher, "--teacher.max_len"
        found = f"no prompt is left: {limit.num_over} have more than {limit.tokens} tokens as the teacher sees them"
    else:
        limit, options = of_student, "--data.max_prompt_len or --data.max_len"
        found = f"all {num_records} prompts have more than {limit.tokens} tokens"
    return DataError(
        f"{spec}: {found}, the shortest has {limit.shortest}; raise {options}, or set --data.overlong_prompts keep to "
        "cut them"
    )


def load_evaluation_prompts(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    *,
    spec: str,
    purpose: Literal["validation", "test"],
    teacher: TeacherView | None = None,
) -> PromptTable:
    """Prompts of a validation or test set. References are needed unless there is only a checker to score by.

    Args:
        config, tokenizer, spec, purpose: see `load_prompts`.
        teacher: how a teacher that scores responses sees the prompts.

    Raises:
        ConfigError, DataError: see `load_prompts`; neither `data.label_key` nor `eval.checker` is given.
    """
    if config.data.label_key is None and config.eval.checker is None:
        raise ConfigError(
            f"{_OPTIONS[purpose]} {spec} could not be scored: give --data.label_key (Rouge-L against references), "
            "--eval.checker (accuracy), or both"
        )
    need_reference = config.data.label_key is not None
    return load_prompts(
        config,
        tokenizer,
        spec=spec,
        split=config.eval.split,
        purpose=purpose,
        need_reference=need_reference,
        teacher=teacher,
    )


def with_references(table: PromptTable, label_key: str) -> PromptTable:
    """The prompts of an evaluation that have a reference: all of them but with `eval.missing_references skip`."""
    return replace(table, prompts=[prompt for prompt in table.prompts if _references(prompt, label_key)])


def gold_rollouts(
    table: PromptTable,
    tokenizer: PreTrainedTokenizerBase,
    label_key: str,
    max_len: int,
    *,
    teacher_max_len: int | None = None,
) -> Iterator[Rollout]:
    """The data set's own responses as rows: reference tokens and the end-of-sequence token after each prompt.

    Of several references, which a validation set may have, it is the first.

    Prompt and response are tokenised apart, as they are when the model generates. Text in a reference that spells a
    special token stays text.

    Args:
        table: prompts with records.
        tokenizer: the one that made the table.
        label_key: key of the reference response.
        max_len: longest prompt and response together; a longer response is cut, finish reason "length".
        teacher_max_len: longest prompt as the teacher sees it and response together; None: no teacher reads the rows.

    Raises:
        DataError: a record has no reference, or the tokenizer no end-of-sequence token.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise DataError("the tokenizer has no eos_token; a response needs a token that ends it")
    for batch in _batches(table.prompts, _BATCH_SIZE):
        texts = [_gold_text(prompt, label_key) for prompt in batch]
        encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
        for prompt, ids in zip(batch, encoded, strict=True):
            whole = np.asarray([*ids, eos], dtype=np.int32)
            room = max_len - len(prompt.token_ids)
            if teacher_max_len is not None:
                room = min(room, teacher_max_len - len(prompt.seen_by_teacher))
            yield Rollout(
                row_id=f"{prompt.prompt_id}:0",
                prompt_ids=prompt.token_ids,
                response_ids=whole[:room],
                finish_reason="stop" if len(whole) <= room else "length",
                teacher=prompt.teacher,
            )


def _gold_text(prompt: Prompt, label_key: str) -> str:
    return _references(prompt, label_key, allow_missing=False)[0]


def _references(prompt: Prompt, label_key: str, *, allow_missing: bool = True) -> list[str]:
    record = Record(dict(prompt.record), f"prompt {prompt.prompt_id}")
    return reference_fields(record, label_key, allow_missing=allow_missing)


def _batches(items: Any, size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
