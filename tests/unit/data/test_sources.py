import json

import pytest

from openrlhf_bd.data.sources import load_records
from openrlhf_bd.errors import ConfigError, DataError

RECORDS = [{"instruction": f"do {i}", "output": "ü" * i} for i in range(5)]


@pytest.fixture
def files(tmp_path):
    """The same records in every format that OpenRLHF reads."""
    from datasets import Dataset, DatasetDict

    lines = [json.dumps(record, ensure_ascii=False) for record in RECORDS]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "lines.json").write_text("\n\n".join(lines) + "\n\n", encoding="utf-8")
    (tmp_path / "array.json").write_text(json.dumps(RECORDS, indent=2), encoding="utf-8")
    data = Dataset.from_list(RECORDS)
    data.to_csv(tmp_path / "a.csv")
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(tmp_path / "saved")
    DatasetDict({"train": data, "test": data.select([4])}).save_to_disk(tmp_path / "splits")
    (tmp_path / "saved" / "data-00000-of-00001.arrow").rename(tmp_path / "a.arrow")
    data.save_to_disk(tmp_path / "saved")
    folder = tmp_path / "folder"
    (folder / "dev").mkdir(parents=True)
    (folder / "train-0.jsonl").write_text("\n".join(lines[:3]), encoding="utf-8")
    (folder / "train-1.jsonl").write_text("\n".join(lines[3:]), encoding="utf-8")
    (folder / "dev" / "part.jsonl").write_text(lines[4], encoding="utf-8")
    (folder / "README.md").write_text("about", encoding="utf-8")
    return tmp_path


def load(spec, *, split="train", max_samples=10_000, probs=None):
    return load_records(str(spec), split=split, max_samples=max_samples, probs=probs, option="--data.prompt_dataset")


def values(source):
    return [record.values for record in source]


FORMATS = ["a.jsonl", "lines.json", "array.json", "a.csv", "a.parquet", "a.arrow", "saved", "splits", "folder"]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format(files, name):
    """Each format gives the same records, as often as it is read."""
    source = load(files / name)
    assert len(source) == 5
    assert values(source) == RECORDS
    assert values(source) == RECORDS


def test_splits(files):
    """A folder's split is chosen by name; a single file is its own split."""
    assert values(load(files / "splits", split="test")) == RECORDS[4:]
    assert values(load(files / "folder", split="validation")) == RECORDS[4:]
    assert values(load(files / "folder@dev", split="train")) == RECORDS[4:]
    assert values(load(files / "a.jsonl", split="test")) == RECORDS


def test_origin(files):
    """Each record knows its file and line."""
    assert [record.where for record in load(files / "a.jsonl")][3] == f"{files / 'a.jsonl'}:4"
    # Records are two lines apart there, since blank lines stand between them.
    assert [record.where for record in load(files / "lines.json")][3] == f"{files / 'lines.json'}:7"
    # Line 1 is "[", and each record has four lines: brace, two values, brace.
    assert [record.where for record in load(files / "array.json")][3] == f"{files / 'array.json'}:14"
    assert [record.where for record in load(files / "a.csv")][3] == f"{files / 'a.csv'}:5"
    assert [record.where for record in load(files / "a.parquet")][3] == f"{files / 'a.parquet'}: record 3"


def test_csv_with_line_breaks(tmp_path):
    """A quoted line break is part of a value, and later records keep their line numbers."""
    path = tmp_path / "a.csv"
    path.write_text('instruction,output\n"a\nb",1\nc,2\n', encoding="utf-8")
    records = list(load(path))
    assert [record.values["instruction"] for record in records] == ["a\nb", "c"]
    assert [record.where for record in records] == [f"{path}:2", f"{path}:4"]


def test_max_samples_counts_for_each_data_set(files):
    """The limit holds for each data set, not for their sum, as OpenRLHF's does."""
    source = load(f"{files / 'a.jsonl'}, {files / 'a.parquet'}", max_samples=2)
    assert len(source) == 4
    assert values(source) == RECORDS[:2] + RECORDS[:2]


