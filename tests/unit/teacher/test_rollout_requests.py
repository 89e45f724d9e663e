"""`teacher.generate`: which rows a job asks for, with which seeds and limits, in which batches."""

from dataclasses import replace

import numpy as np
import pytest

from openrlhf_bd.config import Config
from openrlhf_bd.errors import DataError
from openrlhf_bd.records import Prompt
from openrlhf_bd.teacher.generate import batch_rows
from openrlhf_bd.teacher.requests import rollout_requests, row_seed


def prompt(prompt_id: str, num_tokens: int) -> Prompt:
    return Prompt(prompt_id, np.arange(num_tokens, dtype=np.int32), {})


def config(*, n_samples: int = 1, max_len: int = 10, max_new_tokens: int | None = None) -> Config:
    return Config.model_validate(
        {
            "rollout": {"n_samples_per_prompt": n_samples, "max_new_tokens": max_new_tokens},
            "data": {"max_len": max_len},
        }
    )


def test_every_sample_of_every_prompt_is_one_row() -> None:
    """Row ids are "<prompt_id>:<sample>", samples of a prompt side by side; completed rows are left out."""
    requests = rollout_requests([prompt("a", 2), prompt("b", 2)], config=config(n_samples=2), completed={"a:1"})
    assert [request.row_id for request in requests] == ["a:0", "b:0", "b:1"]


def test_response_may_fill_what_the_prompt_leaves() -> None:
    """max_new_tokens is the room below data.max_len, or rollout.max_new_tokens where that is less."""
    prompts = [prompt("a", 2), prompt("b", 9)]
    assert [request.max_new_tokens for request in rollout_requests(prompts, config=config())] == [8, 1]
    limited = rollout_requests(prompts, config=config(max_new_tokens=3))
    assert [request.max_new_tokens for request in limited] == [3, 1]


def test_prompt_that_leaves_no_room_is_named() -> None:
    """A prompt of data.max_len tokens raises an error that names it."""
    with pytest.raises(DataError, match=r"prompt b: found 10 tokens"):
        list(rollout_requests([prompt("a", 1), prompt("b", 10)], config=config()))


def test_seed_of_a_row_depends_on_run_and_row_alone() -> None:
    """Seeds are stable, differ between rows and between runs, and fit a signed 64-bit integer."""
    # BLAKE2b of "42:a:0" with 8 bytes, big-endian, shifted right by one; a run that is resumed relies on it.
    assert row_seed(42, "a:0") == 2_038_631_280_613_112_363
    seeds = {row_seed(seed, f"{name}:{sample}") for seed in (1, 2) for name in "abc" for sample in range(10)}
    assert len(seeds) == 60
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("num_rows", "num_engines", "expected"),
    [
        (1000, 1, 64),  # 1000 / 16 = 63 batches' worth, but at least 256 / 4
        (16_000, 2, 500),  # 16000 / 32
        (10**6, 2, 1024),  # at most 4 * 256
        (1, 1, 64),
    ],
)
def test_batches_are_small_enough_to_commit_often_and_large_enough_to_fill_an_engine(
    num_rows: int, num_engines: int, expected: int
) -> None:
    """A batch is a sixteenth of an engine's share, between max_num_seqs / 4 and 4 max_num_seqs."""
    assert batch_rows(num_rows, num_engines=num_engines, max_num_seqs=256) == expected


def test_teacher_s_prompt_travels_with_the_request_and_takes_room() -> None:
    """The engine gets the teacher's prompt, the row keeps the student's; a response fits beside both."""
    seen = np.arange(100, 112, dtype=np.int32)
    asked = replace(prompt("a", 2), teacher_ids=seen, teacher="sums")
    wide = Config.model_validate({"data": {"max_len": 10}, "teacher": {"max_len": 15}})
    (request,) = rollout_requests([asked], config=wide)
    np.testing.assert_array_equal(request.seen_by_teacher, seen)
    np.testing.assert_array_equal(request.prompt_ids, asked.token_ids)
    assert request.teacher == "sums"
    # min(10 - 2, 15 - 12)
    assert request.max_new_tokens == 3
    (plain,) = rollout_requests([prompt("a", 2)], config=wide)
    np.testing.assert_array_equal(plain.seen_by_teacher, plain.prompt_ids)
    assert plain.max_new_tokens == 8


def test_teacher_s_prompt_that_leaves_no_room_is_named() -> None:
    """A prompt that fills teacher.max_len raises an error that names it and the option."""
    asked = replace(prompt("a", 2), teacher_ids=np.arange(10, dtype=np.int32))
    with pytest.raises(DataError, match=r"prompt a: found 10 tokens as the teacher sees it.*--teacher\.max_len 10"):
        list(rollout_requests([asked], config=config()))
