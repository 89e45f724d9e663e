"""Stages of kind judge whose judge is served by the job: options, references and keys."""

from __future__ import annotations

import pytest

from openrlhf_bd.errors import ConfigError, ResourceError
from openrlhf_bd.experiments.stages import Stage
from openrlhf_bd.experiments.work import work_of
from tests.unit.experiments.conftest import SFT_OPTIONS, Case

JUDGE = """  judge:
    kind: judge
    evaluation: ${stages.evaluation}
    pairs: [[BD, SFT]]
    options: {test_set: test}
"""
SERVED = 'options: {test_set: test, serve: "${stages.teacher}"}'


@pytest.fixture
def judged(case: Case) -> Case:
    """The experiment with a judge stage, whose judge is asked for by `api_base`."""
    case.write("experiment.yaml", (case.root / "experiment.yaml").read_text(encoding="utf-8") + JUDGE)
    return case


def served(case: Case) -> Case:
    case.replace("experiment.yaml", "options: {test_set: test}", SERVED)
    return case


def judge(case: Case, **flags: str) -> Stage:
    return case.prepared(**flags).stages["judge"]


def test_a_served_stage_is_its_folder(judged: Case) -> None:
    """`${stages.X}` is the folder of X, which comes before the judge; `${models.X}` is what the scale says."""
    stages = served(judged).prepared().stages
    assert stages["judge"].depends_on == ("teacher", "evaluation")
    assert stages["judge"].judge is not None
    assert stages["judge"].judge.serve == str(stages["teacher"].folder)
    judged.replace("experiment.yaml", 'serve: "${stages.teacher}"', 'serve: "${models.large}"')
    options = judge(judged).judge
    assert options is not None
    assert options.serve == "example/large"


def test_a_scale_serves_a_judge(judged: Case) -> None:
    """A scale gives judge stages a judge of the experiment's own, and the command line another server."""
    with (judged.root / "scales/full.yaml").open("a", encoding="utf-8") as file:
        file.write('options_by_kind: {judge: {serve: "${stages.teacher}", constrained: true}}\n')
    options = judge(judged).judge
    assert options is not None
    assert options.constrained
    assert options.serve == str(judged.prepared().stages["teacher"].folder)
    asked = judge(judged, judge__serve="none", judge__api_base="http://here/v1", judge__model="mine").judge
    assert asked is not None
    assert (asked.serve, asked.api_base, asked.model) == (None, "http://here/v1", "mine")


def test_what_a_served_judge_is_decides_its_key(judged: Case) -> None:
    """Who is served counts, by what it follows from; on how many GPUs, and for how long one waits, does not."""
    before = judge(judged).key
    by_stage = judge(served(judged)).key
    assert by_stage != before
    assert judge(judged, judge__serve_gpus="2", judge__serve_timeout_s="5").key == by_stage
    assert judge(judged, judge__constrained="true").key != by_stage
    by_name = {judge(judged, judge__serve=name).key for name in ("example/one", "example/other")}
    assert len(by_name | {before, by_stage}) == 4
    # Another teacher is another judge.
    options = SFT_OPTIONS.replace("small", "large")
    judged.replace("experiment.yaml", options, options.replace("{", "{train.seed: 7, ", 1))
    assert judge(judged).key != by_stage


@pytest.mark.parametrize("name", ["api_base", "model"])
def test_one_judge_alone(judged: Case, name: str) -> None:
    """A served judge has no other server and no other name; the message says where each was given."""
    with pytest.raises(ConfigError) as error:
        judge(served(judged), **{f"judge__{name}": "http://here/v1"})
    message = str(error.value)
    assert f"serve and {name} exclude each other" in message
    assert "serve as none" in message
    assert "experiment.yaml:" in message
    assert f"{name}: command line" in message


def test_only_a_student_is_served(judged: Case) -> None:
    """Rows are no model: refused by the line of the option."""
    judged.replace("experiment.yaml", "options: {test_set: test}", SERVED.replace("teacher", "rows"))
    with pytest.raises(ConfigError, match=r"experiment.yaml:\d+: serve is \$\{stages.rows\}, a stage of kind generate"):
        judge(judged)


def test_gpus_of_a_judge(judged: Case) -> None:
    """A judge elsewhere holds no GPU, one that is served its own; too many are refused before anything starts."""
    assert work_of(judge(judged)).num_gpus == 0
    work_of(judge(judged)).check_cluster({})
    work = work_of(judge(judged, judge__serve="example/one", judge__serve_gpus="4"))
    assert work.num_gpus == 4
    work.check_cluster({"GPU": 4.0})
    with pytest.raises(ResourceError, match="has 2 GPUs, the judge's server needs 4"):
        work.check_cluster({"GPU": 2.0})
