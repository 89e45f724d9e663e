"""From records to the tokens of their prompts: the student's template, and the teacher's own where it has one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from openrlhf_bd.config import Config, DataConfig, TeacherConfig
from openrlhf_bd.data.fields import messages_field, text_field
from openrlhf_bd.data.readers import Record
from openrlhf_bd.data.templates import format_prompt
from openrlhf_bd.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """A template with the tokenizer that reads its text.

    Attributes:
        text: the prompt of a record, as text.
        tokenizer: makes it tokens.
        is_chat: the text is a chat template's, which writes special tokens itself.
    """

    text: Callable[[Record], str]
    tokenizer: PreTrainedTokenizerBase
    is_chat: bool

    def token_ids(self, records: Sequence[Record]) -> list[NDArray[np.int32]]:
        """Tokens of each record's prompt.

        Raises:
            DataError: a record lacks a text that the template needs.
        """
        # Outside chat templates the tokenizer adds the special tokens that start a text; one that it adds at the end
        # would tell the model that there is nothing left to say.
        add_special_tokens = not self.is_chat
        texts = [self.text(record) for record in records]
        drop_end = add_special_tokens and self.tokenizer("a").input_ids[-1] == self.tokenizer.eos_token_id
        encoded = self.tokenizer(texts, add_special_tokens=add_special_tokens, verbose=False).input_ids
        return [np.asarray(ids[:-1] if drop_end else ids, dtype=np.int32) for ids in encoded]


def student_format(config: Config, tokenizer: PreTrainedTokenizerBase) -> PromptFormat:
    """The student's prompt: chat template, paper's wrapper, own template, or the text as it is (`data.*`).

    An instruction's further input (`data.context_key`) stands in the wrapper's Input block, or after an empty line.

    Raises:
        ConfigError: more than one template is given, or the one given cannot be used.
    """
    return _format(config.data, "data", _Texts(config, of_teacher=False), tokenizer)


def teacher_format(
    config: Config, tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase
) -> PromptFormat | None:
    """The teacher's prompt where `teacher.*` makes it another than the student's; else None.

    A template of its own takes the place of the student's. `teacher.system_prompt` and the text of
    `teacher.privileged_key` come on top of either: the text follows instruction and input after an empty line, in the
    last message of a conversation, or in the wrapper's Input block.

    Args:
        config: `teacher` and `data`.
        tokenizer: of the student, whose chat template the teacher sees unless it is given its own.
        teacher_tokenizer: of the teacher: the same tokenizer, perhaps with another chat template.

    Raises:
        ConfigError: see `student_format`; or a system prompt without a chat template, or an option without effect.
    """
    teacher = config.teacher
    if teacher.privileged_key is None and teacher.privileged_template != "{}":
        raise ConfigError(
            "--teacher.privileged_template is given without --teacher.privileged_key; name the key of the text that "
            "goes into it, or leave it out"
        )
    has_template = bool(_given_templates(teacher, "teacher"))
    if not has_template and teacher.system_prompt is None and teacher.privileged_key is None:
        if teacher.max_len is not None:
            raise ConfigError(
                "--teacher.max_len is given, but the teacher sees the student's prompts, for which --data.max_len "
                "holds; leave it out"
            )
        return None
    check_template(teacher.privileged_template, "--teacher.privileged_template")
    texts = _Texts(config, of_teacher=True)
    if has_template:
        found = _format(teacher, "teacher", texts, teacher_tokenizer)
    else:
        found = _format(config.data, "data", texts, tokenizer)
    if teacher.system_prompt is not None and not found.is_chat:
        raise ConfigError(
            "--teacher.system_prompt is given, but the teacher's prompt has no chat template to put it in; give "
            "--teacher.apply_chat_template, or write the text into --teacher.input_template"
        )
    return found


@dataclass(frozen=True, slots=True)
class _Texts:
    """The texts of a record that prompts are made of."""

    config: Config
    of_teacher: bool

    def instruction(self, record: Record) -> str:
        return text_field(record, self.config.data.input_key, option="--data.input_key")

    def further(self, record: Record) -> str:
        """The further input of an instruction, and what the teacher alone sees."""
        key = self.config.data.context_key
        context = "" if key is None else text_field(record, key, option="--data.context_key", allow_empty=True)
        return _joined(context, self.privileged(record))

    def privileged(self, record: Record) -> str:
        teacher = self.config.teacher
        if not self.of_teacher or teacher.privileged_key is None:
            return ""
        text = text_field(record, teacher.privileged_key, option="--teacher.privileged_key", allow_empty=True)
        return teacher.privileged_template.format(text) if text else ""

    def messages(self, record: Record) -> list[dict[str, Any]]:
        """A conversation: an instruction is the user's message."""
        found = messages_field(record, self.config.data.input_key)
        if isinstance(found, str):
            found = [{"role": "user", "content": _joined(found, self.further(record))}]
        else:
            found = self._with_privileged(found, record)
        system = self.config.teacher.system_prompt
        if not self.of_teacher or system is None:
            return found
        others = found[1:] if found[0]["role"] == "system" else found
        return [{"role": "system", "content": system}, *others]

    def _with_privileged(self, messages: list[dict[str, Any]], record: Record) -> list[dict[str, Any]]:
        text, last = self.privileged(record), messages[-1]
        if not text:
            return messages
        if not isinstance(last["content"], str):
            raise DataError(
                f"{record.where}: the content of the last message is a {type(last['content']).__name__}; expected a "
                "text, which that of --teacher.privileged_key can follow"
            )
        return [*messages[:-1], {**last, "content": _joined(last["content"], text)}]


