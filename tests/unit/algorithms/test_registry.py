import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from openrlhf_bd.algorithms import (
    Algorithm,
    LossOutput,
    Needs,
    available_algorithms,
    register_algorithm,
    registry,
    resolve_algorithm,
)
from openrlhf_bd.config import DistillConfig
from openrlhf_bd.errors import ConfigError

MODULE = '''
from openrlhf_bd.algorithms import Algorithm, LossOutput, Needs

class Toy(Algorithm):
    """A toy.

    More about it.
    """

    @classmethod
    def needs_of(cls, options):
        return Needs(rollouts="gold")

    def loss(self, head, sets, trajectories, *, num_tokens, num_rows):
        return LossOutput(head.logsumexp().sum(), {})

not_an_algorithm = 3
'''


class Plain(Algorithm):
    """Registered by a test."""

    @classmethod
    def needs_of(cls, options: DistillConfig) -> Needs:
        return Needs(rollouts="gold")

    def loss(self, *args: object, **kwargs: object) -> LossOutput:
        raise NotImplementedError


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path with module bd_toy_plugin; restores the registry and the imported modules."""
    (tmp_path / "bd_toy_plugin.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = dict(registry._registered)
    yield tmp_path
    registry._registered.clear()
    registry._registered.update(before)
    sys.modules.pop("bd_toy_plugin", None)


def install(folder: Path, package: str, entry_points: str) -> None:
    """Make the folder look like an installed package with entry points, as pip leaves it."""
    info = folder / f"{package.replace('-', '_')}-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.1\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[openrlhf.algorithms]\n{entry_points}\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "class_name"),
    [
        ("bd", "BellmanDistill"),
        ("gkd", "GeneralisedDistill"),
        ("kd", "WordDistill"),
        ("minillm", "MiniLLM"),
        ("rkl", "ReverseDistill"),
        ("seqkd", "SequenceDistill"),
        ("sft", "SupervisedFineTuning"),
    ],
)
def test_built_in_names(name: str, class_name: str) -> None:
    """Each built-in name resolves to its class."""
    assert resolve_algorithm(name).__name__ == class_name


def test_dotted_path(plugin: Path) -> None:
    """package.module:Class needs no registration."""
    assert resolve_algorithm("bd_toy_plugin:Toy").__name__ == "Toy"


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("bd_toy_plugin:Toi", 'has no Toi; did you mean "Toy"'),
        ("bd_toy_plugin:not_an_algorithm", "not a subclass"),
        ("bd_no_such_plugin:Toy", "cannot import bd_no_such_plugin"),
        (":Toy", "package.module:Class"),
        ("bd_toy_plugin:", "package.module:Class"),
    ],
)
def test_bad_dotted_paths(plugin: Path, name: str, match: str) -> None:
    """Each way in which a dotted path can be wrong has its own message."""
    with pytest.raises(ConfigError, match=match):
        resolve_algorithm(name)


def test_unknown_name_names_the_nearest() -> None:
    """A typo is answered with the name that was meant."""
    with pytest.raises(ConfigError, match='did you mean "seqkd"') as caught:
        resolve_algorithm("seq_kd")
    assert "bd, gkd, kd, minillm, rkl, seqkd, sft" in str(caught.value)


def test_entry_point_of_an_installed_package(plugin: Path) -> None:
    """A name of the group openrlhf.algorithms resolves, and is listed with its package and summary."""
    install(plugin, "toy-package", "toy = bd_toy_plugin:Toy\nbroken = bd_toy_plugin:Missing")
    assert resolve_algorithm("toy").__name__ == "Toy"
    rows = {name: (summary, origin) for name, summary, origin in available_algorithms()}
    assert rows["toy"] == ("A toy.", "package toy-package")
    assert rows["broken"][0].startswith("unusable: ")
    assert rows["bd"][1] == "built-in"
    assert rows["bd"][0].startswith("Bellman Distill: ")


def test_two_packages_with_one_name(plugin: Path) -> None:
    """Two different classes under one entry-point name are refused; the message gives both paths."""
    install(plugin, "toy-one", "toy = bd_toy_plugin:Toy")
    install(plugin, "toy-two", "toy = bd_other_plugin:Toy")
    with pytest.raises(ConfigError, match="bd_other_plugin:Toy, bd_toy_plugin:Toy"):
        resolve_algorithm("toy")


def test_registered_name(plugin: Path) -> None:
    """The decorator gives a class a name; the name of another class is refused, built-in ones too."""
    assert register_algorithm("plain")(Plain) is Plain
    assert register_algorithm("plain")(Plain) is Plain
    assert resolve_algorithm("plain") is Plain
    assert ("plain", "Registered by a test.", f"registered by {__name__}") in available_algorithms()
    with pytest.raises(ConfigError, match='"plain" belongs to'):
        register_algorithm("plain")(resolve_algorithm("bd"))
    with pytest.raises(ConfigError, match='"bd" belongs to openrlhf_bd'):
        register_algorithm("bd")(Plain)


def test_package_offers_what_is_built_in() -> None:
    """The entry points that other programs find are the built-in algorithms, all of them, under the same names."""
    pyproject = Path(registry.__file__).parents[2] / "pyproject.toml"
    offered = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["entry-points"]
    assert offered[registry.ENTRY_POINT_GROUP] == registry.BUILT_IN
