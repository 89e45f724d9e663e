"""The flag --models of `openrlhf-bd evaluate`."""

from __future__ import annotations

import pytest

from openrlhf_bd.cli.evaluate import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models"], "--models has no value; expected label=PATH,label=PATH"),
        (["--models", "--eval.exposure"], "--models has no value"),
        (["--models", "a=x", "--models=b=y"], "--models is given twice; separate its entries by commas"),
        (["--models", "runs/bd"], "--models has 'runs/bd'; expected label=PATH entries"),
        (["--models=a=x@temperature=warm"], "the temperature is 'warm'"),
        (["--models", "a=x", "--dry_run", "--measure"], "--measure generates rows"),
        (["--models", "a=x", "--eval.sedes", "1"], "did you mean --eval.seeds?"),
    ],
)
def test_bad_use_of_models(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str):
    """What is wrong with --models, or with another flag beside it, is one line and exit status 2."""
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
