"""Judge stages: win rates of pairs of models, over the responses that an evaluation stage saved."""

from __future__ import annotations

from openrlhf_bd.cli.judge import incomplete, judge_and_host, judge_progress, rates_table
from openrlhf_bd.driver.judge_server import check_served
from openrlhf_bd.driver.progress import console
from openrlhf_bd.errors import ClusterError
from openrlhf_bd.evaluation.judge import judge_pairs
from openrlhf_bd.evaluation.judge_client import api_options
from openrlhf_bd.evaluation.results import labelled_paths, responses_path
from openrlhf_bd.evaluation.win_rates import WinRates, win_rates_path
from openrlhf_bd.experiments.layers import SERVE
from openrlhf_bd.experiments.stages import Stage


def judging_finished(stage: Stage) -> bool:
    """Whether the judge was asked for everything."""
    path = win_rates_path(stage.folder)
    return path.exists() and not WinRates.read(path).num_missing


def check_judge(stage: Stage, *, inputs_ready: bool) -> None:
    """Check server and key, or the model that is to be served.

    Raises:
        ConfigError, DataError: the URL is none, or there is no key; or the model is not what it should be.
    """
    assert stage.judge is not None
    if stage.judge.serve is None:
        api_options(stage.judge)
    elif inputs_ready:
        check_served(stage.judge.serve, stage.judge)
    elif stage.stand_in is not None:
        check_served(stage.stand_in.models[SERVE], stage.judge)


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
    options, host = judge_and_host(stage.judge, stage.folder)
    with judge_progress() as on_progress:
        rates = judge_pairs(responses, stage.fields.pairs, options, stage.folder, on_progress, host)
    console.print(rates_table(rates))
    if rates.num_missing:
        raise ClusterError(incomplete(rates))
