"""Online jobs from the command line: rows made while the student trains, and what they leave behind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from timelines import check_timeline
from tiny_job import job_flags, run_job, write_inputs
from transformers import AutoModelForCausalLM

from openrlhf_bd.engines.spans import MERGE_GAP_S
from openrlhf_bd.evaluation.timeline import RANKS, STUDENT, read_timeline
from openrlhf_bd.evaluation.utilisation import utilisation
from openrlhf_bd.records import Rollout
from openrlhf_bd.store import StoreReader

pytestmark = pytest.mark.integration

BATCH, STEPS = 12, 6
ONLINE = {
    "algo__distill__mode": "online",
    "train__max_steps": str(STEPS),
    "train__max_epochs": "2",
    "train__batch_size": str(BATCH),
    "eval__test_datasets": "",
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


def run(inputs: Path, name: str, **changes: str) -> Path:
    folder = inputs / name
    done = run_job(*job_flags(inputs, folder, **changes))
    assert done.returncode == 0, done.stdout
    return folder


@pytest.fixture(scope="module")
def mixed_run(inputs: Path) -> Path:
    """Half of the rows from the student, whose weights are kept after every step."""
    return run(inputs, "mixed", **ONLINE, ckpt__save_steps="1", ckpt__save_hf="true", ckpt__max_num="9")


def training_records(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if "train/loss" in record]


def rows_of(folder: Path) -> list[Rollout]:
    reader = StoreReader(folder / "rollouts")
    return reader.rollouts(range(len(reader)))


def test_every_planned_row_is_made_once_and_in_its_step(mixed_run: Path) -> None:
    """Two samples of 24 prompts in the first epoch of four steps, then new ones; 12 rows a step, from both sources."""
    rows = rows_of(mixed_run)
    by_step = {step: [row for row in rows if row.origin and row.origin.step == step] for step in range(1, STEPS + 1)}
    assert [len(by_step[step]) for step in range(1, STEPS + 1)] == [BATCH] * STEPS
    first_epoch = {row.row_id for step in range(1, 5) for row in by_step[step]}
    assert first_epoch == {f"{prompt:08d}:{sample}" for prompt in range(24) for sample in range(2)}
    assert {row.row_id.rpartition(":")[2] for step in (5, 6) for row in by_step[step]} <= {"2", "3"}
    sources = [row.origin.source for row in rows if row.origin]
    assert 0.2 < sources.count("student") / len(sources) < 0.8
    for row in rows:
        assert row.sets is not None
        assert row.sets.num_states - len(row.response_ids) == (row.finish_reason == "length")


def test_no_row_is_staler_than_allowed(mixed_run: Path) -> None:
    """With max_staleness 1 a row of step t began with the weights of step t - 1 or t - 2; metrics say the same."""
    staleness: dict[int, list[int]] = {}
    for row in rows_of(mixed_run):
        assert row.origin is not None
        if row.origin.source == "student":
            assert row.origin.policy_version is not None
            staleness.setdefault(row.origin.step, []).append(row.origin.step - 1 - row.origin.policy_version)
        else:
            assert row.origin.policy_version is None
    assert all(0 <= value <= 1 for values in staleness.values() for value in values)
    for record in training_records(mixed_run):
        expected = staleness[int(record["step"])]
        assert record["train/staleness"] == pytest.approx(np.mean(expected))
        assert record["train/staleness_max"] == max(expected)
        assert record["train/student_rows"] == pytest.approx(len(expected) / BATCH)
        assert {"train/time_rollout_wait_s", "train/time_back_pressure_s", "train/time_scoring_s"} <= record.keys()
        # Nobody samples after the last step.
        assert ("train/sync_s" in record) == (record["step"] < STEPS)


def test_who_worked_while_the_student_trained(mixed_run: Path) -> None:
    """Both engines work beside the ranks; weights reach the engine within the driver's own time for it."""
    timeline = check_timeline(mixed_run, {"teacher engine 0", "student engine 0", "student ranks", "driver"})
    assert {span.activity for span in timeline.of("teacher engine 0")} == {"start", "generate", "score"}
    assert {span.activity for span in timeline.of("student engine 0")} == {"start", "generate", "sync"}
    synced = {span.step: span for span in timeline.of("driver", "sync") if span.step is not None}
    records = {int(record["step"]): record for record in training_records(mixed_run)}
    assert list(synced) == [step for step in records if "train/sync_s" in records[step]]
    for step, span in synced.items():
        assert span.end_s - span.start_s >= records[step]["train/sync_s"] - 0.001
        for lane in ("student engine 0", "student ranks"):
            [own] = [s for s in timeline.of(lane, "sync") if span.start_s <= s.start_s < span.end_s]
            assert own.end_s <= span.end_s + 0.001
    waited = [span.end_s - span.start_s for span in timeline.of("driver", "wait")]
    recorded = [record["train/time_rollout_wait_s"] for record in records.values()]
    assert waited == pytest.approx(recorded, abs=0.01)
    [phase] = utilisation(timeline)
    for use in phase.lanes:
        assert use.working_s > 0
        assert use.total_s == pytest.approx(phase.seconds)
        assert sum(use.waited_for.values()) == pytest.approx(use.waiting_s)


