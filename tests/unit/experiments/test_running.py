"""What a run is going to do, from what earlier runs left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from openrlhf_bd.driver.run_folder import RunFolder, run_identity
from openrlhf_bd.errors import ConfigError, RunFolderError
from openrlhf_bd.evaluation.results import labelled_paths
from openrlhf_bd.experiments.display import format_seconds, remaining_s
from openrlhf_bd.experiments.record import PipelineRecord
from openrlhf_bd.experiments.running import make_run
from openrlhf_bd.experiments.stages import Stage
from tests.unit.experiments.conftest import SFT_OPTIONS, Case


def begin(stage: Stage, *, finished: bool) -> None:
    """What a training leaves in its folder."""
    with RunFolder.open(stage.folder, run_identity(stage.config)) as folder:
        if finished:
            folder.finish("training")


def states(case: Case) -> dict[str, str]:
    prepared = case.prepared()
    run = make_run(prepared.stages, prepared.asked)
    return {name: run.state(name) for name in prepared.stages}


def test_stages_are_new_resume_or_are_finished(case: Case) -> None:
    """The state of a stage is read off its folder; a changed option gives a new stage beside the old folder."""
    assert set(states(case).values()) == {"new"}
    stages = case.prepared().stages
    begin(stages["teacher"], finished=True)
    begin(stages["sft"], finished=False)
    assert states(case) == {"teacher": "finished", "sft": "resumes", "rows": "new", "bd": "new", "evaluation": "new"}
    case.replace("experiment.yaml", SFT_OPTIONS, SFT_OPTIONS.replace("{", "{train.seed: 7, ", 1))
    assert states(case)["sft"] == "new"
    assert states(case)["teacher"] == "finished"
    assert stages["sft"].folder.exists()


def test_an_evaluation_is_finished_with_its_last_model(case: Case) -> None:
    """Scores of some models are not those of all."""
    stage = case.prepared().stages["evaluation"]
    files = labelled_paths(stage.folder, stage.models)
    stage.folder.mkdir(parents=True)
    for label in ("Teacher", "SFT"):
        files[label].touch()
    assert states(case)["evaluation"] == "new"
    files["BD"].touch()
    assert states(case)["evaluation"] == "finished"


def test_a_stage_alone_needs_its_inputs(case: Case) -> None:
    """`--only` refuses a stage whose inputs are not finished, and says what to run."""
    with pytest.raises(
        ConfigError, match=r"bd needs teacher, rows, sft, which are not finished; run --only teacher,rows,"
    ):
        make_run(case.prepared().stages, ["bd"])
    stages = case.prepared().stages
    for name in ("teacher", "sft"):
        begin(stages[name], finished=True)
    with pytest.raises(ConfigError, match=r"--only bd: bd needs rows, which is not finished; run --only rows,bd"):
        make_run(stages, ["bd"])
    assert make_run(stages, ["rows", "bd"]).asked == ["rows", "bd"]


def test_the_record_tells_what_became_of_each_stage(case: Case) -> None:
    """`pipeline.json` has each stage as its file shows it, with what its folder took, also for another experiment."""
    prepared = case.prepared()
    out = case.root / "out"
    with PipelineRecord.open(out) as record:
        for name in ("one", "two"):
            record.set_experiment(name, prepared.stages, title=name, scale="full", published=["table1"])
        record.set_stage(prepared.stages["sft"], state="finished", seconds=12.5, gpus=2)
    with PipelineRecord.open(out) as record:
        view = record.view("two")
        assert record.seconds_of_kind("train") == [12.5]
    assert (view["title"], view["published"]) == ("two", ["table1"])
    sft = next(stage for stage in view["stages"] if stage["name"] == "sft")
    assert (sft["label"], sft["kind"], sft["state"], sft["seconds"]) == ("SFT", "train", "finished", 12.5)
    assert sft["folder"] == str(prepared.stages["sft"].folder)
    assert next(stage for stage in view["stages"] if stage["name"] == "bd")["state"] == "new"
    assert json.loads((out / "pipeline.json").read_text(encoding="utf-8"))["experiments"].keys() == {"one", "two"}


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    """A second process is refused with the first one's id; so is a folder with other files, which stay as they are."""
    with (
        PipelineRecord.open(tmp_path / "out"),
        pytest.raises(RunFolderError, match=r"process \d+ on .* is running an experiment in this folder"),
        PipelineRecord.open(tmp_path / "out"),
    ):
        pass
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with (
        pytest.raises(RunFolderError, match="the folder holds files and no pipeline"),
        PipelineRecord.open(tmp_path / "mine"),
    ):
        pass
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_time_left_follows_stages_of_the_same_kind(case: Case) -> None:
    """The mean of finished stages of each kind, added up: 2 x (10 + 20) / 2 + 5 = 35; unknown where a kind has none."""
    stages = case.prepared().stages
    with PipelineRecord.open(case.root / "out") as record:
        for name, seconds in (("teacher", 10.0), ("sft", 20.0), ("rows", 5.0)):
            record.set_stage(stages[name], state="finished", seconds=seconds)
        record.set_stage(stages["bd"], state="failed", seconds=99.0)
        assert remaining_s(["train", "train", "generate"], record) == 35
        assert remaining_s(["train", "evaluate"], record) is None


def test_seconds_in_words() -> None:
    """Seconds, minutes or hours, whatever reads best."""
    assert [format_seconds(seconds) for seconds in (42, 720, 12600)] == ["42 s", "12 min", "3.5 h"]
