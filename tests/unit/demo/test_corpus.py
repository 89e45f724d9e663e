"""The demo corpus: deterministic, split by problem, and checked by its final answer."""

import json
import re
from itertools import islice
from random import Random

import pytest

from openrlhf_bd.demo.corpus import (
    SPLIT_BUCKETS,
    as_document,
    bucket_of,
    draw_problem,
    generate_split,
    is_correct,
    iter_records,
    write_corpus,
)
from openrlhf_bd.demo.tasks import FAMILIES
from openrlhf_bd.demo.tasks.base import CLOSERS, MARKERS, final_answer

BY_NAME = {family.name: family for family in FAMILIES}

# Worked out by hand; the order of the fields is that of each family's `draw`.
WORKED = {
    # 8+5 = 13 carry 1; 7+4+1 = 12.
    "addition": ((78, 45), "123"),
    # 7+5 = 12, 12-3 = 9, 9+8 = 17.
    "totals": ((7, (5, -3, 8)), "17"),
    # Largest first out of 7 4 2 9.
    "sorting": (((7, 4, 2, 9), "down"), "9742"),
    # 23 May + 17 = 40 May = 9 Jun (May has 31).
    "dates": ((23, 4, 17), "9 Jun"),
    # bdfg -> gfdb -> fdb.
    "edits": (("bdfg", ("reverse", "drop first")), "fdb"),
    # 7*4 = 28, 28+5 = 33, 33*3 = 99.
    "units": ((7, 4, 5, 3), "99"),
    # bdfg -> bkfg (d>k) -> bmfg (k>m).
    "rewriting": (("bdfg", (("d", "k"), ("k", "m"))), "bmfg"),
    # 1 & 0 = 0; 0 | 1 = 1; 1 ^ 1 = 0; 0 | 0 = 0.
    "logic": ((1, (("&", 0), ("|", 1), ("^", 1), ("|", 0))), "0100"),
}


def test_same_seed_same_records() -> None:
    """A split is a function of its name, its size and its seed, and a longer one extends a shorter one."""
    assert generate_split("train", 50, 3) == generate_split("train", 80, 3)[:50]
    assert generate_split("train", 50, 3) == list(islice(iter_records("train", 3), 50))
    assert generate_split("train", 50, 3) != generate_split("train", 50, 4)
    assert generate_split("test", 50, 3) != generate_split("validation", 50, 3)


def test_first_record_never_changes() -> None:
    """The corpus of a seed is the same in every process and release (the shipped teacher was trained on it)."""
    assert generate_split("train", 1, 0)[0] == {
        "instruction": "What is the total of 7 +9 +2 -8?",
        "input": "",
        "output": "+9>16;\n+2>18\n-8>10. The answer is 10.",
        "family": "totals",
        "answer": "10",
    }


def test_record_has_the_promised_fields() -> None:
    """A record is JSON-able and has string fields; only `input` may be empty."""
    for record in generate_split("train", 500, 0):
        assert list(record) == ["instruction", "input", "output", "family", "answer"]
        assert all(isinstance(value, str) for value in record.values())
        assert all(record[key] for key in ("instruction", "output", "family", "answer"))
        assert json.loads(json.dumps(record)) == record


def test_every_family_appears() -> None:
    """Each of the eight families is drawn about equally often."""
    names = [record["family"] for record in generate_split("train", 1600, 0)]
    assert len(BY_NAME) == 8
    # 200 expected, standard deviation 13.2; five of them.
    assert all(134 <= names.count(name) <= 266 for name in BY_NAME)


def test_chosen_families() -> None:
    """Only the named families are drawn; an unknown name is an error that lists the known ones."""
    records = generate_split("train", 60, 0, families=("units", "sorting"))
    assert {record["family"] for record in records} == {"units", "sorting"}
    with pytest.raises(ValueError, match=r"families \['sums'\]: expected some of addition, totals"):
        generate_split("train", 1, 0, families=("sums", "units"))


def test_split_buckets_partition_the_hash() -> None:
    """Every bucket belongs to exactly one split."""
    buckets = [bucket for split in SPLIT_BUCKETS.values() for bucket in split]
    assert sorted(buckets) == list(range(20))


@pytest.mark.parametrize("name", BY_NAME)
def test_splits_share_no_problem(name: str) -> None:
    """No problem is drawn in two splits, whatever the seeds."""
    rng = Random(0)
    problems = {split: {draw_problem(BY_NAME[name], split, rng) for _ in range(300)} for split in SPLIT_BUCKETS}
    assert not problems["train"] & problems["test"]
    assert not problems["train"] & problems["validation"]
    assert not problems["validation"] & problems["test"]
    for split, drawn in problems.items():
        assert all(bucket_of(name, problem) in SPLIT_BUCKETS[split] for problem in drawn)


