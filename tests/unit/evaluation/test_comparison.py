"""The comparison report of an experiment, from synthetic output folders."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from openrlhf_bd.errors import DataError
from openrlhf_bd.evaluation.comparison import write_comparison
from openrlhf_bd.evaluation.comparison_tables import overview_sheet, paper_sheet, sampled_tables
from openrlhf_bd.evaluation.costs import cost_sheet, time_sheet, time_to_best
from openrlhf_bd.evaluation.experiment_data import read_pipeline
from openrlhf_bd.evaluation.retention import Metric, Retention
from openrlhf_bd.evaluation.run_data import Curve, RunData
from openrlhf_bd.evaluation.score_sheets import paired_sheet, pairs_of
from openrlhf_bd.evaluation.sheets import SheetCell
from tests.unit.evaluation.experiments import GROUPS, METHODS, add_judge, make_experiment
from tests.unit.evaluation.pages import Page

HOSTILE = "<script>alert('x')</script>"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, Path, dict[str, Any]]:
    """The page of an experiment of two groups, its folder and its record."""
    folder = tmp_path_factory.mktemp("experiment")
    view = make_experiment(folder, groups=GROUPS[1:3], methods=METHODS[1:], test_sets=("dolly",))
    add_judge(view, folder)
    bd = Path(next(stage for stage in view["stages"] if stage["label"] == "BD")["folder"])
    tasks = {"a_task": {"acc": Metric(value=0.25, stderr=0.01)}}
    Retention(model="m", fingerprint="f", harness="0.4", tasks=tasks).write(bd / "retention.json")
    span = {"lane": "student ranks", "activity": "train", "start_s": 10.0, "end_s": 11.0, "step": 1, "session": 1}
    (bd / "timeline.jsonl").write_text(json.dumps(span) + "\n", encoding="utf-8")
    write_comparison(view, folder / "table1.html")
    return Page((folder / "table1.html").read_text(encoding="utf-8")), folder, view


def test_one_page_has_all_of_an_experiment(whole: tuple[Page, Path, dict[str, Any]]):
    """Tables with the published figures, differences, exposure, curves, times, win rates, timeline, cost and advice."""
    text = whole[0].visible
    for expected in (
        "An experiment <of> 2 groups",
        "Toy scale",
        "All groups: Rouge-L",
        "GPT-2 340M",
        "top-p 0.8",
        "for orientation only",
        "BD minus KD",
        "Excess accumulated error, dolly",
        "Validation Rouge-L",
        "Time to the best validation Rouge-L",
        "BD / MiniLLM",
        "Win rates on dolly, judged by a-judge",
        "prints no number",
        "Who worked over the run",
        "GPU hours",
        "a_task",
        "One training seed",
    ):
        assert expected in text, expected


def test_the_page_is_whole_and_stands_alone(whole: tuple[Page, Path, dict[str, Any]]):
    """The page is well-formed, loads nothing, runs nothing, and its links lead into itself."""
    page, _, _ = whole
    page.assert_stands_alone()
    assert page.html.startswith("<!DOCTYPE html>")
    assert "Content-Security-Policy" in page.html
    assert "http://" not in page.html.replace("http://www.w3.org/", "")
    assert "https://" not in page.html


def test_texts_are_escaped(tmp_path: Path):
    """Names of stages, groups, labels and titles are shown as text."""
    view = make_experiment(tmp_path, groups=["GPT-2 120M"], methods=METHODS[4:], test_sets=("dolly",), num_steps=2)
    view["title"] = HOSTILE
    for stage in view["stages"]:
        stage |= {"name": f"{HOSTILE}-{stage['name']}", "group": HOSTILE, "state": HOSTILE}
        stage["label"] = HOSTILE if stage["label"] else None
    write_comparison(view, tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    Page(html).assert_stands_alone()
    assert html.count("&lt;script&gt;") >= 5


def test_every_figure_and_table_is_a_file_too(tmp_path: Path):
    """Each figure and table is there as PNG and CSV, under one name."""
    view = make_experiment(tmp_path, groups=GROUPS[1:2], methods=METHODS[3:], test_sets=("dolly",), num_steps=1)
    add_judge(view, tmp_path)
    write_comparison(view, tmp_path / "table1.html", tmp_path / "figures")
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {name.removesuffix(".png") for name in names if name.endswith(".png")} == {
        name.removesuffix(".csv") for name in names if name.endswith(".csv")
    }
    expected = {"gpt_2_340m_scores", "gpt_2_340m_paired", "gpt_2_340m_excess_error_dolly", "gpt_2_340m_eval_rouge_l"}
    expected |= {"cost", "stages", "time_to_best", "win_rates_judge", "figure2_judge"}
    assert {f"{name}.png" for name in expected} <= names
    with (tmp_path / "figures" / "gpt_2_340m_scores.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["method"] == "BD"]
    assert [(row["test_set"], row["top_p"], row["published"]) for row in rows] == [
        ("dolly", "1.0", "25.8"),
        ("dolly", "0.8", "25.8"),
    ]


def test_published_figures_stand_beside_ours_and_apart(whole: tuple[Page, Path, dict[str, Any]]):
    """Each test set has its samplers and then the paper's figure; a row that only the paper has says so."""
    data = read_pipeline(whole[2])
    group = data.groups[0]
    sheet = paper_sheet(data, group, sampled_tables(group))
    assert sheet is not None
    assert [heading.text for heading in sheet.headings[1]] == ["top-p 1.0", "top-p 0.8", "published"]
    rows = {row.label: row for row in sheet.rows}
    assert list(rows) == ["Teacher", "KD", "SeqKD", "MiniLLM", "BD", "SFT"]
    assert rows["KD"].cells[2].text == "25.0"
    assert rows["KD"].cells[2].style == "published"
    assert rows["SFT"].small == "not run here"
    assert [cell.text for cell in rows["SFT"].cells] == ["–", "–", "25.5"]
    assert rows["Teacher"].is_reference
    assert rows["BD"].cells[0].style == "best"


