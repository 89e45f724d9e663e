"""`plan --measure` refuses jobs of which a sample says nothing, before it looks at anything else."""

from __future__ import annotations

import pytest

from openrlhf_bd.cli.main import main

REFUSED = {
    "online": (["plan", "--algo.distill.mode", "online"], "--algo.distill.mode online"),
    "server": (["plan", "--teacher.api_base", "http://localhost:1/v1"], "--teacher.api_base http://localhost:1/v1"),
    "own responses": (["plan", "--algo.distill.name", "sft"], "--algo.distill.name sft"),
    "evaluation": (["evaluate", "--dry_run"], "this command makes none"),
}


@pytest.mark.parametrize(("argv", "why"), REFUSED.values(), ids=REFUSED.keys())
def test_jobs_that_cannot_be_measured(argv: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows made while the student trains, by a server, or not at all: status 2, and the option that says so."""
    assert main([*argv, "--measure"]) == 2
    assert why in (message := capsys.readouterr().err)
    assert "--measure" in message
