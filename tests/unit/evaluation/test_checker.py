"""Loading a checker by name."""

import pytest

from openrlhf_bd.errors import ConfigError
from openrlhf_bd.evaluation.checker import load_checker


def test_a_checker_is_found_by_its_dotted_name():
    """package.module:function names the function itself."""
    from openrlhf_bd.demo.corpus import is_correct

    assert load_checker("openrlhf_bd.demo.corpus:is_correct") is is_correct


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("is_correct", "expected package.module:function"),
        (":is_correct", "expected package.module:function"),
        ("openrlhf_bd.demo.corpus:", "expected package.module:function"),
        ("no_such_package.checks:right", "cannot be imported"),
        ("openrlhf_bd.demo.corpus:is_corect", "has no 'is_corect'"),
        ("openrlhf_bd.demo.corpus:NUM_BUCKETS", "found a int"),
    ],
)
def test_a_wrong_name_is_a_config_error_that_says_why(name: str, message: str):
    """A name that leads nowhere ends as a ConfigError with the option, the finding and the expected form."""
    with pytest.raises(ConfigError, match=message) as caught:
        load_checker(name)
    assert "--eval.checker" in str(caught.value)
    assert caught.value.exit_status == 2
