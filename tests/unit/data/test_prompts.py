import json

import numpy as np
import pytest

from openrlhf_bd.config import Config
from openrlhf_bd.data.limits import prompt_limit
from openrlhf_bd.data.prompts import (
    gold_rollouts,
    load_evaluation_prompts,
    load_prompts,
)
from openrlhf_bd.data.templates import format_prompt
from openrlhf_bd.errors import ConfigError, DataError

RECORDS = [
    {"instruction": "Add the digits.", "input": "123", "output": "6"},
    {"instruction": "Say hello.", "input": "", "output": "hello"},
    {"instruction": "Reverse the digits.", "input": "123456789123456789", "output": "987654321987654321"},
]
CHAT_TEMPLATE = "{% for m in messages %}<|endoftext|>{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture
def write(tmp_path):
    def write_records(records, name="a.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return str(path)

    return write_records


def config_of(*, evaluation=None, **data):
    keys = {"input_key": "instruction", "context_key": "input", "label_key": "output"}
    return Config.model_validate({"data": keys | data, "eval": evaluation or {}})


def load(config, tokenizer, spec, *, purpose="train", need_reference=True):
    return load_prompts(config, tokenizer, spec=spec, split="train", purpose=purpose, need_reference=need_reference)


def test_paper_wrapper(write, tokenizer):
    """Prompts are the tokens of the paper's wrapper around instruction and input, and keep their records."""
    table = load(config_of(prompt_wrapper="paper"), tokenizer, write(RECORDS))
    assert [prompt.prompt_id for prompt in table.prompts] == ["00000000", "00000001", "00000002"]
    assert [tokenizer.decode(prompt.token_ids) for prompt in table.prompts] == [
        format_prompt(record["instruction"], record["input"]) for record in RECORDS
    ]
    assert [prompt.record for prompt in table.prompts] == RECORDS
    assert all(prompt.token_ids.dtype == np.int32 for prompt in table.prompts)
    assert table.num_tokens == sum(len(prompt.token_ids) for prompt in table.prompts)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({}, ["Add the digits.\n\n123", "Say hello."]),
        ({"context_key": None}, ["Add the digits.", "Say hello."]),
        ({"input_template": "Q: {}\nA: "}, ["Q: Add the digits.\n\n123\nA: ", "Q: Say hello.\nA: "]),
        ({"input_template": "{{x}} {}"}, ["{x} Add the digits.\n\n123", "{x} Say hello."]),
    ],
)
def test_own_templates(write, tokenizer, data, expected):
    """Without the wrapper a prompt is the record's text, with its input after an empty line, in the given template."""
    table = load(config_of(**data), tokenizer, write(RECORDS[:2]))
    assert [tokenizer.decode(prompt.token_ids) for prompt in table.prompts] == expected


def test_chat_template(write, tokenizer):
    """A chat template wraps an instruction as the user's message, and takes a conversation as it is."""
    chat = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "3"}]
    tokenizer.chat_template = CHAT_TEMPLATE
    try:
        spec = write([RECORDS[0], RECORDS[0] | {"instruction": chat}])
        table = load(config_of(apply_chat_template=True), tokenizer, spec)
    finally:
        tokenizer.chat_template = None
    first, second = (tokenizer.decode(prompt.token_ids) for prompt in table.prompts)
    assert first == "<|endoftext|>user: Add the digits.\n\n123\nassistant:"
    assert second == "<|endoftext|>user: 1\n<|endoftext|>assistant: 2\n<|endoftext|>user: 3\nassistant:"
    assert table.prompts[0].token_ids[0] == tokenizer.eos_token_id


def test_end_of_sequence_is_not_part_of_a_prompt(write, tokenizer):
    """Tokenizers that end every text with an end-of-sequence token do not end prompts with it; a start token stays."""
    import copy

    from tokenizers.processors import TemplateProcessing

    other = copy.deepcopy(tokenizer)
    eos = other.eos_token
    other.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{eos} $A {eos}", special_tokens=[(eos, other.eos_token_id)]
    )
    assert other("1").input_ids[-1] == 0
    (prompt,) = load(config_of(), other, write(RECORDS[1:2])).prompts
    assert other.decode(prompt.token_ids) == "<|endoftext|>Say hello."


def test_overlong_prompts_are_dropped(write, tokenizer):
    """Prompts over the limit are left out and counted; the others keep the ids of their records."""
    lengths = [len(tokenizer(text).input_ids) for text in ("Reverse", "Say hello.")]
    records = [RECORDS[2], RECORDS[1], RECORDS[2], RECORDS[1]]
    table = load(config_of(max_prompt_len=lengths[1]), tokenizer, write(records))
    assert [prompt.prompt_id for prompt in table.prompts] == ["00000001", "00000003"]
    assert (table.num_records, table.num_dropped_overlong, table.num_kept_overlong) == (4, 2, 0)
    assert "2 of 4 records dropped" in table.summary()


