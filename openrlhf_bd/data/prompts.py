"""Prompts of a data set, tokenised as the models see them, and the rows of a data set's own responses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from openrlhf_bd.config import Config
from openrlhf_bd.data.fields import messages_field, reference_field, text_field
from openrlhf_bd.data.readers import Record
from openrlhf_bd.data.sources import load_records
from openrlhf_bd.data.templates import format_prompt
from openrlhf_bd.errors import ConfigError, DataError
from openrlhf_bd.records import Prompt, Rollout

Purpose = Literal["train", "validation", "test"]

_OPTIONS: dict[Purpose, str] = {
    "train": "--data.prompt_dataset",
    "validation": "--eval.dataset",
    "test": "--eval.test_datasets",
}
_BATCH_SIZE = 1024


@dataclass(frozen=True, slots=True)
class PromptTable:
    """The prompts of one data set.

    Attributes:
        prompts: in the order of the data set; at least one.
        num_records: records read.
        num_dropped_overlong: records whose prompt was over the limit and left out.
        num_kept_overlong: prompts over the limit of which the last tokens were kept.
        max_prompt_len: the limit, tokens.
    """

    prompts: list[Prompt]
    num_records: int
    num_dropped_overlong: int
    num_kept_overlong: int
    max_prompt_len: int

    @property
    def num_tokens(self) -> int:
        return sum(len(prompt.token_ids) for prompt in self.prompts)

    def summary(self) -> str:
        """One line for the log and the plan."""
        text = f"{len(self.prompts)} prompts, {self.num_tokens} tokens"
        if self.num_dropped_overlong:
            dropped = f"{self.num_dropped_overlong} of {self.num_records} records dropped"
            text += f"; {dropped}, over {self.max_prompt_len} tokens"
        if self.num_kept_overlong:
            text += f"; {self.num_kept_overlong} prompts cut to their last {self.max_prompt_len} tokens"
        return text


def load_prompts(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    *,
    spec: str,
    split: str,
    purpose: Purpose,
    need_reference: bool,
) -> PromptTable:
    """Read, format and tokenise the prompts of a data set.

    Args:
        config: the `data` and `eval` sections: keys, template, limits.
        tokenizer: of the models.
        spec: data sets, see `openrlhf_bd.data.sources`.
        split: split of hub data sets.
        purpose: decides which limit on records holds, and which option messages name. Only "train" is blended by
            `data.prompt_probs`; only "train" wants exactly one reference a record.
        need_reference: every record must have a reference response in `data.label_key`.

    Raises:
        ConfigError: templates contradict each other, or limits leave no room for a response.
        DataError: see `load_records` and `text_field`; or every prompt is over the limit.
    """
    format_record = prompt_formatter(config, tokenizer)
    limit = prompt_limit(config)
    if need_reference and config.data.label_key is None:
        raise ConfigError("--data.label_key is not given; name the key of the reference response in a record")
    max_samples = config.data.max_samples
    if purpose == "validation" and config.eval.max_samples is not None:
        max_samples = config.eval.max_samples
    probs = config.data.prompt_probs if purpose == "train" else None
    records = load_records(spec, split=split, max_samples=max_samples, probs=probs, option=_OPTIONS[purpose])

    prompts: list[Prompt] = []
    num_records = num_over = shortest = 0
    for batch in _batches(records, _BATCH_SIZE):
        encoded = _tokenise(batch, format_record, config, tokenizer)
        if need_reference and config.data.label_key is not None:
            for record in batch:
                reference_field(record, config.data.label_key, several=purpose != "train")
        for record, ids in zip(batch, encoded, strict=True):
            index, num_records = num_records, num_records + 1
            shortest = min(shortest or len(ids), len(ids))
            num_over += len(ids) > limit
            if len(ids) <= limit or config.data.overlong_prompts == "keep":
                prompts.append(Prompt(f"{index:08d}", ids[-limit:], record.values))
    if not prompts:
        raise DataError(
            f"{spec}: all {num_records} prompts have more than {limit} tokens, the shortest has {shortest}; raise "
            "--data.max_prompt_len or --data.max_len, or set --data.overlong_prompts keep to cut them"
        )
    kept = num_over if config.data.overlong_prompts == "keep" else 0
    return PromptTable(prompts, num_records, num_over - kept, kept, limit)


def load_evaluation_prompts(
    config: Config, tokenizer: PreTrainedTokenizerBase, *, spec: str, purpose: Literal["validation", "test"]
) -> PromptTable:
    """Prompts of a validation or test set. References are needed unless there is only a checker to score by.

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
        config, tokenizer, spec=spec, split=config.eval.split, purpose=purpose, need_reference=need_reference
    )


def prompt_limit(config: Config) -> int:
    """Longest prompt, tokens: it leaves room for at least one response token.

    Raises:
        ConfigError: no prompt could be that short.
    """
    limit = config.data.max_prompt_len or config.data.max_len - 1
    if not 1 <= limit < config.data.max_len:
        raise ConfigError(
            f"--data.max_prompt_len {limit} leaves no room for a response in --data.max_len {config.data.max_len}; "
            "expected at least 1, and less than it"
        )
    return limit


