"""The main table."""

import io

from rich.console import Console

from openrlhf_bd.evaluation.results import DatasetScores, Evaluation
from openrlhf_bd.evaluation.tables import MainTable, main_table, terminal_table


def evaluation(rouge_l: list[float], accuracy: list[float] | None = None, nll: list[float] | None = None) -> Evaluation:
    scores = DatasetScores(
        num_prompts=50,
        seeds=list(range(len(rouge_l))),
        rouge_l=rouge_l,
        accuracy=accuracy,
        teacher_nll=nll,
        response_tokens=[4.0] * len(rouge_l),
        stop_rate=[1.0] * len(rouge_l),
    )
    return Evaluation(label="", model="", datasets={"demo": scores})


def table() -> MainTable:
    methods = [
        ("teacher", evaluation([90.0, 90.0, 90.0], [0.9, 0.9, 0.9], [0.1, 0.1, 0.1])),
        ("far", evaluation([10.0, 11.0, 12.0], [0.1, 0.1, 0.1], [2.0, 2.0, 2.0])),
        ("near", evaluation([49.0, 50.0, 51.0], [0.4, 0.5, 0.6], [0.5, 0.5, 0.5])),
        ("best", evaluation([50.0, 51.0, 52.0], [0.5, 0.6, 0.7], [0.4, 0.4, 0.4])),
    ]
    return main_table(methods, "demo", reference_labels=["teacher"])


def marks(column: str) -> list[str | None]:
    made = table()
    index = [score.name for score in made.scores].index(column)
    return [row.cells[index].mark for row in made.rows]


def test_best_and_close_are_marked():
    """The best mean is marked, and so is whatever overlaps with its interval; the reference does not compete."""
    # near: 50 +- 4.303 * 1 / sqrt(3) = 50 +- 2.48, best: 51 +- 2.48: they overlap; far: 11 +- 2.48 does not
    assert marks("rouge_l") == [None, None, "close", "best"]


def test_lower_is_better_for_the_teachers_nll():
    """The lowest teacher NLL is the best one; equal seeds have no width, so nothing overlaps."""
    assert marks("teacher_nll") == [None, None, None, "best"]


def test_descriptions_are_not_ranked():
    """Length and stop rate are neither good nor bad: nothing is marked."""
    assert marks("response_tokens") == [None] * 4
    assert marks("stop_rate") == [None] * 4


def test_accuracy_is_shown_in_percent():
    """Shares are stored between 0 and 1 and shown in percent, with their spread."""
    made = table()
    column = [score.name for score in made.scores].index("accuracy")
    found = made.rows[2].cells[column].estimate
    assert found is not None
    assert abs(found.mean - 50.0) < 1e-9
    assert abs((found.std or 0) - 10.0) < 1e-9


def test_scores_that_nobody_measured_have_no_column():
    """Columns follow what was measured; a method without the score has an empty cell."""
    made = main_table([("a", evaluation([1.0, 2.0])), ("b", evaluation([1.0, 2.0], [0.5, 0.5]))], "demo")
    assert [score.name for score in made.scores] == ["rouge_l", "accuracy", "response_tokens", "stop_rate"]
    assert made.rows[0].cells[1].estimate is None


def test_methods_without_the_test_set_are_left_out():
    """A method that was not evaluated on the set has no row."""
    other = Evaluation(label="", model="", datasets={})
    assert [row.label for row in main_table([("a", other), ("b", evaluation([1.0]))], "demo").rows] == ["b"]


def test_one_method_alone_is_not_the_best():
    """Nothing is marked where there is nothing to compare with."""
    made = main_table([("a", evaluation([1.0, 2.0]))], "demo")
    assert {cell.mark for cell in made.rows[0].cells} == {None}


def test_scores_that_are_not_finite_are_never_best():
    """NaN does not win a column."""
    made = main_table([("a", evaluation([float("nan")])), ("b", evaluation([1.0])), ("c", evaluation([2.0]))], "demo")
    assert [row.cells[0].mark for row in made.rows] == [None, None, "best"]


def test_the_terminal_table_fits_into_80_columns():
    """Every number is legible in a terminal of 80 columns, and markup in a label stays text."""
    methods = [("[red]long label of a run", evaluation([50.0, 51.0, 52.0], [0.5, 0.6, 0.7], [0.4, 0.4, 0.5])), *[]]
    made = main_table([*methods, ("b", evaluation([40.0, 41.0, 42.0], [0.5, 0.5, 0.6], [0.4, 0.5, 0.5]))], "demo")
    out = io.StringIO()
    Console(file=out, width=80).print(terminal_table(made))
    text = out.getvalue()
    assert "…" not in text
    assert "[red]" in text
    assert "51.00±1.00" in text
    assert "60.0±10.0" in text
    assert max(len(line) for line in text.splitlines()) <= 80
