import pytest

from benchmarks._options import PRESETS, objective_options
from openrlhf_bd import config


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_plain_options_equal_the_configuration(preset: str) -> None:
    """The options that benchmarks use without pydantic are those of the configuration's preset, all of them."""
    assert vars(objective_options(preset)) == config.BellmanOptions(**config.PRESETS[preset]).model_dump()


def test_changes_replace_values() -> None:
    """A change replaces one value; a name that is no option is refused."""
    assert objective_options("robust", tail_coef=0.0).tail_coef == 0.0
    assert objective_options("robust").tail_coef == 1.0
    with pytest.raises(TypeError, match="tail_cof"):
        objective_options("robust", tail_cof=0.0)
