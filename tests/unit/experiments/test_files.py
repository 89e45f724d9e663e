"""Experiment files: what they may say, and what is said to those who write something else."""

from __future__ import annotations

import pytest

from openrlhf_bd.cli.flags import given_flags
from openrlhf_bd.cli.options import all_options
from openrlhf_bd.cli.pipeline import judge_flags
from openrlhf_bd.errors import ConfigError, DataError
from openrlhf_bd.experiments.prepare import Request, check_options
from tests.unit.experiments.conftest import SFT_OPTIONS, Case


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("kind: generate", "kind: generat", "experiment.yaml:15: stages.rows.kind: found 'generat', expected 'train'"),
        ("label: SFT", "lable: SFT", "experiment.yaml:19: lable is not a key of stages.sft; did you mean label?"),
        ("reference: Teacher", "reference: Master", "experiment.yaml:4: stages.evaluation: reference names 'Master'"),
        ("kind: generate", "kind: judge", "stages.rows: a stage of kind judge needs evaluation"),
        ("label: BD", "label: BD\n    label: KD", "label is given twice, first at"),
        ("algo.distill.name: sft", "algo.distil.name: sft", "algo.distil.name is not an option; did you mean"),
        ("algo.distill.name: sft", "ckpt.output_dir: here", "each stage has a folder of its own"),
        ("extends: pieces/common.yaml", "extends: pieces/comon.yaml", "there is no such file; did you mean"),
        (
            "title: Small",
            "title: Small\npublished: [table9]",
            "experiment.yaml:3: published 'table9': the paper",
        ),
        ("algo.distill.name: sft", "algo.distill.name: sfft", '"sfft" is unknown; did you mean "sft"?'),
        ("algo.distill.name: sft", "algo.distill.name: sfft", "(stage teacher at "),
        ("title: Small", "title: Small\ninclude: experiment.yaml", "experiment.yaml: includes itself through"),
        (
            "teacher:\n    extends",
            "../teacher:\n    extends",
            "experiment.yaml:11: stages.../teacher: found '../teacher', expected letters, digits,",
        ),
    ],
)
def test_a_wrong_file_is_refused_by_its_line(case: Case, old: str, new: str, message: str) -> None:
    """Unknown keys, wrong kinds, twins and circles are named with file and line, and with what was probably meant."""
    case.replace("experiment.yaml", old, new)
    with pytest.raises(ConfigError) as error:
        case.prepared()
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("${models.small}", "${models.smal}", "experiment.yaml:21: ${models.smal}: scale full has no such name under"),
        ("${models.small}", "${model.small}", "experiment.yaml:21: ${model.small} is no reference"),
        ("${models.small}", "${models.small", "has a '${' that does not close"),
        ("${stages.sft}\"}\n", "${stages.stf}\"}\n", "${stages.stf}: there is no such stage; did you mean"),
        ("${models.large}", "${stages.rows}", "in a circle: teacher -> rows -> teacher"),
    ],
)  # fmt: skip
def test_a_wrong_reference_is_refused_by_its_line(case: Case, old: str, new: str, message: str) -> None:
    """References to what is not there, of no kind, or in a circle are named with file and line."""
    case.replace("experiment.yaml", old, new)
    with pytest.raises(ConfigError) as error:
        case.prepared()
    assert message in str(error.value)


def test_a_wrong_value_is_refused_for_all_stages(case: Case) -> None:
    """A value of the wrong type in a piece names the piece's line, whichever stage reads it."""
    case.replace("pieces/common.yaml", "batch_size: 8", "batch_size: many")
    with pytest.raises(ConfigError, match=r"pieces/common.yaml:3: train.batch_size is 'many'; expected a whole number"):
        case.prepared()


def test_missing_data_is_refused_where_it_is_used(case: Case) -> None:
    """Data that a stage reads must be there; data that none reads need not."""
    case.prepared()
    (case.root / "data" / "train.jsonl").unlink()
    with pytest.raises(DataError, match=r"common.yaml:2: \$\{data.train\} is .*train.jsonl, which does not exist"):
        case.prepared()


def test_stages_come_after_those_that_they_refer_to(case: Case) -> None:
    """The order follows the references, and the file where these leave it open."""
    prepared = case.prepared()
    assert list(prepared.stages) == ["teacher", "sft", "rows", "bd", "evaluation"]
    assert prepared.stages["evaluation"].depends_on == ("teacher", "sft", "bd")
    assert prepared.asked == ["teacher", "sft", "rows", "bd", "evaluation"]


def test_only_names_stages(case: Case) -> None:
    """`--only` takes names of the experiment, and says what was probably meant by another."""
    assert case.prepared(only="bd,teacher").asked == ["teacher", "bd"]
    with pytest.raises(ConfigError, match="--only techer: the experiment has no such stage; did you mean teacher"):
        case.prepared(only="techer")


def test_later_layers_win(case: Case) -> None:
    """Pieces < stage < scale < scale by kind < scale by pattern < command line."""

    def steps(**flags: str) -> int | None:
        return case.prepared(**flags).stages["sft"].config.train.max_steps

    assert steps() == 4
    case.replace("experiment.yaml", SFT_OPTIONS, SFT_OPTIONS.replace("{", "{train.max_steps: 5, ", 1))
    assert steps() == 5
    for layer, number in (
        ("options: {train.max_steps: 6}", 6),
        ("options_by_kind: {train: {train.max_steps: 7}}", 7),
        ("options_by_stage: {s*: {train: {max_steps: 8}}}", 8),
    ):
        case.replace("scales/full.yaml", "models:", f"{layer}\nmodels:")
        assert steps() == number
    assert steps(train__max_steps="9") == 9


def test_included_stages_are_one_stage_where_they_are_the_same(case: Case) -> None:
    """Two files may say the same stage; another stage of the same name is refused, with both lines."""
    other = "stages:\n  sft: {label: SFT, options: {algo.distill.name: sft, train.max_steps: %d}}\n"
    for name, steps in (("a.yaml", 3), ("b.yaml", 3)):
        case.write(name, other % steps)
    case.write("experiment.yaml", "include: [a.yaml, b.yaml]\npublished: table1\n")
    assert list(case.prepared().stages) == ["sft"]
    case.write("b.yaml", other % 4)
    with pytest.raises(ConfigError, match=r"b.yaml:2: stage sft is another than the one at .*a.yaml:2"):
        case.prepared()


def test_an_unknown_scale_is_refused(case: Case) -> None:
    """The message says which scales there are."""
    with pytest.raises(ConfigError, match=r"--scale huge: there is no .*scales there: full"):
        case.prepared(scale="huge")


def test_references_without_a_scale_say_what_is_needed(case: Case) -> None:
    """Where no scale file is, a reference to data says which file would tell what it is."""
    (case.root / "scales" / "full.yaml").unlink()
    with pytest.raises(ConfigError, match=r"no scale says what that is; expected scales/full.yaml beside"):
        case.prepared()


def test_flags_that_no_stage_reads_are_told(case: Case) -> None:
    """A judge's option where nothing is judged reaches no stage; an option of training does."""
    flags = given_flags({"train.max_steps": "3", "judge.seed": "1"}, {**all_options(), **judge_flags()})
    request = Request(output_dir=case.root / "runs", data_dir=case.root / "data", flags=flags)
    assert check_options(case.root / "experiment.yaml", request).unread == ["judge.seed"]
