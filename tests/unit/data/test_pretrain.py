import json

import numpy as np
import pytest

from openrlhf_bd.config import Config
from openrlhf_bd.data.pretrain import check_pretrain, write_pretrain_blocks
from openrlhf_bd.errors import ConfigError, DataError


@pytest.fixture
def write(tmp_path):
    def write_texts(texts, name="text.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        return path

    return write_texts


def config_of(path, **data):
    return Config.model_validate({"data": {"pretrain_dataset": str(path), **data}})


def test_blocks(write, tokenizer, tmp_path):
    """Texts are joined by the end of sequence (token 0) and cut; empty ones are skipped, the rest is left out."""
    path = tmp_path / "blocks.npy"
    # One token a digit: 1 2 3 0 4 5 0 6 7 8 9 0, then 1 2 0; blocks of 4 leave 1 2 0 over.
    num_blocks = write_pretrain_blocks(config_of(write(["123", "", "45", " \n", "6789", "12"])), tokenizer, path, 4)
    digit = {text: tokenizer(text).input_ids[0] for text in "123456789"} | {"0": 0}
    blocks = np.load(path, mmap_mode="r")
    assert num_blocks == 3
    assert blocks.dtype == np.int32
    assert blocks.tolist() == [[digit[text] for text in row] for row in ("1230", "4506", "7890")]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["blocks.npy", "blocks.npy.json", "text.jsonl"]


def test_many_texts(write, tokenizer, tmp_path):
    """The number of blocks may have many digits: the file's header still fits its content."""
    path = tmp_path / "blocks.npy"
    num_blocks = write_pretrain_blocks(config_of(write(["1"] * 6000)), tokenizer, path, 1)
    blocks = np.load(path)
    assert num_blocks == len(blocks) == 12000
    assert blocks[:, 0].tolist() == [tokenizer("1").input_ids[0], 0] * 6000


def test_text_that_spells_a_special_token(write, tokenizer, tmp_path):
    """Only the joints between texts are ends of sequence."""
    path = tmp_path / "blocks.npy"
    write_pretrain_blocks(config_of(write(["a<|endoftext|>b", "c"])), tokenizer, path, 2)
    assert (np.load(path) == 0).sum() <= 2


def test_limits(write, tokenizer, tmp_path):
    """max_blocks stops early; data.max_samples limits the records."""
    path = tmp_path / "blocks.npy"
    spec = write(["1234567"] * 4)
    assert write_pretrain_blocks(config_of(spec), tokenizer, path, 8, max_blocks=3) == 3
    assert np.load(path).shape == (3, 8)
    assert write_pretrain_blocks(config_of(spec, max_samples=2), tokenizer, path, 8) == 2


def test_reuse(write, tokenizer, tmp_path):
    """The file is used again for the same text, tokenizer and length, and written anew for any other."""
    path = tmp_path / "blocks.npy"
    spec = write(["123456789"] * 4)
    assert write_pretrain_blocks(config_of(spec), tokenizer, path, 4) == 10
    first = path.stat().st_ino
    assert write_pretrain_blocks(config_of(spec), tokenizer, path, 4) == 10
    assert path.stat().st_ino == first
    assert write_pretrain_blocks(config_of(spec), tokenizer, path, 5) == 8
    assert np.load(path).shape == (8, 5)
    write(["12345678"] * 4)
    assert write_pretrain_blocks(config_of(spec), tokenizer, path, 5) == 7
    assert np.load(path).shape == (7, 5)


def test_file_without_description_is_written_anew(write, tokenizer, tmp_path):
    """A crash between the two files leaves one that nobody trusts."""
    path = tmp_path / "blocks.npy"
    spec = write(["123456789"] * 4)
    write_pretrain_blocks(config_of(spec), tokenizer, path, 4)
    path.write_bytes(b"other")
    path.with_name("blocks.npy.json").unlink()
    assert write_pretrain_blocks(config_of(spec), tokenizer, path, 4) == 10
    assert np.load(path).shape == (10, 4)


def test_too_little_text(write, tokenizer, tmp_path):
    """Text shorter than a block is refused, and no blocks appear."""
    path = tmp_path / "blocks.npy"
    with pytest.raises(DataError, match=r"fewer tokens than one block of 100.*--data\.pretrain_dataset"):
        write_pretrain_blocks(config_of(write(["12"])), tokenizer, path, 100)
    assert not path.exists()


def test_bad_records(write, tokenizer, tmp_path):
    """A record without text is named by file and line, when the text is checked and when it is written."""
    spec = write(["1", "2"])
    spec.write_text(spec.read_text(encoding="utf-8") + '{"txt": "3"}\n{"text": 4}\n', encoding="utf-8")
    for action in (
        lambda: check_pretrain(config_of(spec), num_records=10),
        lambda: write_pretrain_blocks(config_of(spec), tokenizer, tmp_path / "blocks.npy", 4),
    ):
        with pytest.raises(DataError, match=r'text\.jsonl:3: "text" is missing.*--data\.pretrain_key txt\?'):
            action()


def test_check(write):
    """The check counts all records and reads the first ones."""
    assert check_pretrain(config_of(write(["1", "2", "3"])), num_records=2) == 3
    with pytest.raises(DataError, match="have no text"):
        check_pretrain(config_of(write(["", " "])), num_records=10)
    with pytest.raises(ConfigError, match=r"--data\.pretrain_dataset is not given"):
        check_pretrain(Config(), num_records=10)
