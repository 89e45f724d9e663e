"""What the teacher sees of a record, within which limits, and which teacher it is."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from openrlhf_bd.config import Config
from openrlhf_bd.data.limits import teacher_length
from openrlhf_bd.data.prompts import PromptTable, load_prompts
from openrlhf_bd.data.routes import teacher_models
from openrlhf_bd.data.teacher_view import teacher_view
from openrlhf_bd.data.templates import format_prompt
from openrlhf_bd.errors import ConfigError, DataError

RECORDS = [
    {"instruction": "Add.", "input": "1 2", "solution": "1 + 2 = 3", "domain": "sums"},
    {"instruction": "Greet.", "input": "", "solution": "", "domain": "words"},
]
STUDENT_CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
TEACHER_CHAT = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"

Write = Callable[[list[dict[str, Any]]], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_records(records: list[dict[str, Any]]) -> str:
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return str(path)

    return write_records


def config_of(teacher: dict[str, Any], **data: Any) -> Config:
    keys = {"input_key": "instruction", "context_key": "input"}
    return Config.model_validate({"data": keys | data, "teacher": {"model_name_or_path": "a"} | teacher})


def load(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    spec: str,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> PromptTable:
    view = teacher_view(config, tokenizer, dict.fromkeys(teacher_models(config), teacher_tokenizer or tokenizer))
    return load_prompts(
        config, tokenizer, spec=spec, split="train", purpose="train", need_reference=False, teacher=view
    )


def chat_tokenizer(tokenizer: PreTrainedTokenizerBase, template: str) -> PreTrainedTokenizerBase:
    found = copy.deepcopy(tokenizer)
    found.chat_template = template
    return found


def teacher_texts(table: PromptTable, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [tokenizer.decode(prompt.seen_by_teacher) for prompt in table.prompts]


def test_teacher_sees_the_student_s_prompt_unless_told_otherwise(
    write: Write, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Without any of the teacher's options no prompt of its own is made."""
    table = load(config_of({}, prompt_wrapper="paper"), tokenizer, write(RECORDS))
    assert not table.has_teacher_prompts
    assert all(prompt.teacher_ids is None and prompt.teacher is None for prompt in table.prompts)


@pytest.mark.parametrize(
    ("teacher", "data", "expected"),
    [
        ({"input_template": "T: {}\n"}, {}, ["T: Add.\n\n1 2\n", "T: Greet.\n"]),
        ({"input_template": "{}"}, {"prompt_wrapper": "paper"}, ["Add.\n\n1 2", "Greet."]),
        (
            {"prompt_wrapper": "paper"},
            {"input_template": "S: {}"},
            [format_prompt("Add.", "1 2"), format_prompt("Greet.", "")],
        ),
        # On top of the student's template; a record without a solution adds nothing.
        (
            {"privileged_key": "solution", "privileged_template": "Known: {}"},
            {"input_template": "S: {}\n"},
            ["S: Add.\n\n1 2\n\nKnown: 1 + 2 = 3\n", "S: Greet.\n"],
        ),
        # Braces of the record's text are text.
        (
            {"privileged_key": "solution", "input_template": "T: {}"},
            {},
            ["T: Add.\n\n1 2\n\n1 + 2 = 3", "T: Greet."],
        ),
        (
            {"privileged_key": "solution"},
            {"prompt_wrapper": "paper"},
            [format_prompt("Add.", "1 2\n\n1 + 2 = 3"), format_prompt("Greet.", "")],
        ),
    ],
)
def test_templates_of_the_teacher(
    write: Write,
    tokenizer: PreTrainedTokenizerBase,
    teacher: dict[str, Any],
    data: dict[str, Any],
    expected: list[str],
) -> None:
    """A template of its own replaces the student's, privileged text comes on top; the student's prompt stays."""
    spec = write(RECORDS)
    table = load(config_of(teacher, **data), tokenizer, spec)
    assert teacher_texts(table, tokenizer) == expected
    plain = load(config_of({}, **data), tokenizer, spec)
    for prompt, without in zip(table.prompts, plain.prompts, strict=True):
        np.testing.assert_array_equal(prompt.token_ids, without.token_ids)


