"""The paper's experiment files: each resolves at both scales, and says what the paper says."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig

from openrlhf_bd.cli.yaml_files import read_config_file
from openrlhf_bd.config import Config
from openrlhf_bd.evaluation.published import published
from openrlhf_bd.experiments.digests import InputDigests
from openrlhf_bd.experiments.files import read_experiment
from openrlhf_bd.experiments.prepare import Prepared, Request, check_options, prepare
from openrlhf_bd.experiments.scales import read_scale

FOLDER = Path(__file__).parents[3] / "configs" / "paper"
EXPERIMENTS = sorted(FOLDER.glob("*.yaml"))
PIECES = sorted((FOLDER / "pieces").glob("*.yaml"))
STUDENTS = ("gpt2-120m", "gpt2-340m", "gpt2-760m", "opt-125m", "opt-350m", "opt-1.3b", "qwen2.5-0.5b")
# Of the models that the paper names, as their own configurations on the hub say it.
ARCHITECTURES = {"gpt2": "GPT2LMHeadModel", "opt": "OPTForCausalLM", "qwen2.5": "Qwen2ForCausalLM"}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of the names that the full scale reads; nothing of them is read here."""
    folder = tmp_path_factory.mktemp("data")
    for path in read_scale("full", beside=FOLDER).data.values():
        (folder / path).write_text('{"instruction": "a", "input": "", "output": "b", "text": "c"}\n', encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def inputs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("toy_inputs")


def resolved(name: str, *, scale: str, data_dir: Path | None, inputs_dir: Path) -> Prepared:
    request = Request(output_dir=inputs_dir / "runs", scale=scale, data_dir=data_dir)
    checked = check_options(FOLDER / f"{name}.yaml", request)
    return prepare(checked, request, InputDigests(), inputs_dir=inputs_dir)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiment_resolves_at_full_scale(path: Path, data_dir: Path, inputs_dir: Path) -> None:
    """Every option and reference of an experiment is known, without a network: models stay names on the hub."""
    prepared = resolved(path.stem, scale="full", data_dir=data_dir, inputs_dir=inputs_dir)
    models = set(read_scale("full", beside=FOLDER).models.values())
    folders = {str(stage.folder) for stage in prepared.stages.values()}
    for stage in prepared.stages.values():
        if stage.kind == "train":
            assert stage.config.actor.model_name_or_path in models | folders
    assert not list(inputs_dir.glob("full*"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiment_resolves_at_toy_scale(path: Path, inputs_dir: Path) -> None:
    """At toy scale each training stage has a model of the architecture that it stands for, from the package alone."""
    prepared = resolved(path.stem, scale="toy", data_dir=None, inputs_dir=inputs_dir)
    for stage in prepared.stages.values():
        if stage.kind != "train":
            continue
        assert stage.stand_in is not None
        folder = stage.stand_in.config.actor.model_name_or_path
        family = next(family for family in ARCHITECTURES if stage.name.startswith(family))
        assert AutoConfig.from_pretrained(str(folder)).architectures == [ARCHITECTURES[family]]
        assert Path(str(stage.config.data.prompt_dataset)).is_file()


@pytest.mark.parametrize("path", PIECES, ids=lambda path: path.stem)
def test_piece_is_an_option_file(path: Path) -> None:
    """A piece alone is a file of known options, as `--config` takes it."""
    assert read_config_file(path)


def test_published_figures_have_our_groups(data_dir: Path, inputs_dir: Path) -> None:
    """Each row of a published table stands in the same group of ours, under the same label."""
    for name in ("table1", "table2", "table3", "table4"):
        experiment = read_experiment(FOLDER / f"{name}.yaml")
        assert name in experiment.published
        labels: dict[str, set[str]] = {}
        for stage in experiment.stages.values():
            found = {stage.fields.label, *stage.fields.models} - {None}
            labels.setdefault(str(stage.fields.group), set()).update(str(label) for label in found)
        table = published(name)
        for group, rows in table.groups.items():
            for column in table.columns:
                shown = [label for label in labels[group] if table.find(group, label, column) is not None]
                assert len(shown) >= len(rows), f"{name}: {group}: {sorted(labels[group])} for {sorted(rows)}"


def test_table1_has_every_method_of_every_student() -> None:
    """Seven students, each with its start, six methods and an evaluation, and three teachers with their rows."""
    stages = read_experiment(FOLDER / "table1.yaml").stages
    parts = ("start", "sft", "kd", "seqkd", "minillm", "bd", "bd-robust", "evaluation")
    expected = {f"{student}-{part}" for student in STUDENTS for part in parts}
    expected |= {f"{family}-{part}" for family in ARCHITECTURES for part in ("teacher", "rows")}
    assert set(stages) == expected


def options_of(name: str, stage: str, data_dir: Path, inputs_dir: Path) -> Config:
    return resolved(name, scale="full", data_dir=data_dir, inputs_dir=inputs_dir).stages[stage].config


def test_bd_has_the_published_hyper_parameters(data_dir: Path, inputs_dir: Path) -> None:
    """Batch 64, rate 5e-6, 3 epochs, 8 responses, p 0.8 (0.5 for OPT 1.3B), alpha 0.1, gamma 0.99, J_PT 1."""
    for student, top_p in (("gpt2_120m", 0.8), ("opt_1.3b", 0.5)):
        config = options_of(student, f"{student.replace('_', '-')}-bd", data_dir, inputs_dir)
        distill = config.algo.distill
        assert (config.train.batch_size, config.actor.adam.lr, config.train.max_epochs) == (64, 5e-6, 3)
        assert (config.data.max_prompt_len, config.data.max_len) == (256, 512)
        assert (config.rollout.n_samples_per_prompt, config.rollout.temperature) == (8, 1.0)
        assert (distill.top_p, distill.alpha, distill.gamma, distill.q_min) == (top_p, 0.1, 0.99, -10.0)
        assert (distill.regulariser, distill.pretrain_coef, distill.include_eos) == ("chi2", 1.0, False)
        assert config.ckpt.best_metric_key == ""


def test_phases_and_baselines_are_the_papers(data_dir: Path, inputs_dir: Path) -> None:
    """The start is selected by loss, SFT by Rouge-L; all else begins from the start; MiniLLM mixes in the teacher."""
    stages = resolved("opt_350m", scale="full", data_dir=data_dir, inputs_dir=inputs_dir).stages
    assert stages["opt-350m-start"].config.ckpt.best_metric_key == "loss"
    assert stages["opt-350m-sft"].config.ckpt.best_metric_key == ""
    for method in ("kd", "seqkd", "minillm", "bd", "bd-robust"):
        assert stages[f"opt-350m-{method}"].config.actor.model_name_or_path == str(stages["opt-350m-start"].folder)
    distill = stages["opt-350m-minillm"].config.algo.distill
    assert (distill.name, distill.mode, distill.teacher_mix) == ("minillm", "online", 0.2)
    evaluation = stages["opt-350m-evaluation"].config.eval
    assert evaluation.seeds == [10, 20, 30, 40, 50]
    assert evaluation.test_top_p == [1.0, 0.8]
    # The RoBERTa corpus for OPT, OpenWebText for the others.
    assert str(stages["opt-350m-bd"].config.data.pretrain_dataset).endswith("pretrain_opt")


def test_ablations_change_one_option(data_dir: Path, inputs_dir: Path) -> None:
    """Tables 2 and 4: the ablated runs differ from BD in p, or in the regulariser, and in what follows from it."""
    table2 = resolved("table2", scale="full", data_dir=data_dir, inputs_dir=inputs_dir).stages
    for p in (0.5, 1.0):
        ablated = table2[f"opt-125m-bd-p{p}"].config.algo.distill
        assert ablated == table2["opt-125m-bd"].config.algo.distill.model_copy(update={"top_p": p})
    # Sets of p = 0.5 are cut out of the common rows; those of p = 1 cannot be.
    assert table2["opt-125m-bd-p0.5"].config.teacher.store_path == table2["opt-125m-bd"].config.teacher.store_path
    assert str(table2["opt-whole-rows"].folder) in str(table2["opt-125m-bd-p1.0"].config.teacher.store_path)
    table4 = resolved("table4", scale="full", data_dir=data_dir, inputs_dir=inputs_dir).stages
    plain = table4["gpt2-760m-bd-plain"].config.algo.distill
    assert plain == table4["gpt2-760m-bd"].config.algo.distill.model_copy(update={"regulariser": "none"})


def test_toy_judge_needs_nothing_from_outside(inputs_dir: Path) -> None:
    """Figure 2 at toy scale is judged by its own teacher, which has room for a question and may only give verdicts."""
    stages = resolved("figure2", scale="toy", data_dir=None, inputs_dir=inputs_dir).stages
    options = stages["qwen2.5-0.5b-judge"].judge
    assert options is not None
    assert options.serve == str(stages["qwen2.5-teacher"].folder)
    assert options.constrained
    teacher = stages["qwen2.5-teacher"].config.actor.model_name_or_path
    assert AutoConfig.from_pretrained(teacher).max_position_embeddings >= 1024


def test_paper_is_judged_by_its_own_judge(data_dir: Path, inputs_dir: Path) -> None:
    """Figure 2 at full scale asks the paper's judge."""
    options = (
        resolved("figure2", scale="full", data_dir=data_dir, inputs_dir=inputs_dir).stages["qwen2.5-0.5b-judge"].judge
    )
    assert options is not None
    assert (options.model, options.serve, options.test_set) == ("gpt-4o-mini", None, "dolly")