def _format(
    section: DataConfig | TeacherConfig, name: str, texts: _Texts, tokenizer: PreTrainedTokenizerBase
) -> PromptFormat:
    given = _given_templates(section, name)
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} are given; a prompt has one template, keep one of them")
    if section.apply_chat_template:
        return PromptFormat(_chat(name, texts, tokenizer), tokenizer, is_chat=True)
    if section.prompt_wrapper == "paper":
        return PromptFormat(
            lambda record: format_prompt(texts.instruction(record), texts.further(record)), tokenizer, is_chat=False
        )
    template = section.input_template if section.input_template is not None else "{}"
    check_template(template, f"--{name}.input_template")
    return PromptFormat(
        lambda record: template.format(_joined(texts.instruction(record), texts.further(record))),
        tokenizer,
        is_chat=False,
    )


def _given_templates(section: DataConfig | TeacherConfig, name: str) -> list[str]:
    options = {
        "apply_chat_template": section.apply_chat_template,
        "prompt_wrapper paper": section.prompt_wrapper == "paper",
        "input_template": section.input_template is not None,
    }
    return [f"--{name}.{option}" for option, given in options.items() if given]


def check_template(template: str, option: str) -> None:
    """Refuse a template that has not exactly one place for a text.

    Raises:
        ConfigError: the message names the option.
    """
    try:
        valid = template.format("\0").count("\0") == 1
    except (IndexError, KeyError, ValueError, AttributeError):
        valid = False
    if not valid:
        raise ConfigError(
            f"{option} is {template!r}; expected exactly one {{}}, where the text goes "
            "(other braces are written {{ and }})"
        )


def _chat(name: str, texts: _Texts, tokenizer: PreTrainedTokenizerBase) -> Callable[[Record], str]:
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"--{name}.apply_chat_template: the tokenizer has no chat template; use --{name}.prompt_wrapper paper or "
            f"--{name}.input_template, or a model that has one"
        )
    return lambda record: str(
        tokenizer.apply_chat_template(texts.messages(record), tokenize=False, add_generation_prompt=True)
    )


def _joined(text: str, more: str) -> str:
    return f"{text}\n\n{more}" if text and more else text or more