def test_no_published_figure_stands_beside_another_objective(tmp_path: Path):
    """A run with preset robust has no published figure, even in a row called BD."""
    view = make_experiment(tmp_path, groups=["GPT-2 120M"], methods=["BD"], test_sets=("dolly",), num_steps=2)
    config = Path(view["stages"][0]["folder"]) / "config.yaml"
    assert cells_of_bd(view)[2].text == "24.7"
    config.write_text(config.read_text(encoding="utf-8").replace("preset: paper", "preset: robust"), encoding="utf-8")
    assert cells_of_bd(view)[2].text == "–"


def cells_of_bd(view: dict[str, Any]) -> tuple[SheetCell, ...]:
    data = read_pipeline(view)
    sheet = paper_sheet(data, data.groups[0], sampled_tables(data.groups[0]))
    assert sheet is not None
    return next(row.cells for row in sheet.rows if row.label == "BD")


def test_the_overview_has_families_beside_and_sizes_below_each_other(tmp_path: Path):
    """As in Table 1 families are columns; a family without a second size has dashes there."""
    view = make_experiment(
        tmp_path, groups=["GPT-2 120M", "GPT-2 340M", "OPT 125M"], methods=["BD"], test_sets=("dolly",), num_steps=2
    )
    data = read_pipeline(view)
    sheet = overview_sheet(data, [(group, sampled_tables(group)) for group in data.groups])
    assert sheet is not None
    assert [(heading.text, heading.span) for heading in sheet.headings[0]] == [("GPT-2", 1), ("OPT", 1)]
    assert [row.label for row in sheet.rows] == ["GPT-2 120M, OPT 125M", "Teacher", "BD", "GPT-2 340M", "Teacher", "BD"]
    assert [cell.small for cell in sheet.rows[2].cells] == ["paper 24.7", "paper 25.1"]
    assert [cell.text for cell in sheet.rows[5].cells][1] == "–"


def test_what_is_missing_is_said(tmp_path: Path):
    """Stages that did not run leave a page that names them, and no zero in the place of a score."""
    view = make_experiment(tmp_path, groups=["GPT-2 120M"], methods=METHODS[3:], test_sets=("dolly",), num_steps=2)
    blank = {"started": None, "seconds": None, "gpus": None, "state": "waiting", "group": "OPT 125M"}
    view["stages"] += [
        {"name": "opt-bd", "kind": "train", "label": "BD", "folder": str(tmp_path / "opt-bd-0")} | blank,
        {"name": "opt-rows", "kind": "generate", "label": None, "folder": str(tmp_path / "opt-rows-0")} | blank,
        {"name": "opt-judge", "kind": "judge", "label": None, "folder": str(tmp_path / "opt-judge-0")} | blank,
    ]
    write_comparison(view, tmp_path / "page.html")
    text = Page((tmp_path / "page.html").read_text(encoding="utf-8")).visible
    for expected in (
        "3 of 6 stages are not finished",
        "This group has one run and no scores",
        "No rows yet (state: waiting)",
        "Not judged yet (state: waiting)",
        "No run of this group has metrics",
        "3 of 6 stages have no time, and are not in the sum",
        "No stage recorded a timeline",
    ):
        assert expected in text, expected


def test_an_experiment_without_a_finished_stage_has_a_page(tmp_path: Path):
    """Even a record with nothing in it gives a page."""
    write_comparison({"title": "Nothing", "stages": []}, tmp_path / "page.html", tmp_path / "figures")
    assert "there are no methods to compare" in Page((tmp_path / "page.html").read_text(encoding="utf-8")).visible


def test_a_record_without_stages_is_refused(tmp_path: Path):
    """A record of another form is named, with what was expected."""
    with pytest.raises(DataError, match=r'no "stages"; expected a list'):
        write_comparison({"title": "Nothing"}, tmp_path / "page.html")


def test_a_model_at_another_temperature_is_a_sampler_not_a_run(tmp_path: Path):
    """PATH@temperature=T is a row of its own, without the run's curves, which are there once."""
    view = make_experiment(tmp_path, groups=["GPT-2 120M"], methods=["SFT"], test_sets=("dolly",), num_steps=2)
    evaluation = view["stages"][-1]
    evaluation["models"]["Sharp"] = f"{evaluation['models']['SFT']}@temperature=0.5"
    runs = {run.label: run for run in read_pipeline(view).groups[0].methods}
    assert runs["SFT"].curves
    assert not runs["Sharp"].curves
    assert runs["Sharp"].evaluation is None


