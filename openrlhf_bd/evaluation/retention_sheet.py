"""What models keep of general ability, as a table."""

from __future__ import annotations

from collections.abc import Sequence

from openrlhf_bd.evaluation.retention import Metric
from openrlhf_bd.evaluation.run_data import RunData
from openrlhf_bd.evaluation.sheets import EMPTY, Heading, Sheet, SheetCell, SheetRow


def retention_sheet(methods: Sequence[RunData], *, name: str) -> Sheet | None:
    """Benchmarks by method: a column a task and metric, in the harness's unit, with its standard error.

    Returns:
        None where no method was measured.
    """
    measured = [(run.label, run.retention) for run in methods if run.retention is not None and run.retention.tasks]
    columns = list(
        dict.fromkeys((task, metric) for _, item in measured for task in item.tasks for metric in item.tasks[task])
    )
    if not columns:
        return None
    versions = ", ".join(dict.fromkeys(item.harness for _, item in measured))
    return Sheet(
        name,
        "Standard benchmarks",
        "Method",
        (tuple(Heading(task, metric) for task, metric in columns),),
        tuple(
            SheetRow(label, tuple(_cell(item.tasks.get(task, {}).get(metric)) for task, metric in columns))
            for label, item in measured
        ),
        f"lm-evaluation-harness {versions}, each metric in its unit; ± is the standard error over documents. Compare "
        "rows only, and only where documents and examples in the prompt are the same.",
        ("method", "task", "metric", "value", "stderr"),
        tuple(
            (label, task, metric, found.value, found.stderr)
            for label, item in measured
            for task, metrics in item.tasks.items()
            for metric, found in metrics.items()
        ),
    )


def _cell(metric: Metric | None) -> SheetCell:
    if metric is None:
        return EMPTY
    return SheetCell(f"{metric.value:.4g}", "" if metric.stderr is None else f"± {metric.stderr:.2g}")
