"""The demo tokenizer: exact, deterministic, one token per digit, one per wrapper line."""

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from openrlhf_bd.data.templates import format_prompt
from openrlhf_bd.demo.corpus import generate_split
from openrlhf_bd.demo.models import TEACHER_FOLDER, teacher_config
from openrlhf_bd.demo.tokenizer import save_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    """The tokenizer that ships with the teacher."""
    return AutoTokenizer.from_pretrained(str(TEACHER_FOLDER))


def test_round_trip_of_records(tokenizer) -> None:
    """Decoding gives back every prompt and response exactly, and a prompt's tokens do not depend on its response."""
    for record in generate_split("test", 300, 0):
        prompt = format_prompt(record["instruction"], record["input"])
        prompt_ids, response_ids = tokenizer(prompt).input_ids, tokenizer(record["output"]).input_ids
        assert tokenizer.decode(prompt_ids) == prompt
        assert tokenizer.decode(response_ids) == record["output"]
        assert tokenizer(prompt + record["output"]).input_ids == prompt_ids + response_ids


@pytest.mark.parametrize("text", ["", " ", "  two  spaces ", "12 345", "naïve 漢字 🙂", "\n\ttabs\r\n", "a , b . c 's"])
def test_round_trip_of_any_text(tokenizer, text: str) -> None:
    """Decoding gives back text that the corpus never has."""
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_each_digit_is_a_token(tokenizer) -> None:
    """No token joins two digits, or a digit and a sign."""
    assert tokenizer.convert_ids_to_tokens(tokenizer("278+945").input_ids) == list("278+945")
    assert [token for token in tokenizer.get_vocab() if any(c.isdigit() for c in token) and len(token) > 1] == []


def test_wrapper_is_three_tokens(tokenizer) -> None:
    """The fixed lines of a prompt cost one token each."""
    bare = len(tokenizer("Sort.").input_ids)
    assert len(tokenizer(format_prompt("Sort.", "")).input_ids) == bare + 2
    assert len(tokenizer(format_prompt("Sort.", "4")).input_ids) == bare + 4


def test_end_of_text_and_size(tokenizer) -> None:
    """End of text is token 0 and the padding; nothing is added at the ends; the vocabulary has 600 tokens."""
    assert len(tokenizer) == 600
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    assert tokenizer("7").input_ids == [tokenizer.convert_tokens_to_ids("7")]


def test_every_loader_agrees(tokenizer, tmp_path) -> None:
    """A model folder, a folder without a model, and tokenizer.json read directly all give the same tokens."""
    tokenizer.save_pretrained(str(tmp_path))
    without_model = AutoTokenizer.from_pretrained(str(tmp_path))
    direct = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for record in generate_split("test", 100, 1):
        text = format_prompt(record["instruction"], record["input"]) + record["output"]
        ids = tokenizer(text).input_ids
        assert without_model(text).input_ids == ids
        assert direct(text).input_ids == ids


def test_shipped_tokenizer_is_reproduced(tokenizer, tmp_path) -> None:
    """Training the tokenizer again gives the shipped one."""
    save_tokenizer(train_tokenizer(), tmp_path)
    teacher_config().save_pretrained(str(tmp_path))
    again = AutoTokenizer.from_pretrained(str(tmp_path))
    assert again.get_vocab() == tokenizer.get_vocab()
    assert (tmp_path / "tokenizer.json").read_bytes() == (TEACHER_FOLDER / "tokenizer.json").read_bytes()
