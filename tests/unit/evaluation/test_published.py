"""The paper's figures as data."""

import pytest

from openrlhf_bd.errors import ConfigError
from openrlhf_bd.evaluation.published import TEST_SETS, published


def test_every_row_has_one_figure_a_column():
    """Tables 1 to 4 have all their rows and columns: 126, 27, 6 and 12 figures."""
    counts = {}
    for name in ("table1", "table2", "table3", "table4"):
        table = published(name)
        rows = [figures for block in table.groups.values() for figures in block.values()]
        assert all(len(figures) == len(table.columns) for figures in rows)
        counts[name] = sum(map(len, rows))
    assert counts == {"table1": 126, "table2": 27, "table3": 6, "table4": 12}


@pytest.mark.parametrize(
    ("table", "group", "label", "column", "expected"),
    [
        ("table1", "GPT-2 120M", "BD", "dolly", 24.7),
        ("table1", "qwen2.5 0.5b", "Teacher", "SelfInst", 24.1),
        ("table1", "OPT 1.3B", "BD (Ours)", "self_inst", 15.1),
        ("table1", "OPT 13B", "BD", "dolly", None),
        ("table1", "GPT-2 120M", "GKD", "dolly", None),
        ("table1", "GPT-2 120M", "BD", "math", None),
        ("table2", "OPT 125M", "BD, p = 0.5", "vicuna", 14.7),
        ("table2", "OPT 125M", "BD", "vicuna", 14.8),
        ("table3", "OPT 350M", "MiniLLM", "hours", 12.8),
        ("table4", "GPT-2 760M", "BD without chi-squared", "dolly", 25.9),
        ("table4", "GPT-2 760M", "BD", "dolly", 26.2),
        ("figure1", "Qwen2.5 3B", "top 50", "mass", 0.96),
    ],
)  # fmt: skip
def test_figures_are_found_by_name(table: str, group: str, label: str, column: str, expected: float | None):
    """A row is found whatever the spelling of its group, label and test set; what the paper lacks is None."""
    assert published(table).find(group, label, column) == expected


def test_tables_agree_where_the_paper_repeats_itself():
    """Tables 2 and 4 repeat rows of Table 1: p = 0.8, and with chi-squared, are BD there."""
    for name in ("table2", "table4"):
        for group in published(name).groups:
            for test_set in TEST_SETS:
                assert published(name).find(group, "BD", test_set) == published("table1").find(group, "BD", test_set)


def test_an_unknown_name_is_refused():
    """A table that the paper does not have is named, with those it has."""
    with pytest.raises(ConfigError, match=r"table9.*table1, table2"):
        published("table9")
