from pathlib import Path

import pytest

import openrlhf_bd.demo


@pytest.fixture(scope="session")
def tokenizer():
    """The demo's byte-level tokenizer: one token for each digit, `<|endoftext|>` is token 0."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(Path(openrlhf_bd.demo.__file__).parent / "teacher")