def test_chat_template_of_the_teacher(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    """Both see their own tokenizer's chat template; system prompt and solution are the teacher's alone."""
    student, teacher = chat_tokenizer(tokenizer, STUDENT_CHAT), chat_tokenizer(tokenizer, TEACHER_CHAT)
    options = {"apply_chat_template": True, "system_prompt": "Be exact.", "privileged_key": "solution"}
    table = load(config_of(options, apply_chat_template=True), student, write(RECORDS), teacher)
    assert tokenizer.decode(table.prompts[0].token_ids) == "user: Add.\n\n1 2\nassistant:"
    assert teacher_texts(table, tokenizer) == [
        "[system] Be exact.\n[user] Add.\n\n1 2\n\n1 + 2 = 3\n[assistant]",
        "[system] Be exact.\n[user] Greet.\n[assistant]",
    ]


def test_system_prompt_on_the_student_s_chat_template(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    """In a conversation the teacher's system prompt replaces the first one, and the solution ends the last message."""
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "1 2"}]
    student = chat_tokenizer(tokenizer, STUDENT_CHAT)
    config = config_of({"system_prompt": "T", "privileged_key": "solution"}, apply_chat_template=True)
    table = load(config, student, write([RECORDS[0] | {"instruction": chat}]))
    assert tokenizer.decode(table.prompts[0].token_ids) == "system: S\nuser: 1 2\nassistant:"
    assert teacher_texts(table, tokenizer) == ["system: T\nuser: 1 2\n\n1 + 2 = 3\nassistant:"]


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"input_template": "no place"}, r"--teacher\.input_template is 'no place'; expected exactly one \{\}"),
        ({"privileged_key": "solution", "privileged_template": "{} {}"}, r"--teacher\.privileged_template is '\{\} \{"),
        ({"apply_chat_template": True}, r"--teacher\.apply_chat_template: the tokenizer has no chat template"),
        ({"system_prompt": "x"}, r"--teacher\.system_prompt is given, but the teacher's prompt has no chat template"),
        (
            {"prompt_wrapper": "paper", "input_template": "{}"},
            r"--teacher\.prompt_wrapper paper and --teacher\.input_template are given",
        ),
        ({"privileged_key": "solution", "max_len": 100}, r"--teacher\.max_len 100 is less than --data\.max_len 2048"),
        ({"max_len": 4096}, r"--teacher\.max_len is given, but the teacher sees the student's prompts"),
        (
            {"privileged_template": "K: {}"},
            r"--teacher\.privileged_template is given without --teacher\.privileged_key",
        ),
    ],
)
def test_options_that_cannot_be_used(
    write: Write, tokenizer: PreTrainedTokenizerBase, teacher: dict[str, Any], message: str
) -> None:
    """A template without a place, a chat template that is not there, two templates, too short a length."""
    with pytest.raises(ConfigError, match=message):
        load(config_of(teacher), tokenizer, write(RECORDS))


