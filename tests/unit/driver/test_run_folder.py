from __future__ import annotations

import json
from pathlib import Path

import pytest

from openrlhf_bd.config import Config
from openrlhf_bd.driver.run_folder import RunFolder, run_identity
from openrlhf_bd.errors import RunFolderError
from openrlhf_bd.store.manifest import flatten


def test_flatten_gives_dotted_keys() -> None:
    """Nested options become the names of their flags."""
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": None}) == {"a.b": 1, "a.c.d": [2], "e": None}


def test_identity_leaves_out_how_a_run_is_carried_out() -> None:
    """Timeouts, loggers and numbers of engines may change when a run is resumed; the objective may not."""
    one = run_identity(Config())
    other = run_identity(Config.model_validate({"teacher": {"num_engines": 4}, "cluster": {"step_timeout_s": 5}}))
    assert one == other
    assert one != run_identity(Config.model_validate({"algo": {"distill": {"gamma": 0.5}}}))


def test_finished_stages_are_there_for_the_next_start(tmp_path: Path) -> None:
    """What a stage left on record is read back, and other stages count as unfinished."""
    with RunFolder.open(tmp_path / "run", {"x": 1}) as folder:
        assert folder.finished("rows") is None
        folder.finish("rows", path="somewhere")
    with RunFolder.open(tmp_path / "run", {"x": 1}) as folder:
        assert folder.finished("rows") == {"path": "somewhere"}
    assert RunFolder.finished_stages(tmp_path / "run") == {"rows"}


def test_other_runs_folder_is_refused(tmp_path: Path) -> None:
    """A folder of a run with other options is refused with both values, and not touched."""
    with RunFolder.open(tmp_path / "run", {"x": 1, "y": 2}):
        pass
    before = (tmp_path / "run" / "run.json").read_bytes()
    with pytest.raises(RunFolderError, match="x: there 1, now 3"), RunFolder.open(tmp_path / "run", {"x": 3, "y": 2}):
        pass
    assert (tmp_path / "run" / "run.json").read_bytes() == before


def test_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    """A folder that holds files of something else is refused."""
    (tmp_path / "thesis.tex").write_text("", encoding="utf-8")
    with pytest.raises(RunFolderError, match="not a run of openrlhf_bd"):
        RunFolder.check(tmp_path, {})


def test_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    """A file is no run folder."""
    (tmp_path / "run").write_text("", encoding="utf-8")
    with pytest.raises(RunFolderError, match="found a file"):
        RunFolder.check(tmp_path / "run", {})


def test_second_writer_is_refused(tmp_path: Path) -> None:
    """Two processes cannot write to one run folder; the message names the first."""
    with RunFolder.open(tmp_path / "run", {}):
        pid = (tmp_path / "run" / ".lock").read_text(encoding="utf-8")
        with pytest.raises(RunFolderError, match=f"process {pid} is writing"):
            RunFolder.check(tmp_path / "run", {})
        with pytest.raises(RunFolderError, match=f"process {pid} is writing"), RunFolder.open(tmp_path / "run", {}):
            pass
    RunFolder.check(tmp_path / "run", {})


def test_folder_of_a_run_that_was_killed_at_its_first_step(tmp_path: Path) -> None:
    """A lock that nobody holds, and a record that has no name yet, are no other run."""
    (tmp_path / ".lock").write_text("4194305", encoding="utf-8")
    (tmp_path / "run.json.tmp").write_text('{"ident', encoding="utf-8")
    with RunFolder.open(tmp_path, {"x": 1}):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "run.json"}


def test_record_is_json(tmp_path: Path) -> None:
    """run.json can be read by anything."""
    with RunFolder.open(tmp_path / "run", run_identity(Config())):
        pass
    content = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert content["identity"]["algo.distill.gamma"] == 0.99
