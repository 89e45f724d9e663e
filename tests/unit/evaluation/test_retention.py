"""Benchmarks: what is ours, without the harness."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from openrlhf_bd.cli.retention import main, result_paths
from openrlhf_bd.errors import ConfigError, DataError
from openrlhf_bd.evaluation.retention import (
    Metric,
    Retention,
    TaskSettings,
    count_documents,
    parse_results,
)

has_harness = importlib.util.find_spec("lm_eval") is not None


def test_results_by_task_and_metric() -> None:
    """Metrics with their errors; names lose the empty filter, and what is no number is left out."""
    results = {
        "lambada_openai": {
            "alias": "lambada_openai",
            "acc,none": 0.5,
            "acc_stderr,none": 0.05,
            "perplexity,none": 12,
            "perplexity_stderr,none": "N/A",
            "sample_len": 100,
        },
        "gsm8k": {
            "exact_match,strict-match": 0.25,
            "exact_match_stderr,strict-match": 0.1,
            "broken,none": float("nan"),
        },
        "group": {"alias": "group"},
    }
    assert parse_results(results) == {
        "lambada_openai": {"acc": Metric(value=0.5, stderr=0.05), "perplexity": Metric(value=12.0, stderr=None)},
        "gsm8k": {"exact_match,strict-match": Metric(value=0.25, stderr=0.1)},
        "group": {},
    }


def test_documents_are_those_that_counted() -> None:
    """A group's tasks together, after the limit; nothing where the harness does not say."""
    counts = {"a": {"original": 100, "effective": 10}, "b": {"original": 7, "effective": 7}}
    assert count_documents({"n-samples": counts}) == 17
    assert count_documents({}) is None


def test_file_gives_back_what_was_written(tmp_path: Path) -> None:
    """Benchmarks survive their file, and a damaged or missing one is named."""
    written = Retention(
        model="m",
        fingerprint="f",
        harness="0.4.13",
        tasks={"piqa": {"acc": Metric(value=0.6, stderr=None)}},
        settings={"piqa": TaskSettings(num_fewshot=None, limit=10, num_documents=10)},
    )
    written.write(tmp_path / "new" / "retention.json")
    assert Retention.read(tmp_path / "new") == written
    with pytest.raises(DataError, match="openrlhf-bd retention"):
        Retention.read(tmp_path)
    (tmp_path / "retention.json").write_text('{"model": "m"}', encoding="utf-8")
    with pytest.raises(DataError, match=r"retention\.json: fingerprint: Field required"):
        Retention.read(tmp_path)


def model_folder(path: Path, *files: str) -> str:
    path.mkdir(parents=True)
    for name in ("config.json", *files):
        (path / name).write_text("{}", encoding="utf-8")
    return str(path)


def test_where_results_go(tmp_path: Path) -> None:
    """Of a run into its folder, of another model into the named one; a folder that is given takes them all."""
    run, model = model_folder(tmp_path / "run", "run.json"), model_folder(tmp_path / "model")
    assert result_paths([run], None) == {run: Path(run) / "retention.json"}
    out = tmp_path / "out"
    assert result_paths([run, model, "org/name"], out) == {
        run: out / "run.retention.json",
        model: out / "model.retention.json",
        "org/name": out / "org--name.retention.json",
    }
    with pytest.raises(ConfigError, match="--output_dir"):
        result_paths([run, model], None)
    with pytest.raises(ConfigError, match="different folders"):
        result_paths([model, model_folder(tmp_path / "other" / "model")], out)


def test_models_that_are_not_there(tmp_path: Path) -> None:
    """A path without a folder, a folder without a model and a run without a student are three messages."""
    with pytest.raises(DataError, match="not found"):
        result_paths([str(tmp_path / "nowhere")], tmp_path)
    with pytest.raises(DataError, match="expected a model or a run"):
        result_paths([str(tmp_path)], tmp_path)
    (tmp_path / "run.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match="not trained yet"):
        result_paths([str(tmp_path)], None)


def test_wrong_value_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An option's error is that of every other command."""
    assert main([str(tmp_path), "--limit", "0"]) == 2
    assert "--limit is '0'; expected a whole number greater than 0, or none" in capsys.readouterr().err


@pytest.mark.skipif(has_harness, reason="lm_eval is installed")
def test_missing_harness_says_what_to_install(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the extra the command says how to get it, and ends with status 2 before anything else."""
    assert main([model_folder(tmp_path / "run", "run.json")]) == 2
    assert "pip install 'openrlhf-bd[retention]'" in capsys.readouterr().err