@pytest.mark.parametrize("probs", ["0.5,0.5", "0.9,0.1", "0.2,0.8"])
def test_blend_is_that_of_datasets(tmp_path, probs):
    """With probabilities the order is what OpenRLHF's blending_datasets gives."""
    from datasets import Dataset, interleave_datasets

    sizes = {"a": 700, "b": 900}
    for name, size in sizes.items():
        lines = [json.dumps({"text": f"{name}{i}"}) for i in range(size)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    expected = interleave_datasets(
        [Dataset.from_dict({"text": [f"{name}{i}" for i in range(size)]}) for name, size in sizes.items()],
        probabilities=[float(p) for p in probs.split(",")],
        seed=42,
        stopping_strategy="all_exhausted",
    )
    source = load(",".join(str(tmp_path / f"{name}.jsonl") for name in sizes), probs=probs)
    assert len(source) == len(expected)
    assert [record["text"] for record in values(source)] == expected["text"]


def test_fingerprint(files):
    """A data set's fingerprint changes with its content and its limit, not with the file's name."""
    (files / "copy.jsonl").write_bytes((files / "a.jsonl").read_bytes())
    assert load(files / "a.jsonl").fingerprint() == load(files / "copy.jsonl").fingerprint()
    assert load(files / "a.jsonl").fingerprint() != load(files / "lines.json").fingerprint()
    assert load(files / "a.jsonl").fingerprint() != load(files / "a.jsonl", max_samples=2).fingerprint()
    both = f"{files / 'a.jsonl'},{files / 'lines.json'}"
    assert load(both).fingerprint() != load(both, probs="0.5,0.5").fingerprint()


# File name, content, and what the message must contain beside the file's name.
BAD_FILES = {
    "not JSON": ("a.jsonl", b'{"x": 1}\n{"x": \n', [":2:", "not JSON", "column"]),
    "no object": ("a.jsonl", b'{"x": 1}\n[1]\n', [":2:", "a list", "JSON object"]),
    "not UTF-8": ("a.jsonl", b'{"x": 1}\n{"x": "\xff"}\n', [":2:", "UTF-8"]),
    "deeply nested": ("a.jsonl", b'{"x": ' + b"[" * 100_000 + b"\n", [":1:", "not JSON"]),
    "array is not JSON": ("a.json", b'[{"x": 1},\n{"x" 2}]', [":2:", "not JSON"]),
    "array without comma": ("a.json", b'[{"x": 1}\n{"x": 2}]', [":1:", "comma"]),
    "array that ends early": ("a.json", b'[{"x": 1},\n', [":2:", "not JSON"]),
    "array of numbers": ("a.json", b"[1]", [":1:", "a int", "JSON object"]),
    "one object over many lines": ("a.json", b'{\n"x": 1\n}', [":1:", "one JSON object a line"]),
    "CSV with a value too many": ("a.csv", b"a,b\n1,2\n1,2,3\n", [":3:", "header line"]),
    "CSV with a value too few": ("a.csv", b"a,b\n1\n", [":2:", "header line"]),
    "no Parquet": ("a.parquet", b"PAR1 no", ["Parquet"]),
    "no Arrow": ("a.arrow", b"no", ["Arrow"]),
    "empty": ("a.jsonl", b"\n\n", ["no record", "--data.prompt_dataset"]),
    "empty array": ("a.json", b"[]", ["no record"]),
    "unknown type": ("a.txt", b"x", [".txt", ".jsonl", "--data.prompt_dataset"]),
    "script": ("a.py", b"import os", ["Python script", "never run"]),
}


@pytest.mark.parametrize(("name", "content", "parts"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_bad_file(tmp_path, name, content, parts):
    """A file that cannot be read is named, with the line and what was expected."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        list(load(path))
    assert [part for part in [str(path), *parts] if part not in str(error.value)] == []


def test_damaged_parquet(files):
    """A Parquet file whose data are damaged is named when it is read."""
    content = bytearray((files / "a.parquet").read_bytes())
    content[10:60] = b"\xff" * 50
    (files / "a.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet"):
        list(load(files / "a.parquet"))


def test_missing_file_names_the_nearest(files):
    """A mistyped path is answered with the file that is there."""
    with pytest.raises(DataError, match=r"there is no such file or folder; did you mean .*a\.jsonl"):
        load(files / "a.jsnl")
    with pytest.raises(DataError, match=r"no such file .*the folder .*nowhere. does not exist"):
        load(files / "nowhere" / "a.jsonl")


def test_folder_problems(files):
    """A folder without data, with a script, or without the split is refused with what is there."""
    (files / "empty").mkdir()
    with pytest.raises(DataError, match="no data file"):
        load(files / "empty")
    with pytest.raises(DataError, match=r'no split .test.; its files make up "validation", "train"'):
        load(files / "folder", split="test")
    with pytest.raises(DataError, match=r'no split .validation.; it has "train", "test"'):
        load(files / "splits", split="validation")
    (files / "folder" / "folder.py").write_text("import os", encoding="utf-8")
    with pytest.raises(DataError, match="Python script"):
        load(files / "folder")


def test_missing_hub_data_set(monkeypatch):
    """A name that is neither here nor on the hub is refused with both said."""
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"nobody/nothing: is no file or folder here.*hub.*--data\.prompt_dataset"):
        load("nobody/nothing")


@pytest.mark.parametrize("probs", ["0.5", "0.5,0.6", "0.5,x", "1,0", "1.5,-0.5", "nan,1"])
def test_bad_probabilities(files, probs):
    """Probabilities must be one positive number a data set, with sum 1."""
    with pytest.raises(ConfigError, match=r"--data\.prompt_probs is .*expected 2 positive numbers with sum 1"):
        load(f"{files / 'a.jsonl'},{files / 'a.csv'}", probs=probs)


def test_stray_comma(files):
    """An empty entry in the list of data sets is refused."""
    with pytest.raises(ConfigError, match="single commas"):
        load(f"{files / 'a.jsonl'},")
