"""The HTML report, from synthetic run folders."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from openrlhf_bd.cli.report import main
from openrlhf_bd.evaluation.report import write_report
from openrlhf_bd.evaluation.results import Evaluation, Sample, write_responses
from openrlhf_bd.evaluation.retention import Metric, Retention
from openrlhf_bd.evaluation.run_data import RunData
from openrlhf_bd.evaluation.win_rates import Usage, WinRates, pair_rates
from tests.unit.evaluation.experiments import make_scored
from tests.unit.evaluation.pages import Page
from tests.unit.evaluation.runs import make_evaluation, make_run, make_store_summary

SECTIONS = (
    "results", "reading", "exposure", "judge", "retention", "validation", "samples", "sets", "training", "timeline",
    "settings",
)  # fmt: skip
HOSTILE = "<script>alert('x')</script><img src=https://example.org/x onerror=alert(1)>"


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory: pytest.TempPathFactory) -> list[RunData]:
    folder = tmp_path_factory.mktemp("runs")
    folders = [
        make_run(folder / "seqkd", "seqkd", 0.5, algorithm="seqkd", num_steps=80),
        make_run(folder / "paper", "bd:paper", 0.3, preset="paper", num_steps=70),
        make_run(folder / "robust", "bd:robust", 0.8, num_steps=80),
    ]
    return [RunData.load(folder) for folder in folders]


@pytest.fixture(scope="module")
def whole_page(whole_runs: list[RunData], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "report.html"
    return write(whole_runs, path, store_summary=make_store_summary())


@pytest.fixture
def runs(whole_runs: list[RunData]) -> list[RunData]:
    """The same runs with two curves each, for pages that are written anew."""
    names = ("train/loss", "eval/rouge_l")
    return [replace(run, curves={name: run.curves[name] for name in names}) for run in whole_runs]


def write(runs: list[RunData], path: Path, **options: object) -> str:
    write_report(runs, path, title="A title", **options)  # type: ignore[arg-type]
    return path.read_text(encoding="utf-8")


def test_every_section_is_there(whole_page: str):
    """One page has scores, advice, curves, responses, candidate sets and settings of all runs."""
    page = Page(whole_page)
    ids = {value for name, value in page.attributes if name == "id"}
    assert ids.issuperset(SECTIONS)
    text = " ".join(" ".join(page.text).split())
    for expected in (
        "A title",
        "seqkd",
        "bd:paper",
        "bd:robust",
        "models/teacher",
        "models/student",
        "Rouge-L",
        "Teacher NLL",
        "Validation Rouge-L",
        "Implied reward r",
        "Soft value V",
        "Log-sum-exp of the logits",
        "Out-of-set rate",
        "Student's mass P_theta",
        "Gradient norm",
        "Learning rate",
        "train/unlisted_metric",
        "Size of the candidate sets",
        "Sorted probability mass of the teacher",
        "Sort, largest first.",
        "Preset paper. The published method to the letter",
        "Preset robust. Not the published method",
        "Wall time by stage",
    ):
        assert expected in text
    assert "Not in this report" not in text


def test_the_page_stands_alone(runs: list[RunData], tmp_path: Path):
    """Nothing is loaded from elsewhere and no script runs, whatever the samples hold."""
    samples = [Sample(dataset=HOSTILE, instruction=HOSTILE, input=HOSTILE, reference=HOSTILE, response=HOSTILE,
                      rouge_l=1.0, correct=False)]  # fmt: skip
    hostile = replace(
        runs[0],
        label=HOSTILE,
        evaluation=make_evaluation(HOSTILE, 0.5).model_copy(update={"samples": samples}),
        config={"algo": {"distill": {"name": HOSTILE}}, "teacher": {"model_name_or_path": HOSTILE}},
        versions={HOSTILE: HOSTILE},
        missing=(HOSTILE,),
    )
    html = write([hostile, *runs[1:]], tmp_path / "report.html", store_summary=make_store_summary())
    page = Page(html)
    page.assert_stands_alone()
    assert "Content-Security-Policy" in html
    # As text it is all there.
    assert html.count("&lt;script&gt;") >= 8


def test_characters_that_html_does_not_allow_are_replaced(runs: list[RunData], tmp_path: Path):
    """Control characters and lone surrogates in a response leave a valid page."""
    assert runs[0].evaluation is not None
    sample = runs[0].evaluation.samples[0].model_copy(update={"response": "odd \x00\x1b\ud800\uffff end"})
    evaluation = runs[0].evaluation.model_copy(update={"samples": [sample]})
    html = write([replace(runs[0], evaluation=evaluation, curves={})], tmp_path / "report.html")
    assert "odd \ufffd\ufffd\ufffd\ufffd end" in html


def test_no_address_is_linked(whole_page: str):
    """No attribute of an ordinary report leads to another host."""
    assert not re.search(r"""(?:src|href)\s*=\s*["']?\s*(?:https?:)?//""", whole_page)