def test_missing_column_is_named_with_its_record(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    """A record without the privileged text's key is refused by file and line, with a near name."""
    with pytest.raises(DataError, match=r'a\.jsonl:1: "solutions" is missing.*did you mean --teacher\.privileged_key'):
        load(config_of({"privileged_key": "solutions"}), tokenizer, write(RECORDS))


def test_teacher_s_overlong_prompts_are_dropped_or_cut(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    """Records whose prompt is too long for the teacher go, or lose their first tokens, and are counted apart."""
    spec = write([RECORDS[0] | {"solution": "7" * 40}, RECORDS[1]])
    options = {"privileged_key": "solution", "max_len": 40}
    table = load(config_of(options, max_len=30), tokenizer, spec)
    assert [prompt.prompt_id for prompt in table.prompts] == ["00000001"]
    assert (table.num_dropped_overlong, table.num_dropped_by_teacher, table.max_teacher_prompt_len) == (0, 1, 39)
    assert "1 of 2 records dropped, over 39 tokens as the teacher sees them" in table.summary()

    kept = load(config_of(options, max_len=30, overlong_prompts="keep"), tokenizer, spec)
    assert (kept.num_dropped_by_teacher, kept.num_kept_by_teacher) == (0, 1)
    assert tokenizer.decode(kept.prompts[0].seen_by_teacher) == "7" * 39
    assert tokenizer.decode(kept.prompts[0].token_ids) == "Add.\n\n1 2"

    with pytest.raises(DataError, match=r"no prompt is left: 1 have more than 39 tokens as the teacher sees them"):
        load(config_of(options, max_len=30), tokenizer, write([RECORDS[0] | {"solution": "7" * 40}]))


def test_length_of_the_teacher_is_the_student_s_unless_given() -> None:
    """teacher.max_len, or data.max_len."""
    assert teacher_length(config_of({}, max_len=50)) == 50
    assert teacher_length(config_of({"max_len": 70}, max_len=50)) == 70


def test_records_choose_their_teachers(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    """A record's value names its teacher; without one of that name the default teacher answers."""
    routes = {"route_key": "domain", "routes": "sums=b, words=c"}
    spec = write([*RECORDS, RECORDS[0] | {"domain": "art"}, RECORDS[0] | {"domain": None}])
    table = load(config_of(routes), tokenizer, spec)
    assert [prompt.teacher for prompt in table.prompts] == ["sums", "words", "default", "default"]
    assert teacher_models(config_of(routes)) == {"sums": "b", "words": "c", "default": "a"}


def test_each_teacher_sees_its_own_chat_template(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    """Prompts of several teachers are made by the tokenizer of each."""
    config = config_of(
        {"route_key": "domain", "routes": "sums=b,words=c", "model_name_or_path": None, "apply_chat_template": True}
    )
    tokenizers = {"sums": chat_tokenizer(tokenizer, STUDENT_CHAT), "words": chat_tokenizer(tokenizer, TEACHER_CHAT)}
    view = teacher_view(config, tokenizer, tokenizers)
    table = load_prompts(
        config,
        tokenizer,
        spec=write([*RECORDS, *RECORDS]),
        split="train",
        purpose="train",
        need_reference=False,
        teacher=view,
    )
    expected = ["user: Add.\n\n1 2\nassistant:", "[user] Greet.\n[assistant]"]
    assert teacher_texts(table, tokenizer) == expected * 2


def test_value_without_a_teacher_is_named_with_its_record(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    """Without a default teacher an unknown value is refused by file and line; so is a record without the key."""
    routes = {"route_key": "domain", "routes": "sums=b", "model_name_or_path": None}
    with pytest.raises(DataError, match=r'a\.jsonl:2: "domain" is \'words\', for which there is no teacher.* sums\. '):
        load(config_of(routes), tokenizer, write(RECORDS))
    with pytest.raises(DataError, match=r'a\.jsonl:1: "domain" is missing'):
        load(config_of(routes), tokenizer, write([{"instruction": "x", "input": ""}]))


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"routes": "a=b"}, r"--teacher\.routes is given without --teacher\.route_key"),
        ({"route_key": "domain"}, r"--teacher\.route_key is given without --teacher\.routes"),
        ({"routes": "a", "route_key": "k"}, "expected value=model entries"),
        ({"routes": "a=b,", "route_key": "k"}, "expected value=model entries"),
        ({"routes": "a=b,a=c", "route_key": "k"}, "names 'a' twice"),
        ({"routes": "default=b", "route_key": "k"}, r"which stands for --teacher\.model_name_or_path"),
    ],
)
def test_bad_routes(teacher: dict[str, Any], message: str) -> None:
    """Routes that say nothing, twice the same, or half of it are refused."""
    with pytest.raises(ConfigError, match=message):
        teacher_models(config_of(teacher))
