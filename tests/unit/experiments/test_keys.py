"""Keys: equal where results are, different where something decides them otherwise."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from openrlhf_bd.experiments.digests import InputDigests
from tests.unit.experiments.conftest import ROWS_OPTIONS, SFT_OPTIONS, Case


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    """Names of the stages whose keys differ."""
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


def test_unchanged_stages_keep_their_keys_and_folders(case: Case) -> None:
    """The same files give the same keys, wherever data and output are."""
    before = case.keys()
    (case.root / "data").rename(case.root / "moved")
    (case.root / "data").symlink_to(case.root / "moved")
    assert case.keys() == before
    stage = case.prepared().stages["teacher"]
    assert stage.folder == case.root / "out" / f"teacher-{before['teacher'][:8]}"


def test_a_changed_option_changes_its_stage_and_those_after_it(case: Case) -> None:
    """A stage's key follows the keys of the stages that it refers to, and no others."""
    before = case.keys()
    case.replace("experiment.yaml", "label: BD\n", "label: BD\n    group: Other\n")
    assert changed(before, case.keys()) == set()
    case.replace("experiment.yaml", SFT_OPTIONS, SFT_OPTIONS.replace("{", "{train.seed: 7, ", 1))
    assert changed(before, case.keys()) == {"sft", "bd", "evaluation"}


def test_a_changed_byte_of_data_changes_the_stages_that_read_it(case: Case) -> None:
    """Test data decides the evaluation alone, training data everything after it."""
    before = case.keys()
    case.write("data/test.jsonl", '{"instruction": "c", "output": "D"}\n')
    assert changed(before, case.keys()) == {"evaluation"}
    case.write("data/train.jsonl", '{"instruction": "a", "output": "B"}\n')
    assert changed(before, case.keys()) == set(before)


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        # How a run is carried out decides nothing.
        ("cluster__step_timeout_s", "5", set()),
        ("vllm__num_engines", "3", set()),
        ("teacher__num_engines", "2", set()),
        ("logger__logging_steps", "7", set()),
        # Rows and scores do not follow from how a student trains; whoever reads them does.
        ("train__max_steps", "9", {"teacher", "sft", "rows", "bd", "evaluation"}),
        ("eval__seeds", ["1", "2"], {"teacher", "sft", "rows", "bd", "evaluation"}),
        # A training does not look at the final evaluation.
        ("eval__test_top_p", ["1.0"], {"evaluation"}),
    ],
)  # fmt: skip
def test_flags_change_the_keys_that_they_decide(
    case: Case, flag: str, value: str | list[str], expected: set[str]
) -> None:
    """Options that say how a run is carried out are no part of a key; those that decide results are."""
    assert changed(case.keys(), case.keys(**{flag: value})) == expected


def test_rows_do_not_depend_on_how_the_student_trains(case: Case) -> None:
    """An option of training in the pieces of a stage that makes rows changes nothing there."""
    before = case.keys()
    case.replace(
        "experiment.yaml", ROWS_OPTIONS, ROWS_OPTIONS.replace("{", "{train.max_steps: 99, eval.seeds: [1], ", 1)
    )
    assert changed(before, case.keys()) == set()


def test_a_local_model_counts_by_its_content(case: Case) -> None:
    """A model folder may move; another weight is another model. Files beside the model do not count."""
    for name in ("config.json", "model.safetensors", "report.html"):
        case.write(f"models/small/{name}", name)
    case.replace("scales/full.yaml", "small: example/small", f"small: {case.root}/models/small")
    before = case.keys()
    (case.root / "models" / "small").rename(case.root / "models" / "other")
    case.replace("scales/full.yaml", "models/small", "models/other")
    case.write("models/other/report.html", "longer")
    assert changed(before, case.keys()) == set()
    case.write("models/other/model.safetensors", "other")
    assert changed(before, case.keys()) == {"sft", "bd", "evaluation"}


def test_models_have_keys_of_their_own(case: Case) -> None:
    """A further model of an evaluation leaves what decides the scores of the others as it is."""
    before = case.prepared().stages["evaluation"]
    case.replace("experiment.yaml", "models: {Teacher", 'models: {Small: "${models.small}@temperature=0", Teacher')
    after = case.prepared().stages["evaluation"]
    assert after.key != before.key
    assert {label: key for label, key in after.model_keys.items() if label != "Small"} == before.model_keys
    case.replace("experiment.yaml", "@temperature=0", "")
    assert case.prepared().stages["evaluation"].model_keys["Small"] != after.model_keys["Small"]


def test_online_drops_the_rows_that_nobody_reads(case: Case) -> None:
    """`--mode online` switches what can learn from the student's responses, and leaves out rows made for it alone."""
    stages = case.prepared(mode="online").stages
    assert list(stages) == ["teacher", "sft", "bd", "evaluation"]
    assert stages["bd"].config.algo.distill.mode == "online"
    assert stages["bd"].config.teacher.store_path is None
    assert stages["sft"].config.algo.distill.mode == "offline"
    assert stages["sft"].key == case.keys()["sft"]


def test_equal_stages_share_a_folder(case: Case) -> None:
    """A stage with the key of another has its folder, in one experiment or from an earlier one."""
    again = f"  again:\n    extends: pieces/common.yaml\n    {SFT_OPTIONS}\n"
    case.replace("experiment.yaml", "  bd:\n", f"{again}  bd:\n")
    stages = case.prepared().stages
    assert stages["again"].folder == stages["sft"].folder
    earlier = case.root / "out" / f"earlier-{stages['sft'].key[:8]}"
    earlier.mkdir(parents=True)
    assert case.prepared().stages["sft"].folder == earlier


def test_paths_of_a_stage_lead_into_the_folders_of_others(case: Case) -> None:
    """A job gets folders; checks before it get the models that trainings begin with, and no rows."""
    stages = case.prepared().stages
    bd = stages["bd"]
    assert bd.config.actor.model_name_or_path == str(stages["sft"].folder)
    assert bd.config.teacher.store_path == f"{stages['rows'].folder}/teacher_data"
    assert bd.config.ckpt.output_dir == str(bd.folder)
    assert bd.stand_in is not None
    assert bd.stand_in.config.actor.model_name_or_path == "example/small"
    assert bd.stand_in.config.teacher.model_name_or_path == "example/large"
    assert bd.stand_in.config.teacher.store_path is None
    evaluation = stages["evaluation"].stand_in
    assert evaluation is not None
    assert evaluation.models == {"Teacher": "example/large", "SFT": "example/small", "BD": "example/small"}


def test_a_digest_is_kept_while_a_file_is_unchanged(tmp_path: Path) -> None:
    """Another process reads a file again only where its size or time changed."""
    data, cache = tmp_path / "data.jsonl", tmp_path / "inputs.json"
    data.write_text("one", encoding="utf-8")
    digests = InputDigests(cache)
    first = digests.data(str(data))
    digests.save()
    stamp = data.stat()
    data.write_text("two", encoding="utf-8")
    os.utime(data, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert InputDigests(cache).data(str(data)) == first
    os.utime(data, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    assert InputDigests(cache).data(str(data)) != first


def test_names_on_a_hub_are_their_own_digests() -> None:
    """What is not on this disk counts by its name."""
    assert InputDigests().model("example/small") == "example/small"
    assert InputDigests().data("example/set@train") == "example/set@train"
