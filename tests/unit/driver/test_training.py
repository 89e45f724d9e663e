from __future__ import annotations

from pathlib import Path

import pytest

from openrlhf_bd.config import Config
from openrlhf_bd.driver.metrics import Stopwatch, truncate_metrics, wall_clock_rates
from openrlhf_bd.driver.schedule import Schedule, shuffled_schedule
from openrlhf_bd.driver.selection import Selection, Snapshots
from openrlhf_bd.driver.training import check_start, is_checkpoint_step
from openrlhf_bd.errors import ConfigError


@pytest.mark.parametrize(
    ("batch_size", "max_epochs", "max_steps", "expected"),
    [
        # 10 rows in batches of 4: 4 + 4 + 2
        (4, 1, None, (3, 3)),
        (4, 2, None, (6, 3)),
        (4, 2, 5, (5, 3)),
        (4, 2, 50, (6, 3)),
        (16, 1, None, (1, 1)),
    ],
)
def test_number_of_steps(batch_size: int, max_epochs: int, max_steps: int | None, expected: tuple[int, int]) -> None:
    """Steps of all epochs, the last partial batch counted, at most --train.max_steps."""
    train = {"batch_size": batch_size, "max_epochs": max_epochs, "max_steps": max_steps}
    assert shuffled_schedule(Config.model_validate({"train": train}), 10) == Schedule(*expected)


@pytest.mark.parametrize(
    ("ckpt", "steps"),
    [
        ({}, []),
        ({"save_hf": True}, []),
        ({"save_steps": 2}, [2, 4]),
        ({"save_steps": 2, "disable_ds": True}, []),
        ({"save_steps": 2, "disable_ds": True, "save_hf": True}, [2, 4]),
    ],
)
def test_steps_after_which_something_is_saved(ckpt: dict[str, object], steps: list[int]) -> None:
    """Every --ckpt.save_steps steps; without DeepSpeed's checkpoints --ckpt.save_hf still saves models."""
    config = Config.model_validate({"ckpt": ckpt})
    assert [step for step in range(1, 6) if is_checkpoint_step(config, step)] == steps


def test_checkpoint_of_a_longer_run_is_refused() -> None:
    """A run that a checkpoint leaves nothing to do is refused, unless it is its own last one."""
    config = Config()
    for start_step in (0, 4, 5):
        check_start(start_step, 5, tag="global_step", config=config)
    with pytest.raises(ConfigError, match="global_step6 has 6 steps behind it and this run has 5"):
        check_start(6, 5, tag="global_step6", config=config)


def test_metrics_of_steps_done_again_are_dropped(tmp_path: Path) -> None:
    """After a resume from step 2 the records of steps 1 and 2 are kept, and later ones go."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "eval/x": 1}\n{"step": 3}\n', encoding="utf-8")
    truncate_metrics(path, after_step=2)
    assert path.read_text(encoding="utf-8") == '{"step": 1}\n{"step": 2}\n{"step": 2, "eval/x": 1}\n'


def test_wall_clock_leaves_pauses_out() -> None:
    """A lap runs from step to step; a validation in between does not count."""
    times = iter([10.0, 13.0, 14.0, 20.0, 21.5])
    watch = Stopwatch(lambda: next(times))  # starts at 10
    assert watch.lap() == 3.0
    with watch.paused():  # 14 to 20
        pass
    assert watch.lap() == 2.5  # 21.5 - 13 - 6


def test_wall_clock_rates() -> None:
    """Rates by the wall clock are those of computing times the share of time that is computing."""
    metrics = {"time_forward_backward_s": 1.5, "time_optimizer_s": 0.5, "tokens_per_s": 100.0, "mfu": 0.4}
    # 2 of 5 seconds compute
    assert wall_clock_rates(metrics, 5.0) == pytest.approx({"tokens_per_s_wall": 40.0, "mfu_wall": 0.16})


def test_no_metrics_yet(tmp_path: Path) -> None:
    """A run that has no metrics has nothing to drop."""
    truncate_metrics(tmp_path / "metrics.jsonl", after_step=0)
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("checkpointed", [True, False])
def test_student_that_a_checkpoint_names_stays(tmp_path: Path, checkpointed: bool) -> None:
    """A superseded student goes when the next checkpoint is whole, or at once in a run that has no checkpoints."""
    snapshots = Snapshots(tmp_path, checkpointed=checkpointed)
    for tag in ("best_global_step1", "best_global_step2"):
        snapshots.path(tag).mkdir()
    snapshots.supersede("best_global_step1")
    assert snapshots.path("best_global_step1").exists() == checkpointed
    snapshots.prune()
    assert [folder.name for folder in tmp_path.iterdir()] == ["best_global_step2_hf"]


@pytest.mark.parametrize(("metric", "expected"), [("loss", [True, False, False]), ("rouge_l", [False, False, True])])
def test_which_student_is_better(metric: str, expected: list[bool]) -> None:
    """A lower loss takes the place of the best, of other measures a higher value; an equal one never does."""
    best = Selection(metric, 2.0, 1, "best_global_step1")
    found = [Selection(metric, value, 2, "best_global_step2") for value in (1.5, 2.0, 2.5)]
    assert [student.is_better_than(best) for student in found] == expected
    assert all(student.is_better_than(None) for student in found)


@pytest.mark.parametrize("metric", ["loss", "rouge_l"])
def test_a_loss_that_is_no_number_is_never_kept(metric: str) -> None:
    """Any number takes the place of NaN, and NaN that of nothing."""
    lost = Selection(metric, float("nan"), 1, "best_global_step1")
    found = Selection(metric, 2.0, 2, "best_global_step2")
    assert found.is_better_than(lost)
    assert not lost.is_better_than(found)