def response_logprobs(folder: Path, row: Rollout) -> NDArray[np.float32]:
    """What transformers says of a response under the weights in a folder."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.from_numpy(np.concatenate([row.prompt_ids, row.response_ids]).astype(np.int64))[None]
    with torch.no_grad():
        logprobs = model(tokens).logits[0].log_softmax(-1)
    states = torch.arange(len(row.prompt_ids) - 1, tokens.shape[1] - 1)
    return logprobs[states, tokens[0, states + 1]].numpy()


def test_rows_come_from_the_weights_that_they_name(inputs: Path, mixed_run: Path) -> None:
    """Behaviour log-probabilities equal those of the student saved after that many steps, to 1e-4."""
    student = [row for row in rows_of(mixed_run) if row.origin and row.origin.source == "student"]
    versions = set()
    for row in student[::3]:
        assert row.origin is not None
        version = row.origin.policy_version
        weights = inputs / "student" if version == 0 else mixed_run / "checkpoints" / f"global_step{version}_hf"
        np.testing.assert_allclose(row.origin.behaviour_logprobs_T, response_logprobs(weights, row), atol=1e-4)
        versions.add(version)
    assert len(versions) > 2


def test_offline_run_over_the_rows_repeats_every_loss(inputs: Path, mixed_run: Path) -> None:
    """With the recorded order losses, gradient norms and the final weights are the same to the last bit."""
    again = run(
        inputs,
        "again",
        train__row_order="recorded",
        train__max_steps=str(STEPS),
        teacher__store_path=str(mixed_run / "rollouts"),
        eval__test_datasets="",
    )
    online, offline = training_records(mixed_run), training_records(again)
    assert len(online) == STEPS
    for name in ("train/loss", "train/actor_grad_norm", "train/td_loss"):
        assert [record[name] for record in online] == [record[name] for record in offline]
    first, second = (AutoModelForCausalLM.from_pretrained(folder) for folder in (mixed_run, again))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_offline_rows_first_then_strictly_on_policy(inputs: Path) -> None:
    """Two steps from a finished store, then four on rows of the newest student alone, whose engine shares a GPU.

    The teacher samples three tenths of their tokens: behaviour log-probabilities are those of the mixture.
    """
    options = ONLINE | {
        "algo__distill__mode": "offline_then_online",
        "algo__distill__offline_steps": "2",
        "algo__distill__rollout": "student",
        "algo__distill__max_staleness": "0",
        "algo__distill__stale_rows": "discard",
        "algo__distill__in_flight": "abort",
        "algo__distill__teacher_mix": "0.3",
        "train__colocate_all": "true",
        "ckpt__save_steps": "1",
        "ckpt__save_hf": "true",
        "ckpt__max_num": "9",
        "eval__dataset": "",
    }
    folder = run(inputs, "warm", **options)
    rows = rows_of(folder)
    assert {row.origin.step for row in rows if row.origin} == {3, 4, 5, 6}
    assert all(row.origin and row.origin.policy_version == row.origin.step - 1 for row in rows)
    records = training_records(folder)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert all(record.get("train/staleness_max", 0) == 0 for record in records)
    # Rows of later steps were begun at once, with weights that were too old when their turn came.
    assert sum(record.get("train/discarded_rows", 0) for record in records) > 0
    for row in rows[::6]:
        assert row.origin is not None
        assert row.logprobs_T is not None
        student_T = response_logprobs(folder / "checkpoints" / f"global_step{row.origin.policy_version}_hf", row)
        expected_T = np.logaddexp(np.log(0.3) + row.logprobs_T, np.log(0.7) + student_T)
        np.testing.assert_allclose(row.origin.behaviour_logprobs_T, expected_T, atol=1e-4)

    # The same command looks at both stores first.
    shard = folder / "rollouts" / "shard-00001.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    again = run_job(*job_flags(inputs, folder, **options))
    assert again.returncode == 74, again.stdout
    assert f"{shard}: its content is not what was sealed ({BATCH} rows: " in again.stdout


def test_engines_rest_while_references_are_read(inputs: Path) -> None:
    """On the ranks' GPUs no row is sampled while the ranks compute the validation loss, as while they train."""
    references = (inputs / "corpus" / "validation.jsonl").read_text(encoding="utf-8")
    (inputs / "many.jsonl").write_text(references * 40, encoding="utf-8")
    options = ONLINE | {
        "algo__distill__rollout": "student",
        "algo__distill__max_staleness": "1",
        "train__colocate_all": "true",
        "train__max_steps": "5",
        "eval__dataset": str(inputs / "many.jsonl"),
        "eval__steps": "1",
        "ckpt__best_metric_key": "loss",
    }
    timeline = read_timeline(run(inputs, "beside", **options))
    assert timeline is not None
    assert len(timeline.of(RANKS, "validate")) == 5
    sampling = [span for lane in timeline.lanes if lane.startswith(STUDENT) for span in timeline.of(lane, "generate")]
    assert sampling
    for ranks in timeline.of(RANKS, "train", "validate"):
        for engine in sampling:
            # Calls of an engine that are nearer to each other than this are one span.
            assert min(ranks.end_s, engine.end_s) - max(ranks.start_s, engine.start_s) < MERGE_GAP_S
