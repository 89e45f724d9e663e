"""Where Liger's kernels are refused. The kernels themselves need CUDA, so no test here runs them."""

import importlib.util

import pytest

from openrlhf_bd.config import Config
from openrlhf_bd.errors import ConfigError
from openrlhf_bd.student.liger import check_liger

WANTED = Config.model_validate({"ds": {"use_liger_kernel": True}})


def test_family_without_kernels() -> None:
    """A family that Liger has no kernels for is refused by name, rather than trained without them."""
    with pytest.raises(ConfigError, match=r"kernels for llama, qwen2, qwen3, none for opt"):
        check_liger(WANTED, "opt", on_cpu=False)


def test_cpu() -> None:
    """CPUs are refused."""
    with pytest.raises(ConfigError, match="need CUDA"):
        check_liger(WANTED, "qwen2", on_cpu=True)


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is not None, reason="liger-kernel is installed")
def test_package_is_missing() -> None:
    """On a machine with CUDA the missing package is named, and how to install it."""
    with pytest.raises(ConfigError, match="pip install liger-kernel"):
        check_liger(WANTED, "qwen2", on_cpu=False)


def test_off() -> None:
    """Nobody who does not ask for it is refused."""
    check_liger(Config(), "opt", on_cpu=True)
