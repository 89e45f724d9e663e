"""The remarks on how to read the numbers."""

from pathlib import Path

import pytest

from openrlhf_bd.config import PRESETS, Config
from openrlhf_bd.evaluation.reading import how_to_read, preset_changes
from openrlhf_bd.evaluation.report import main_tables
from openrlhf_bd.evaluation.run_data import RunData
from tests.unit.evaluation.runs import make_evaluation, make_run


def run_with(label: str, **distill: object) -> RunData:
    return RunData(label, config=Config.model_validate({"algo": {"distill": distill}}).model_dump(mode="json"))


def remarks(runs: list[RunData]) -> dict[str, str]:
    return dict(how_to_read(runs, main_tables(runs, ())))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_as_it_is_has_no_changes(preset: str):
    """A run with the preset's own values is called the preset."""
    run = run_with("a", preset=preset)
    assert preset_changes(run) == []
    assert "But:" not in remarks([run])[f"Preset {preset}"]


def test_a_changed_preset_is_not_passed_off_as_the_preset():
    """An option that differs from the preset's is named beside what is said of the preset."""
    runs = [run_with("plain", preset="paper"), run_with("mild", preset="paper", alpha=5.0)]
    assert preset_changes(runs[1]) == ["alpha 5.0 (preset: 0.1)"]
    assert remarks(runs)["Preset paper"].endswith("But: mild has alpha 5.0 (preset: 0.1).")


def test_presets_say_nothing_about_other_algorithms():
    """A baseline's unused preset is not mentioned."""
    assert not [name for name in remarks([run_with("a", name="seqkd", preset="paper")]) if name.startswith("Preset")]


def test_the_error_of_the_draw_of_prompts_is_given():
    """The remark on accuracy gives 1.96 sqrt(1/4 / prompts): 6.9 points for the 200 prompts of the example."""
    run = RunData("a", evaluation=make_evaluation("a", 0.5))
    assert "± 6.9 points" in remarks([run])["Accuracy"]


def test_runs_that_differ_in_more_than_the_method_are_called_out(tmp_path: Path):
    """Another learning rate or starting student is named before scores are compared."""
    plain = RunData.load(make_run(tmp_path / "a", "a", 0.5, num_steps=2))
    other = RunData("b", config={"actor": {"model_name_or_path": "models/student", "adam": {"lr": 1e-3}}})
    text = remarks([plain, other])["Fair comparison"]
    assert "learning rate" in text
    assert "starting student" not in text


def test_one_seed_is_no_spread():
    """With one seed the report says that there is no spread."""
    run = RunData("a", evaluation=make_evaluation("a", 0.5, num_seeds=1))
    assert remarks([run])["Spread"].startswith("One sampling seed")
