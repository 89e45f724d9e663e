"""From a sample to a whole job, by numbers that are worked out by hand."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from openrlhf_bd.driver.disk import DiskUse
from openrlhf_bd.driver.estimate import Amount, Call, Sample, Written, estimate, fit_step_time, mean_of
from openrlhf_bd.driver.measure import spread
from openrlhf_bd.driver.measured import MeasuredPlan, format_duration
from openrlhf_bd.driver.plan import Plan
from openrlhf_bd.errors import ConfigError
from openrlhf_bd.paths import format_bytes
from openrlhf_bd.records import Prompt
from openrlhf_bd.store import StoreReader, StoreWriter, summary
from tests.unit.store.rows import teacher_manifest, teacher_row


@pytest.fixture
def sample(tmp_path: Path) -> Sample:
    """Four rows of 4, 8, 8 and 12 tokens, one candidate at each, of 100, 200, 200 and 300 bytes."""
    lengths = [4, 8, 8, 12]
    with StoreWriter(tmp_path / "store", teacher_manifest(num_prompts=4, n_samples_per_prompt=1)) as writer:
        writer.append([teacher_row(i, sizes=[1] * length, num_tokens=length) for i, length in enumerate(lengths)])
    return Sample(
        lengths_N=np.array(lengths),
        raw_bytes_N=np.array([100, 200, 200, 300]),
        # Half a byte for each byte of the arrays, and 1,000 bytes for the shard.
        written=(Written(300, 1150), Written(800, 1400)),
        # 0.5 s a step and 0.25 s a token: 0.5 * 8 + 0.25 * 8 and 0.5 * 12 + 0.25 * 24.
        calls=(Call(1, 8, 8, 6.0), Call(3, 24, 12, 12.0)),
        summary=summary(StoreReader(tmp_path / "store")),
        start_s=10.0,
        engine_bytes=1_000_000_000,
        cache_bytes=500_000_000,
    )


def test_mean_and_its_range() -> None:
    """The range is two standard errors: 4, 8, 8, 12 have variance 32 / 3, so a standard error of sqrt(8 / 3)."""
    error = (8 / 3) ** 0.5
    found = mean_of(np.array([4, 8, 8, 12]))
    assert (found.value, found.low, found.high) == pytest.approx((8, 8 - 2 * error, 8 + 2 * error))
    assert mean_of(np.array([0, 0, 0, 8])).low == 0.0


def test_time_of_steps_and_tokens() -> None:
    """Two calls give the time of a step and of a token; neither is ever negative."""
    assert fit_step_time([Call(1, 8, 8, 6.0), Call(3, 24, 12, 12.0)]) == pytest.approx((0.5, 0.25))
    # Tokens alone: 1 s each would take 8 and 24 s; a longer call that is no slower a token leaves nothing for steps.
    assert fit_step_time([Call(1, 8, 8, 8.0), Call(3, 24, 12, 30.0)]) == (0.0, pytest.approx((64 + 720) / (64 + 576)))
    # Steps alone: the second call has three times the tokens, and takes less than its steps would.
    assert fit_step_time([Call(1, 8, 8, 8.0), Call(3, 24, 12, 6.0)]) == (pytest.approx((64 + 72) / (64 + 144)), 0.0)


def test_whole_job(sample: Sample) -> None:
    """Tokens, bytes and time of 100 rows from a sample of four."""
    found = estimate(sample, num_rows=100, num_engines=2, max_num_seqs=8, rows_per_shard=20)
    assert found.response_tokens.value == 800
    # 200 bytes a row, compressed to half, 100 rows; 5 shards of one row group, 1,000 bytes each.
    assert found.store_bytes.value == pytest.approx(100 * 200 * 0.5 + 5 * 1000)
    # The range is of the rows alone: bytes have a standard error of sqrt(20000 / 3) / 2 a row.
    error = (20_000 / 3) ** 0.5 / 2
    assert found.store_bytes.high == pytest.approx(100 * (200 + 2 * error) * 0.5 + 5 * 1000)
    # Batches of 4 rows (100 rows in 32 batches): 12 steps of 0.5 s and 32 tokens of 0.25 s, 14 s for 32 tokens.
    assert found.at_once == 4
    assert found.tokens_per_s == pytest.approx(32 / 14)
    assert found.engine_s.value == pytest.approx(800 * 14 / 32)
    # The sample itself had 24 tokens in 12 s.
    assert found.engine_s.high == pytest.approx(found.response_tokens.high * 12 / 24)


def test_more_rows_than_are_decoded_at_once(sample: Sample) -> None:
    """A batch of four times the rows decoded at once takes four times the steps, and the end of the longest."""
    found = estimate(sample, num_rows=10_000, num_engines=1, max_num_seqs=8, rows_per_shard=10_000)
    # 32 rows, 8 at once: 4 * 8 steps, and 4 for the longest; 256 tokens.
    assert found.at_once == 8
    assert found.tokens_per_s == pytest.approx(256 / (36 * 0.5 + 256 * 0.25))


def measured(sample: Sample, folder: Path, *, teachers: tuple[str, ...] = ("default",)) -> MeasuredPlan:
    disk = (
        DiskUse("checkpoints and students", 7_000, "at most", folder),
        DiskUse("teacher's data", 1, "assumed", folder / "rows"),
    )
    plan = Plan(stages=(), data_sets=(), tables={}, models={}, notes=(), warnings=(), disk=disk)
    found = estimate(sample, num_rows=100, num_engines=2, max_num_seqs=8, rows_per_shard=20)
    return MeasuredPlan(plan, dict.fromkeys(teachers, found), num_engines=2, rank_bytes=None, driver_bytes=1)


def test_measured_plan_can_be_printed(sample: Sample, tmp_path: Path) -> None:
    """The table has tokens, bytes, disk, engine hours, wall time and memory, with ranges."""
    console = Console(file=io.StringIO(), width=140)
    console.print(measured(sample, tmp_path))
    lines = console.file.getvalue().splitlines()

    def cells(name: str) -> list[str]:
        (line,) = [line for line in lines if line.startswith(f"│ {name}")]
        return [cell.strip() for cell in line.strip("│").split("│")]

    assert cells("response tokens")[1:3] == ["800", "473 - 1,127"]
    assert cells("bytes a token")[1] == "18.8"
    assert cells("disk: teacher's data")[1:] == ["15 kB", "11 kB - 19 kB", "measured"]
    assert cells("disk: checkpoints")[1] == "7.0 kB"
    # 800 * 14 / 32 = 350 s of work, and two starts of 10 s.
    assert cells("engine hours")[1] == "0.1"
    assert cells("generation, wall time")[1] == "3.1 min"
    assert cells("memory: a teacher engine")[1:3] == ["1.0 GB", "up to 1.5 GB"]


def test_room_on_the_disk(sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What certainly does not fit is refused, what may not is warned of; both name what to do or what is lacking."""
    room = measured(sample, tmp_path)
    assert room.require_room() is None
    # 7,000 bytes of students; rows take 15,000, from 10,918 to 19,082.
    monkeypatch.setattr("openrlhf_bd.driver.disk.free_bytes", lambda path: 20_000)
    assert "26 kB, the upper end of the range" in str(room.require_room())
    monkeypatch.setattr("openrlhf_bd.driver.disk.free_bytes", lambda path: 17_000)
    with pytest.raises(ConfigError, match=r"17 kB are free there, .* at least 18 kB; .*--teacher\.store_path"):
        room.require_room()


