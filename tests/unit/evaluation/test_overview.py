"""Facts at the head of a report."""

from pathlib import Path

import yaml

from openrlhf_bd.evaluation.overview import facts
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