def test_overlong_prompts_are_cut(write, tokenizer):
    """With overlong_prompts keep, the last tokens of a long prompt stay."""
    table = load(config_of(max_prompt_len=9, overlong_prompts="keep"), tokenizer, write(RECORDS[2:]))
    assert tokenizer.decode(table.prompts[0].token_ids) == "123456789"
    assert (table.num_dropped_overlong, table.num_kept_overlong) == (0, 1)
    assert "cut to their last 9 tokens" in table.summary()


def test_all_overlong(write, tokenizer):
    """If nothing is left, the error says how long the shortest prompt is and what to change."""
    with pytest.raises(DataError, match=r"all 3 prompts have more than 2 tokens, the shortest has \d+; raise"):
        load(config_of(max_prompt_len=2), tokenizer, write(RECORDS))


def test_limit():
    """The longest prompt leaves room for one response token."""
    assert prompt_limit(config_of(max_len=10)) == 9
    assert prompt_limit(config_of(max_len=10, max_prompt_len=4)) == 4
    for data in ({"max_len": 10, "max_prompt_len": 10}, {"max_len": 1}):
        with pytest.raises(ConfigError, match="leaves no room"):
            prompt_limit(config_of(**data))


def test_limits_on_records(write, tokenizer):
    """Training and test sets are limited by data.max_samples, validation by eval.max_samples where it is given."""
    spec = write(RECORDS)
    config = config_of(max_samples=2, evaluation={"max_samples": 1})
    assert len(load(config, tokenizer, spec).prompts) == 2
    assert len(load(config, tokenizer, spec, purpose="validation").prompts) == 1
    assert len(load(config, tokenizer, spec, purpose="test").prompts) == 2
    assert len(load(config_of(max_samples=2), tokenizer, spec, purpose="validation").prompts) == 2


GOOD = RECORDS[1]
# The second record, other options, and what the message must contain beside the file and its line.
BAD_RECORDS = {
    "no instruction": (
        {"instructions": "x", "output": "y"},
        {},
        ['"instruction" is missing', '"instructions", "output"'],
    ),
    "nearest key": ({"instructions": "x", "output": "y"}, {}, ["did you mean --data.input_key instructions?"]),
    "no key": ({}, {}, ["no key at all", "--data.input_key"]),
    "number": (GOOD | {"instruction": 3}, {}, ['"instruction" is a int, 3', "--data.input_key"]),
    "null": (GOOD | {"instruction": None}, {}, ["is null", "expected a text"]),
    "empty": (GOOD | {"instruction": " "}, {}, ["is empty", "non-empty text", "--data.input_key"]),
    "list without chat template": (GOOD | {"instruction": ["a"]}, {}, ["a list", "expected a text"]),
    "input": (GOOD | {"input": 5}, {}, ['"input" is a int', "--data.context_key"]),
    "no input": ({"instruction": "x", "output": "y"}, {}, ['"input" is missing', "--data.context_key"]),
    "no reference": ({"instruction": "x", "input": ""}, {}, ['"output" is missing', "--data.label_key"]),
    "reference of another type": (GOOD | {"output": ["a"]}, {}, ['"output" is a list', "--data.label_key"]),
    "empty reference": (GOOD | {"output": ""}, {}, ['"output" is empty', "--data.label_key"]),
    "half a surrogate pair": (GOOD | {"instruction": "a\ud800"}, {}, ["surrogate", "character 1"]),
}


@pytest.mark.parametrize(("record", "data", "parts"), BAD_RECORDS.values(), ids=BAD_RECORDS.keys())
def test_bad_record(write, tokenizer, record, data, parts):
    """A record that cannot be used is named by file and line, with what stands there and the option to look at."""
    spec = write([GOOD, record])
    with pytest.raises(DataError) as error:
        load(config_of(**data), tokenizer, spec)
    assert [part for part in [f"{spec}:2: ", *parts] if part not in str(error.value)] == []


@pytest.mark.parametrize("instruction", [[], ["a"], [{"role": "user"}]])
def test_bad_conversation(write, tokenizer, instruction):
    """A conversation is a list of messages with role and content."""
    tokenizer.chat_template = CHAT_TEMPLATE
    try:
        with pytest.raises(DataError, match=r'a\.jsonl:1: "instruction" is .*"role" and "content"'):
            load(config_of(apply_chat_template=True), tokenizer, write([GOOD | {"instruction": instruction}]))
    finally:
        tokenizer.chat_template = None