def test_several_teachers_add_up(sample: Sample, tmp_path: Path) -> None:
    """Disk space is that of all teachers."""
    console = Console(file=io.StringIO(), width=140)
    console.print(measured(sample, tmp_path, teachers=("t0", "t1")))
    text = console.file.getvalue()
    assert "teacher t0" in text
    assert "teacher t1" in text
    assert "30 kB" in text


def test_sample_has_prompts_of_every_length() -> None:
    """One prompt of each part of the lengths; the same seed draws the same ones."""
    prompts = [Prompt(str(i), np.zeros(1 + (7 * i) % 40, np.int32), {}) for i in range(40)]
    drawn = spread(prompts, 8, seed=1)
    # 40 lengths, 1 to 40, each once: five to a part.
    assert sorted((len(prompt.token_ids) - 1) // 5 for prompt in drawn) == list(range(8))
    assert [prompt.prompt_id for prompt in spread(prompts, 8, seed=1)] == [prompt.prompt_id for prompt in drawn]
    assert len(spread(prompts[:3], 8, seed=1)) == 3


def test_amounts() -> None:
    """Ends of ranges add up and scale with their values."""
    assert (Amount(2, 1, 3) + Amount(10, 5, 20)).times(2) == Amount(24, 12, 46)


@pytest.mark.parametrize(("count", "shown"), [(999, "999 B"), (1200, "1.2 kB"), (15_000, "15 kB"), (2.5e12, "2.5 TB")])
def test_bytes_in_words(count: float, shown: str) -> None:
    """Two digits at least, and the unit that fits."""
    assert format_bytes(count) == shown


@pytest.mark.parametrize(("seconds", "shown"), [(59, "59 s"), (90, "1.5 min"), (7200, "2.0 h"), (172_800, "2.0 d")])
def test_durations_in_words(seconds: float, shown: str) -> None:
    """The largest unit of which there is one."""
    assert format_duration(seconds) == shown