def test_bucket_is_stable() -> None:
    """A problem's bucket does not depend on the process (Python's own hash would)."""
    assert bucket_of("addition", (78, 45)) == 8


def test_unknown_split_is_refused() -> None:
    """A wrong split name is an error that lists the right ones."""
    with pytest.raises(ValueError, match="'dev': expected one of test, validation, train"):
        generate_split("dev", 1, 0)


@pytest.mark.parametrize("name", BY_NAME)
def test_worked_example(name: str) -> None:
    """Each family's answer is the one worked out by hand, in every phrasing and style."""
    problem, answer = WORKED[name]
    drafts = [BY_NAME[name].write(problem, Random(seed)) for seed in range(200)]
    assert {draft.answer for draft in drafts} == {answer}
    assert len({(draft.instruction, draft.input) for draft in drafts}) >= 4
    assert len({draft.output for draft in drafts}) > 50
    for draft in drafts:
        assert is_correct({"answer": answer}, draft.output)


# What the steps of a worked example show, as its style leaves them: the numbers after "=" or ">", or the lists.
STEPS = {
    "addition": (r"=(\d+)", ["13", "12"]),
    "totals": (r"[=>](\d+)", ["12", "9", "17"]),
    "sorting": (r"(?m)(\d+)(?=[;\n.]|$| then)", ["742", "42", "2"]),
    "dates": (r"[+-]\d+=(\d+)", ["40", "9"]),
    "units": (r"[*x+]\d=(\d+)", ["28", "33", "99"]),
    "logic": (r"[&|^]\d=(\d)", ["0", "1", "0", "0"]),
    "edits": (r"\b[a-z](?: [a-z])+\b", ["g f d b", "f d b"]),
    "rewriting": (r"\b[a-z](?: [a-z])+\b", ["b k f g", "b m f g"]),
}


@pytest.mark.parametrize("name", BY_NAME)
def test_worked_steps(name: str) -> None:
    """The steps lead to the answer one by one, with the intermediate results worked out above."""
    pattern, expected = STEPS[name]
    for seed in range(30):
        output = BY_NAME[name].write(WORKED[name][0], Random(seed)).output
        assert re.findall(pattern, output)[: len(expected)] == expected


def test_february_has_28_days() -> None:
    """A jump over the end of February: 20+12 = 32, 32-28 = 4."""
    draft = BY_NAME["dates"].write((20, 1, 12), Random(0))
    assert draft.answer == "4 Mar"


@pytest.mark.parametrize("split", SPLIT_BUCKETS)
def test_checker_accepts_every_gold_output(split: str) -> None:
    """The checker accepts each generated output, with or without white space at its end."""
    for record in generate_split(split, 1500, 11):
        assert is_correct(record, record["output"])
        assert is_correct(record, record["output"] + "\n")


def test_checker_rejects_a_wrong_final_answer() -> None:
    """One other character in the final answer, a missing one, or one more, is wrong even if the steps are right."""
    for record in generate_split("test", 800, 12):
        start = max(record["output"].rfind(marker) + len(marker) for marker in MARKERS if marker in record["output"])
        steps, answer = record["output"][:start], record["answer"]
        other = "1" if answer[0] != "1" else "2"
        for wrong in (other + answer[1:], answer[1:], answer + "3", ""):
            assert not is_correct(record, f"{steps} {wrong}")


def test_checker_needs_a_marker_and_reads_the_last() -> None:
    """Without a marked answer a response is wrong; the last marker counts; nothing may follow the answer."""
    record = {"answer": "12"}
    assert not is_correct(record, "5+7=12")
    assert not is_correct(record, "")
    assert is_correct(record, "Answer: 13\nAnswer: 12")
    assert not is_correct(record, "Answer: 12\nAnswer: 13")
    assert not is_correct(record, "Answer: 12; 5+7=12")


def test_every_closing_has_a_marker() -> None:
    """Each closing of the corpus is read back by the checker."""
    assert [final_answer("x" + closer.format("4, 2")) for closer in CLOSERS] == ["42"] * 4


def test_written_corpus(tmp_path) -> None:
    """The files hold the splits, and the pre-training text is the training records and nothing else."""
    paths = write_corpus(tmp_path, num_train=40, num_validation=20, num_test=30, seed=5)
    rows = {name: [json.loads(line) for line in path.read_text("utf-8").splitlines()] for name, path in paths.items()}
    sizes = {name: len(values) for name, values in rows.items()}
    assert sizes == {"train": 40, "validation": 20, "test": 30, "pretrain": 40}
    assert rows["train"] == generate_split("train", 40, 5)
    assert rows["pretrain"] == [{"text": as_document(record)} for record in rows["train"]]