@pytest.mark.parametrize("template", ["no place", "{} and {}", "{name}", "{", "{0.x}"])
def test_bad_template(write, tokenizer, template):
    """A template has exactly one place for the instruction."""
    with pytest.raises(ConfigError, match=r"--data\.input_template .*expected exactly one \{\}"):
        load(config_of(input_template=template), tokenizer, write(RECORDS))


def test_templates_exclude_each_other(write, tokenizer):
    """Two templates at once are refused by name."""
    with pytest.raises(ConfigError, match=r"--data\.prompt_wrapper paper and --data\.input_template are given"):
        load(config_of(prompt_wrapper="paper", input_template="{}"), tokenizer, write(RECORDS))


def test_chat_template_that_is_not_there(write, tokenizer):
    """A tokenizer without a chat template cannot apply it."""
    with pytest.raises(ConfigError, match="the tokenizer has no chat template"):
        load(config_of(apply_chat_template=True), tokenizer, write(RECORDS))


def test_reference_key_is_needed(write, tokenizer):
    """Rows of the data set's own responses need the key of the reference."""
    with pytest.raises(ConfigError, match=r"--data\.label_key is not given"):
        load(config_of(label_key=None), tokenizer, write(RECORDS))
    assert len(load(config_of(label_key=None), tokenizer, write(RECORDS), need_reference=False).prompts) == 3


def test_evaluation_prompts(write, tokenizer):
    """A test set needs references or a checker, and may have several references a record."""
    several = write([GOOD | {"output": ["a", "b"]}])
    assert len(load_evaluation_prompts(config_of(), tokenizer, spec=several, purpose="test").prompts) == 1
    config = config_of(label_key=None, evaluation={"checker": "a:b"})
    assert len(load_evaluation_prompts(config, tokenizer, spec=several, purpose="test").prompts) == 1
    with pytest.raises(ConfigError, match=r"--eval\.dataset .*--data\.label_key.*--eval\.checker"):
        load_evaluation_prompts(config_of(label_key=None), tokenizer, spec=several, purpose="validation")


def test_gold_rollouts(write, tokenizer):
    """A reference becomes a response that ends with the end of sequence; prompt and response are tokenised apart."""
    table = load(config_of(prompt_wrapper="paper"), tokenizer, write(RECORDS))
    rollouts = list(gold_rollouts(table, tokenizer, "output", 2048))
    assert [rollout.row_id for rollout in rollouts] == ["00000000:0", "00000001:0", "00000002:0"]
    assert [rollout.finish_reason for rollout in rollouts] == ["stop"] * 3
    # "6" is one token; then the end of sequence, token 0.
    assert rollouts[0].response_ids.tolist() == [*tokenizer("6").input_ids, 0]
    assert len(rollouts[0].response_ids) == 2
    assert all(rollout.response_ids.dtype == np.int32 for rollout in rollouts)
    assert rollouts[0].prompt_ids is table.prompts[0].token_ids
    assert rollouts[0].sets is None


def test_first_of_several_references(write, tokenizer):
    """Of several references, which validation and test sets may have, the first one is the response."""
    path = write([{**RECORDS[0], "output": ["6", "six"]}])
    config = config_of()
    table = load_evaluation_prompts(config, tokenizer, spec=str(path), purpose="validation")
    (rollout,) = gold_rollouts(table, tokenizer, "output", 2048)
    assert rollout.response_ids.tolist() == [*tokenizer("6").input_ids, 0]


def test_gold_rollouts_are_cut(write, tokenizer):
    """A response over data.max_len is cut and has no end of sequence; one that just fits has it."""
    table = load(config_of(context_key=None), tokenizer, write(RECORDS[2:]))
    num_prompt = len(table.prompts[0].token_ids)
    # 18 digits and the end of sequence are 19 tokens.
    (whole,) = gold_rollouts(table, tokenizer, "output", num_prompt + 19)
    (cut,) = gold_rollouts(table, tokenizer, "output", num_prompt + 18)
    assert (whole.finish_reason, whole.response_ids[-1]) == ("stop", 0)
    assert (cut.finish_reason, len(cut.response_ids)) == ("length", 18)
    assert 0 not in cut.response_ids


def test_special_tokens_in_a_reference_stay_text(write, tokenizer):
    """Text that spells the end-of-sequence token does not end a response in its middle."""
    table = load(config_of(), tokenizer, write([GOOD | {"output": "a<|endoftext|>b"}]))
    (rollout,) = gold_rollouts(table, tokenizer, "output", 2048)
    assert np.flatnonzero(rollout.response_ids == 0).tolist() == [len(rollout.response_ids) - 1]
    assert tokenizer.decode(rollout.response_ids[:-1]) == "a<|endoftext|>b"
