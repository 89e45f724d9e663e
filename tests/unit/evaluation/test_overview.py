"""Facts at the head of a report, and what its runs took."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from openrlhf_bd.evaluation.overview import facts, gpu_hours, stage_bars
from openrlhf_bd.evaluation.run_data import RunData
from tests.unit.evaluation.runs import make_run


def test_all_teachers_are_named(tmp_path: Path) -> None:
    """The teacher of a run, and those of its routes with the values that choose them."""
    path = make_run(tmp_path / "run", "x", 0.5, num_steps=2) / "config.yaml"
    assert dict(facts([RunData.load(path.parent)], None))["Teacher"] == "models/teacher"
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    config["teacher"] |= {"routes": "math=/data/models/m, code=org/c", "route_key": "domain"}
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    assert dict(facts([RunData.load(path.parent)], None))["Teacher"] == "models/teacher, models/m (math), org/c (code)"


def test_gpu_hours_and_cost_of_each_stage() -> None:
    """Seconds times GPUs held, and their price where it is given; stages without GPUs cost nothing."""
    seconds = {"rows": 1800.0, "training": 3600.0, "evaluation": 90.0}
    run = RunData("bd", stage_seconds=seconds, stage_gpus={"rows": 2, "training": 4, "evaluation": 0})
    # 2 x 0.5 h + 4 x 1 h
    assert gpu_hours(run) == pytest.approx(5.0)
    [bar] = stage_bars([run])
    assert bar.total == "1 h 32 min, 5.00 GPU hours"
    assert [time for _, time, _ in bar.parts] == ["30 min × 2 GPUs", "1 h 00 min × 4 GPUs", "1 min 30 s"]
    [bar] = stage_bars([replace(run, config={"logger": {"cost_per_gpu_hour": 2.5}})])
    assert bar.total == "1 h 32 min, 5.00 GPU hours, cost 12.50"
    assert gpu_hours(replace(run, stage_gpus={})) is None