def test_a_single_run_has_a_report_too(runs: list[RunData], tmp_path: Path):
    """One run gives the same page without comparisons."""
    html = write(runs[2:], tmp_path / "deep" / "report.html")
    assert "63" in html
    assert 'class="best"' not in html
    assert "No teacher data with candidate sets" in html
    assert "Fair comparison" not in html


def test_what_is_missing_is_said(tmp_path: Path):
    """Runs without evaluation, metrics or anything at all still give a page, which says what it lacks."""
    runs = [
        RunData.load(make_run(tmp_path / "a", "a", 0.5, with_evaluation=False, num_steps=5)),
        RunData.load(make_run(tmp_path / "b", "b", 0.5, with_metrics=False)),
        RunData("nothing"),
    ]
    text = " ".join(" ".join(Page(write(runs, tmp_path / "report.html")).text).split())
    assert "Not in this report" in text
    assert "evaluation.json is missing" in text
    assert "metrics.jsonl is missing or empty" in text
    alone = " ".join(Page(write([RunData("nothing")], tmp_path / "alone.html")).text)
    for expected in ("No run has been evaluated yet", "No run has training metrics", "No run has responses to show"):
        assert expected in alone


def test_values_that_are_not_finite_do_no_harm(tmp_path: Path):
    """NaN and infinity in metrics and scores are left out of figures, and counted there."""
    folder = make_run(tmp_path / "run", "bd:robust", 0.5, num_steps=4)
    broken = {"step": 5, "train/loss": float("nan"), "train/value": float("inf"), "train/only_nan": float("nan")}
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(broken) + "\n")
    run = RunData.load(folder)
    assert run.evaluation is not None
    scores = run.evaluation.datasets["demo"]
    odd = scores.model_copy(update={"rouge_l": [float("nan")] * 5, "teacher_nll": [float("inf"), 1.0, 1.0, 1.0, 1.0]})
    curves = {name: run.curves[name] for name in ("train/loss", "train/value", "train/only_nan")}
    run = replace(run, curves=curves, evaluation=run.evaluation.model_copy(update={"datasets": {"demo": odd}}))
    html = write([run, replace(run, label="b")], tmp_path / "report.html", figures_dir=tmp_path / "figures")
    text = " ".join(Page(html).text)
    assert "Not finite, left out: bd:robust at 1 steps" in text
    assert "n/a" in text
    assert "train/only_nan" not in text


def test_keys_of_services_are_not_shown(whole_page: str):
    """The options are shown without the key of Weights & Biases."""
    assert "max_tokens_per_gpu" in whole_page
    assert "a-secret-key" not in whole_page


def test_figures_are_also_written_as_files(runs: list[RunData], tmp_path: Path):
    """On demand every figure is a PNG and a CSV file, and the main table a CSV file."""
    write(runs, tmp_path / "report.html", store_summary=make_store_summary(), figures_dir=tmp_path / "figures")
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names >= {"eval_rouge_l.png", "eval_rouge_l.csv", "train_loss.png", "set_sizes.png", "sorted_mass.csv"}
    assert names >= {"score_demo_rouge_l.png", "scores_demo.csv", "scores_demo.png"}


