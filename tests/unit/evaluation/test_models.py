"""Models as they are written on the command line."""

from __future__ import annotations

import pytest

from openrlhf_bd.errors import ConfigError
from openrlhf_bd.evaluation.models import EvaluatedModel, parse_models


def test_a_model_may_have_a_temperature_of_its_own():
    """A path may be followed by a temperature; without one the sampler is that of all models."""
    assert EvaluatedModel.parse("runs/bd") == EvaluatedModel("runs/bd", None)
    assert EvaluatedModel.parse("org/name@temperature=0.7") == EvaluatedModel("org/name", 0.7)
    assert EvaluatedModel.parse("a@b@temperature=0") == EvaluatedModel("a@b", 0.0)


@pytest.mark.parametrize("text", ["", "@temperature=1", "x@temperature=", "x@temperature=-1", "x@temperature=inf"])
def test_a_bad_model(text: str):
    """No path, or a temperature that none can be sampled at, is refused."""
    with pytest.raises(ConfigError, match="model "):
        EvaluatedModel.parse(text)


def test_models_have_labels():
    """Entries are label=PATH, in the order given; a label may have spaces and colons."""
    found = parse_models("Teacher=org/name, bd:robust=runs/bd,SFT at 0.7=runs/sft@temperature=0.7")
    assert list(found.items()) == [
        ("Teacher", "org/name"),
        ("bd:robust", "runs/bd"),
        ("SFT at 0.7", "runs/sft@temperature=0.7"),
    ]


@pytest.mark.parametrize("text", ["", "runs/bd", "=x", "a=", "a=x,,b=y", "a=x,a=y", "runs/bd@temperature=0.7"])
def test_bad_entries(text: str):
    """An entry without label or path, or a label that is given twice, is refused."""
    with pytest.raises(ConfigError, match="--models"):
        parse_models(text)
