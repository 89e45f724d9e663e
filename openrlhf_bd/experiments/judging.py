"""Judge stages: win rates of pairs of models, over the responses that an evaluation stage saved."""

from __future__ import annotations

from openrlhf_bd.cli.judge import incomplete, judge_progress, rates_table
from openrlhf_bd.driver.progress import console
from openrlhf_bd.errors import ClusterError
from openrlhf_bd.evaluation.judge import judge_pairs
from openrlhf_bd.evaluation.judge_client import api_options
from openrlhf_bd.evaluation.results import labelled_paths, responses_path
from openrlhf_bd.evaluation.win_rates import WinRates, win_rates_path
from openrlhf_bd.experiments.stages import Stage


def judging_finished(stage: Stage) -> bool:
    """Whether the judge was asked for everything."""
    path = win_rates_path(stage.folder)
    return path.exists() and not WinRates.read(path).num_missing


def check_judge(stage: Stage) -> None:
    """Check server and key.

    Raises:
        ConfigError: the URL is none, or there is no key.
    """
    assert stage.judge is not None
    api_options(stage.judge)


def judge_stage(stage: Stage) -> None:
    """Ask the judge for what it was not asked for.

    Raises:
        ClusterError: something is missing; what is judged is kept.
        BDError: see `judge_pairs`.
    """
    assert stage.judge is not None
    assert stage.evaluation is not None
    labels = dict.fromkeys(label for pair in stage.fields.pairs for label in pair)
    files = labelled_paths(stage.evaluation, labels)
    responses = {label: responses_path(file) for label, file in files.items()}
    with judge_progress() as on_progress:
        rates = judge_pairs(responses, stage.fields.pairs, stage.judge, stage.folder, on_progress)
    console.print(rates_table(rates))
    if rates.num_missing:
        raise ClusterError(incomplete(rates))