def prompt_formatter(config: Config, tokenizer: PreTrainedTokenizerBase) -> Callable[[Record], str]:
    """The function from a record to the text of its prompt: chat template, paper's wrapper, own template, or as it is.

    An instruction's further input (`data.context_key`) stands in the wrapper's Input block, or after an empty line.

    Raises:
        ConfigError: more than one template is given, or the one given cannot be used.
    """
    data = config.data
    chosen = [
        name
        for name, given in (
            ("--data.apply_chat_template", data.apply_chat_template),
            ("--data.prompt_wrapper paper", data.prompt_wrapper == "paper"),
            ("--data.input_template", data.input_template is not None),
        )
        if given
    ]
    if len(chosen) > 1:
        raise ConfigError(f"{' and '.join(chosen)} are given; a prompt has one template, keep one of them")
    if data.apply_chat_template:
        return _chat_formatter(config, tokenizer)
    if data.prompt_wrapper == "paper":
        return lambda record: format_prompt(_instruction(record, config), _context(record, config))
    template = data.input_template if data.input_template is not None else "{}"
    _check_template(template)
    return lambda record: template.format(_joined(_instruction(record, config), record, config))


def _check_template(template: str) -> None:
    try:
        valid = template.format("\0").count("\0") == 1
    except (IndexError, KeyError, ValueError, AttributeError):
        valid = False
    if not valid:
        raise ConfigError(
            f"--data.input_template is {template!r}; expected exactly one {{}}, where the instruction goes "
            "(other braces are written {{ and }})"
        )


def _chat_formatter(config: Config, tokenizer: PreTrainedTokenizerBase) -> Callable[[Record], str]:
    if tokenizer.chat_template is None:
        raise ConfigError(
            "--data.apply_chat_template: the tokenizer has no chat template; use --data.prompt_wrapper paper or "
            "--data.input_template, or a model that has one"
        )

    def format_chat(record: Record) -> str:
        found = messages_field(record, config.data.input_key)
        if isinstance(found, str):
            found = [{"role": "user", "content": _joined(found, record, config)}]
        return str(tokenizer.apply_chat_template(found, tokenize=False, add_generation_prompt=True))

    return format_chat


def _instruction(record: Record, config: Config) -> str:
    return text_field(record, config.data.input_key, option="--data.input_key")


def _context(record: Record, config: Config) -> str:
    key = config.data.context_key
    return text_field(record, key, option="--data.context_key", allow_empty=True) if key is not None else ""


def _joined(instruction: str, record: Record, config: Config) -> str:
    context = _context(record, config)
    return f"{instruction}\n\n{context}" if context else instruction


def _tokenise(
    batch: list[Record], format_record: Callable[[Record], str], config: Config, tokenizer: PreTrainedTokenizerBase
) -> list[NDArray[np.int32]]:
    # A chat template writes the special tokens itself. Elsewhere the tokenizer adds those that start a text; one that
    # it adds at the end would tell the model that there is nothing left to say.
    add_special_tokens = not config.data.apply_chat_template
    texts = [format_record(record) for record in batch]
    drop_end = add_special_tokens and tokenizer("a").input_ids[-1] == tokenizer.eos_token_id
    encoded = tokenizer(texts, add_special_tokens=add_special_tokens, verbose=False).input_ids
    return [np.asarray(ids[:-1] if drop_end else ids, dtype=np.int32) for ids in encoded]


def gold_rollouts(
    table: PromptTable, tokenizer: PreTrainedTokenizerBase, label_key: str, max_len: int
) -> Iterator[Rollout]:
    """The data set's own responses as rows: reference tokens and the end-of-sequence token after each prompt.

    Prompt and response are tokenised apart, as they are when the model generates. Text in a reference that spells a
    special token stays text.

    Args:
        table: prompts with records.
        tokenizer: the one that made the table.
        label_key: key of the reference response.
        max_len: longest prompt and response together; a longer response is cut, finish reason "length".

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
            yield Rollout(
                row_id=f"{prompt.prompt_id}:0",
                prompt_ids=prompt.token_ids,
                response_ids=whole[:room],
                finish_reason="stop" if len(whole) <= room else "length",
            )


def _gold_text(prompt: Prompt, label_key: str) -> str:
    record = Record(dict(prompt.record), f"prompt {prompt.prompt_id}")
    return text_field(record, label_key, option="--data.label_key")


def parse_test_datasets(spec: str) -> dict[str, str]:
    """Name and data set of each entry of `--eval.test_datasets`; an entry without a name takes its file's.

    Raises:
        ConfigError: an entry is empty, or two have the same name.
    """
    found: dict[str, str] = {}
    for entry in spec.split(","):
        name, equals, path = (part.strip() for part in entry.partition("="))
        if not equals:
            name, path = Path(name).stem, name
        if not name or not path:
            raise ConfigError(f"--eval.test_datasets is {spec!r}; expected name=path entries separated by commas")
        if name in found:
            raise ConfigError(
                f"--eval.test_datasets names {name!r} twice; give each data set a name of its own, name=path"
            )
        found[name] = path
    return found


def _batches(items: Any, size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
