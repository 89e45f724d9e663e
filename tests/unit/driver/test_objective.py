"""The objective's options beside what a run has: refusals and the warning, before anything starts."""

from pathlib import Path

import numpy as np
import pytest

from openrlhf_bd.algorithms import resolve_algorithm
from openrlhf_bd.config import Config
from openrlhf_bd.driver.objective import (
    check_kd_ratio,
    check_online,
    incomplete_sets,
    trained_temperature,
    unheld_logits,
)
from openrlhf_bd.errors import ConfigError
from openrlhf_bd.records import RecordedSets, Rollout
from openrlhf_bd.store import StoreManifest, StoreWriter


def config_of(tmp_path: Path, *, teacher: str | None = "teacher", text: str | None = None, **distill: object) -> Config:
    return Config.model_validate(
        {
            "algo": {"distill": distill},
            "teacher": {"model_name_or_path": teacher},
            "data": {"pretrain_dataset": text},
            "ckpt": {"output_dir": str(tmp_path)},
        }
    )


def warning_of(config: Config) -> str | None:
    return unheld_logits(config, resolve_algorithm(config.algo.distill.name).needs_of(config.algo.distill))


def write_store(path: Path, sizes: list[int], *, mass: float = 1.0, max_candidates: int | None = None) -> None:
    """An unfinished store of one row with sets of these sizes, each of the same mass."""
    manifest = StoreManifest(kind="teacher", top_p=0.8, num_prompts=2, max_candidates=max_candidates)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    ids = np.arange(offsets[-1], dtype=np.int32)
    sets = RecordedSets(ids, offsets, np.full(len(sizes), -np.log(mass), np.float32), None)
    tokens = np.ones(len(sizes), np.int32)
    with StoreWriter(path, manifest) as writer:
        writer.append([Rollout("p:0", tokens, tokens, "stop", None, sets)])
        writer.suspend()


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_presets_without_tail_and_text_are_warned_of(tmp_path: Path, preset: str) -> None:
    """Nothing holds the logits outside the sets; the share of one-token sets is told where the store exists."""
    config = config_of(tmp_path, preset=preset)
    warning = warning_of(config)
    assert warning is not None
    assert warning.startswith("nothing holds the logits outside the candidate sets")
    assert "--data.pretrain_dataset, or --algo.distill.tail_coef 1" in warning
    assert "single token" not in warning
    write_store(tmp_path / "teacher_data", [1, 4, 1, 1, 2, 1, 1, 3])
    warning = warning_of(config)
    assert warning is not None
    assert f"With the rows of {tmp_path / 'teacher_data'}, 62.5% of the sets are a single token" in warning


def test_what_holds_the_logits_takes_the_warning_away(tmp_path: Path) -> None:
    """A tail term, pre-training text that counts, no mask, or an algorithm whose loss sees all logits."""
    for distill in (
        {"preset": "robust"},
        {"preset": "paper", "tail_coef": 0.5},
        {"preset": "paper", "top_p": 1.0},
        {"name": "kd", "preset": "paper"},
        {"name": "seqkd", "preset": "paper"},
    ):
        assert warning_of(config_of(tmp_path, **distill)) is None
    assert warning_of(config_of(tmp_path, preset="paper", text="text.jsonl")) is None
    assert warning_of(config_of(tmp_path, preset="paper", text="text.jsonl", pretrain_coef=0.0)) is not None


def test_kd_ratio_needs_a_teacher_and_text(tmp_path: Path) -> None:
    """A share of the teacher in J_PT without either is refused with what to give."""
    check_kd_ratio(config_of(tmp_path, kd_ratio=0.5, text="text.jsonl"))
    check_kd_ratio(config_of(tmp_path, kd_ratio=0.0, teacher=None))
    with pytest.raises(ConfigError, match=r"kd_ratio 0\.5 .*--teacher\.model_name_or_path is not given"):
        check_kd_ratio(config_of(tmp_path, kd_ratio=0.5, teacher=None, text="text.jsonl"))
    for given in ({"text": None}, {"text": "text.jsonl", "pretrain_coef": 0.0}):
        with pytest.raises(ConfigError, match=r"give --data\.pretrain_dataset"):
            check_kd_ratio(config_of(tmp_path, kd_ratio=0.5, **given))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "tau", "warned"), [("bd", 2.0, True), ("kd", 0.5, True), ("rkl", 2.0, True), ("bd", 1.0, False)]
)
def test_temperature_of_the_trained_policy_is_told(name: str, tau: float, warned: bool) -> None:
    """Where z / tau is trained, the plan says at which temperature the saved student gives that policy."""
    config = Config.model_validate({"algo": {"distill": {"name": name, "tau": tau}}})
    needs = resolve_algorithm(name).needs_of(config.algo.distill)
    warning = trained_temperature(config, needs)
    assert (warning is not None) == warned
    if warning is not None:
        assert f"samples from at temperature {tau:g};" in warning


def test_incomplete_sets_are_told_before_training(tmp_path: Path) -> None:
    """Of four sets two have all K = 3 tokens and a mass below p; a run at a smaller p needs no warning."""
    needs = resolve_algorithm("bd").needs_of(config_of(tmp_path).algo.distill)
    assert incomplete_sets(config_of(tmp_path, top_p=0.8), needs) is None
    write_store(tmp_path / "teacher_data", [3, 1, 3, 2], mass=0.7, max_candidates=3)
    warning = incomplete_sets(config_of(tmp_path, top_p=0.8), needs)
    assert warning is not None
    assert warning.startswith("50.0% of the candidate sets")
    assert "the 3 likeliest tokens hold less than --algo.distill.top_p 0.8" in warning
    assert incomplete_sets(config_of(tmp_path, top_p=0.7), needs) is None


def refusal_of(config: Config) -> None:
    check_online(config, resolve_algorithm(config.algo.distill.name).needs_of(config.algo.distill))


def test_tokens_of_a_server_cannot_be_mixed_in(tmp_path: Path) -> None:
    """Teacher-mixed sampling asks the teacher's engines for tokens; a server's clients give whole rows alone."""
    config = config_of(tmp_path, teacher=None, name="minillm", mode="online", teacher_mix=0.2)
    refusal_of(config)
    served = config.teacher.model_copy(update={"api_base": "http://host/v1"})
    with pytest.raises(ConfigError, match=r"teacher_mix 0\.2 .*--teacher\.api_base http://host/v1 names a server"):
        refusal_of(config.model_copy(update={"teacher": served}))


def test_offline_steps_need_rows_that_the_algorithm_learns_from(tmp_path: Path) -> None:
    """Before minillm's online steps the teacher's own responses are of no use; bd takes them."""
    refusal_of(config_of(tmp_path, mode="offline_then_online"))
    with pytest.raises(ConfigError, match=r"learns from the student's own responses, which .*teacher_data does not"):
        refusal_of(config_of(tmp_path, name="minillm", mode="offline_then_online"))