def test_responses_to_the_same_prompt_stand_together(whole_page: str):
    """Each prompt is shown once, with one response of each method and its verdict."""
    assert whole_page.count('<article class="card sample">') == 3
    assert whole_page.count('class="answer"') == 9
    assert whole_page.count("✓ correct") + whole_page.count("✗ wrong") == 9


def test_the_command_writes_page_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """openrlhf-bd report prints the table, writes the page and returns 0."""
    folders = [make_run(tmp_path / name, name, 0.5, num_steps=3) for name in ("one", "two")]
    output = tmp_path / "out.html"
    status = main([*map(str, folders), "--output", str(output), "--labels", "first,second", "--reference", "second"])
    assert status == 0
    assert "first" in capsys.readouterr().out
    assert "first" in output.read_text(encoding="utf-8")


def test_one_run_keeps_its_report_in_its_folder(tmp_path: Path):
    """Without --output the report of a single run lies in its folder."""
    folder = make_run(tmp_path / "one", "one", 0.5, num_steps=3)
    assert main([str(folder)]) == 0
    assert (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: not found"),
        (["run", "--labels", "a,b"], "--labels a,b: found 2 names for 1 runs"),
        (["run", "--reference", "x"], "--reference x: no such method"),
        (["run", "--store", "nowhere"], "nowhere"),
    ],
)
def test_wrong_arguments_end_with_a_message(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    """A wrong argument ends with one line that names it, a status other than 0, and no report."""
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run", "run", 0.5, num_steps=3)
    assert main(arguments) != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "report.html").exists()


def test_evaluations_alone_can_be_compared(tmp_path: Path):
    """Folders that hold nothing but an evaluation (such as the teacher's) are compared by their scores."""
    for name in ("teacher", "student"):
        make_evaluation(name, 0.5).write(tmp_path / name)
        assert Evaluation.read(tmp_path / name).label == name
    runs = [RunData.load(tmp_path / name) for name in ("teacher", "student")]
    html = write(runs, tmp_path / "report.html", reference_labels=["teacher"])
    assert "for reference" in html


def test_what_other_commands_left_in_a_folder_is_shown(tmp_path: Path):
    """Exposure, both samplers, differences prompt by prompt, win rates, benchmarks and timeline have their sections."""
    folders = [make_run(tmp_path / label, label, 0.5, num_steps=2, with_evaluation=False) for label in ("BD", "KD")]
    for folder in folders:
        evaluation, responses = make_scored(folder.name, 0.5, ["dolly"])
        evaluation.write(folder)
        write_responses(folder, responses)
    rates = pair_rates("BD", "KD", [(1.0, 1.0)] * 3, not_judged={})
    WinRates(
        model="a-judge", prompt_version=1, constrained=True, test_set="dolly", seed=10, top_p=1.0, pairs=[rates],
        usage=Usage(num_requests=6, prompt_tokens=1, completion_tokens=6),
    ).write(folders[0])  # fmt: skip
    tasks = {"a_task": {"acc": Metric(value=0.25, stderr=None)}}
    Retention(model="m", fingerprint="f", harness="0.4", tasks=tasks).write(folders[0] / "retention.json")
    span = {"lane": "student ranks", "activity": "train", "start_s": 10.0, "end_s": 11.0, "step": 1, "session": 1}
    (folders[0] / "timeline.jsonl").write_text(json.dumps(span) + "\n", encoding="utf-8")
    runs = [RunData.load(folder) for folder in folders]
    text = Page(write([replace(run, curves={}) for run in runs], tmp_path / "report.html")).visible
    for expected in (
        "dolly, top-p 0.8: 200 prompts",
        "BD minus KD",
        "Forward KL ↓",
        "Excess accumulated error, dolly",
        "BD against KD",
        "a_task",
        "Who worked over the run",
        "student ranks",
    ):
        assert expected in text, expected