def test_pairs_follow_the_papers_tables():
    """BD is compared with all; each p with p = 1.0; with chi-squared with without; nothing else with anything."""
    assert pairs_of(["KD", "BD", "BD robust"]) == [("BD", "KD"), ("BD", "BD robust")]
    assert pairs_of(["p = 1.0", "p = 0.8", "p = 0.5"]) == [("p = 0.8", "p = 1.0"), ("p = 0.5", "p = 1.0")]
    assert pairs_of(["with chi-squared", "without chi-squared"]) == [("with chi-squared", "without chi-squared")]
    assert pairs_of(["a", "b"]) == []


def test_differences_are_signed_and_marked():
    """The table shows first minus second with its interval, bold where the interval leaves zero out."""
    scores = {"BD": {"a": [3.0], "b": [5.0]}, "KD": {"a": [1.0], "b": [2.0]}, "SFT": {"a": [4.0], "b": [4.0]}}
    runs = [RunData(label, by_prompt={"dolly": by_prompt}) for label, by_prompt in scores.items()]
    sheet = paired_sheet(runs, (), name="paired")
    assert sheet is not None
    # BD - KD: 2 and 3; BD - SFT: -1 and 1.
    cells = {row.label: row.cells[0] for row in sheet.rows}
    assert (cells["BD minus KD"].text, cells["BD minus KD"].small) == ("+2.50", "+2.00 to +3.00")
    assert cells["BD minus KD"].style == "best"
    assert (cells["BD minus SFT"].text, cells["BD minus SFT"].style) == ("+0.00", "")
    assert paired_sheet(runs, ["KD", "SFT"], name="paired") is None


def timed_run(label: str, minutes_a_step: float, **more: Any) -> RunData:
    """Four steps with validation at 2 and 4, the better one first; step 1 took 30 seconds."""
    clock = Curve((1, 2, 3, 4), tuple(1000.0 + 60 * minutes_a_step * step for step in range(4)))
    curves = {
        "eval/rouge_l": Curve((2, 4), (20.0, 19.0)),
        "train/time_data_s": Curve((1, 2, 3, 4), (10.0,) * 4),
        "train/time_forward_backward_s": Curve((1, 2, 3, 4), (20.0,) * 4),
    }
    return RunData(label, clock=clock, curves=curves, **more)


def test_time_to_best_by_hand(tmp_path: Path):
    """From the start of step 1 to the validation of the best step; rows count where they were made beforehand."""
    # One step later: 60 s, and 30 s of the first step.
    store = {
        "teacher": {"store_path": str(tmp_path / "rows" / "teacher_data")},
        "algo": {"distill": {"mode": "offline"}},
    }
    found = time_to_best(timed_run("BD", 1.0, config=store), {(tmp_path / "rows" / "teacher_data"): 100.0})
    assert found is not None
    assert (found.step, found.num_steps, found.score, found.training_s) == (2, 4, 20.0, 90.0)
    assert (found.rows_s, found.whole_s) == (100.0, 190.0)
    online = time_to_best(timed_run("MiniLLM", 1.0, config={"algo": {"distill": {"mode": "online"}}}), {})
    assert online is not None
    assert online.whole_s == 90.0
    unknown = time_to_best(timed_run("BD", 1.0, config=store), {})
    assert unknown is not None
    assert (unknown.rows_s, unknown.whole_s) == (None, None)
    assert time_to_best(RunData("none"), {}) is None


def test_ratio_stands_beside_the_published_one(whole: tuple[Page, Path, dict[str, Any]]):
    """BD / MiniLLM is ours of training, ours with rows, and the paper's 1.3 / 11.2 = 0.12."""
    sheet = time_sheet(read_pipeline(whole[2]))
    assert sheet is not None
    row = next(row for row in sheet.rows if row.label == "BD / MiniLLM")
    assert [cell.text for cell in row.cells[2:]] == ["1.00", "", "1.00", "0.12"]


def test_cost_is_time_times_accelerators(tmp_path: Path):
    """A stage of 1,800 s on 4 GPUs costs 2 GPU hours; one without a time is left out of the sum and counted."""
    stage = {
        "name": "a",
        "kind": "train",
        "folder": "a",
        "state": "finished",
        "started": 1.0,
        "seconds": 1800.0,
        "gpus": 4,
    }
    waiting = {"name": "b", "kind": "train", "folder": str(tmp_path / "b"), "state": "waiting"}
    sheet = cost_sheet(read_pipeline({"stages": [stage, waiting]}).stages)
    assert [row.cells[4].text for row in sheet.rows] == ["2.00", "–", "2.00"]
    assert "1 of 2 stages have no time" in sheet.note
    priced = cost_sheet(read_pipeline({"stages": [stage, waiting]}).stages, price=2.5)
    assert [row.cells[5].text for row in priced.rows] == ["5.00", "–", "5.00"]
