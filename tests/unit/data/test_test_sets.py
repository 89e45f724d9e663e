"""Test sets: names, keys of their own, and records that cannot be evaluated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from openrlhf_bd.config import Config
from openrlhf_bd.data.prompts import load_evaluation_prompts
from openrlhf_bd.data.test_sets import TestSet, parse_test_datasets
from openrlhf_bd.errors import ConfigError, DataError

GOOD = {"instruction": "Add 1 and 2.", "output": "3"}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def written(*records: dict[str, Any]) -> str:
        path = tmp_path / "test.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return str(path)

    return written


def config_of(missing: str = "error", checker: str | None = None, **data: Any) -> Config:
    keys = {"input_key": "instruction", "label_key": "output", "max_len": 64}
    return Config.model_validate(
        {"data": {**keys, **data}, "eval": {"missing_references": missing, "checker": checker}}
    )


def test_names_of_test_sets():
    """Test sets have the name that they are given, or their file's."""
    assert parse_test_datasets("a=x/y.jsonl, z/b.jsonl,c=org/name") == {
        "a": TestSet("x/y.jsonl"),
        "b": TestSet("z/b.jsonl"),
        "c": TestSet("org/name"),
    }


def test_a_test_set_has_keys_of_its_own():
    """Keys behind a path hold for that test set alone; a colon without a key belongs to the path."""
    found = parse_test_datasets("a=hf://x/y:input_key=prompt:label_key=answers,b=z.jsonl:context_key=none")
    assert found["a"] == TestSet("hf://x/y", {"input_key": "prompt", "label_key": "answers"})
    config = config_of(context_key="input")
    own = found["a"].configured(config).data
    assert (own.input_key, own.label_key, own.context_key) == ("prompt", "answers", "input")
    assert found["b"].configured(config).data.context_key is None
    assert config.data.input_key == "instruction"


@pytest.mark.parametrize("spec", ["", "a=x,,b=y", "a=", "=x", "a=x,a=y", "a=:label_key=b"])
def test_bad_names_of_test_sets(spec: str):
    """Empty entries and repeated names are refused."""
    with pytest.raises(ConfigError, match=r"--eval\.test_datasets"):
        parse_test_datasets(spec)


@pytest.mark.parametrize("entry", ["a=x.jsonl:labels=y", "a=x.jsonl:label_key="])
def test_a_key_that_no_test_set_has(entry: str):
    """A key that is mistyped or empty is refused with those that there are."""
    with pytest.raises(ConfigError, match=r":label.*:input_key=KEY, :context_key=KEY, :label_key=KEY"):
        parse_test_datasets(entry)


BAD_REFERENCES = {
    "missing": ({}, '"output" is missing'),
    "null": ({"output": None}, '"output" is null'),
    "empty": ({"output": " "}, '"output" is empty'),
    "empty list": ({"output": []}, '"output" is empty'),
    "number": ({"output": 3}, '"output" is a int, 3'),
    "empty in a list": ({"output": ["3", ""]}, 'reference 2 of 2 in "output" is empty'),
    "null in a list": ({"output": [None]}, 'reference 1 of 1 in "output" is null'),
}


@pytest.mark.parametrize(("reference", "found"), BAD_REFERENCES.values(), ids=BAD_REFERENCES.keys())
def test_a_bad_reference(write, tokenizer, reference: dict[str, Any], found: str):
    """A record that cannot be scored is an error with file and line, what was found, and the option to look at."""
    spec = write(GOOD, {"instruction": "Add 2 and 2."} | reference)
    with pytest.raises(DataError) as error:
        load_evaluation_prompts(config_of(), tokenizer, spec=spec, purpose="test")
    assert str(error.value).startswith(f"{spec}:2: {found}")
    assert "--data.label_key" in str(error.value)


def test_missing_references_may_be_left_out(write, tokenizer):
    """With skip, records without a reference stay and are counted; a reference that is no text is still an error."""
    spec = write(GOOD, {"instruction": "a"}, {"instruction": "b", "output": ""}, {"instruction": "c", "output": []})
    table = load_evaluation_prompts(config_of("skip"), tokenizer, spec=spec, purpose="test")
    assert (len(table.prompts), table.num_unscored) == (4, 3)
    assert "3 without a reference get no Rouge-L" in table.summary()
    with pytest.raises(DataError, match=r'test\.jsonl:1: "output" is a int, 3'):
        load_evaluation_prompts(config_of("skip"), tokenizer, spec=write(GOOD | {"output": 3}), purpose="test")


def test_a_set_without_any_reference(write, tokenizer):
    """Where no record has a reference nothing could be scored, unless a checker does."""
    spec = write({"instruction": "a"}, {"instruction": "b"})
    with pytest.raises(DataError, match=r"none of its 2 records has a reference in 'output'.*:label_key=KEY"):
        load_evaluation_prompts(config_of("skip"), tokenizer, spec=spec, purpose="test")
    table = load_evaluation_prompts(config_of("skip", checker="a:b"), tokenizer, spec=spec, purpose="test")
    assert table.num_unscored == 2


def test_a_record_without_an_instruction(write, tokenizer):
    """A record without an instruction is an error with file and line, whatever happens to missing references."""
    with pytest.raises(DataError, match=r'test\.jsonl:2: "instruction" is missing'):
        load_evaluation_prompts(config_of("skip"), tokenizer, spec=write(GOOD, {"output": "3"}), purpose="test")


def test_a_repeated_record_is_told(write, tokenizer):
    """A record that repeats an earlier one counts twice, and the plan says where; another answer is another record."""
    spec = write(GOOD, GOOD | {"output": "4"}, GOOD | {"id": 7})
    table = load_evaluation_prompts(config_of(), tokenizer, spec=spec, purpose="test")
    assert table.repeats == (f"{spec}:3 repeats {spec}:1",)
    assert f"1 records count twice (the first: {spec}:3 repeats {spec}:1)" in table.summary()


def test_a_prompt_without_room_is_told(write, tokenizer):
    """A prompt that leaves no room for a response is left out, and the plan says which one and how long it is."""
    spec = write(GOOD, {"instruction": "1" * 100, "output": "3"})
    table = load_evaluation_prompts(config_of(), tokenizer, spec=spec, purpose="test")
    assert (len(table.prompts), table.num_dropped) == (1, 1)
    assert f"1 of 2 records dropped, over 63 tokens (the first: {spec}:2, 100 tokens)" in table.summary()
