"""What decides a stage's results: options, contents of local inputs, and the keys of the stages that it reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from openrlhf_bd.config import Config, JudgeOptions
from openrlhf_bd.data.test_sets import parse_test_datasets
from openrlhf_bd.driver.run_folder import run_identity
from openrlhf_bd.experiments.digests import InputDigests

# Of a key, in names of folders.
KEY_LENGTH = 8
# Before the key of a stage, where an option refers to one.
STAGE_PREFIX = "stage:"

_MODELS = ("actor.model_name_or_path", "teacher.model_name_or_path")
_DATA = ("data.prompt_dataset", "data.pretrain_dataset", "eval.dataset")
_ROUTES = ("teacher.routes",)
_TEST_SETS = ("eval.test_datasets",)


def keyed_identity(config: Config, digests: InputDigests) -> dict[str, Any]:
    """The options that decide a run's results, with the contents of local files in the place of their paths.

    Args:
        config: of the job, with `stage:KEY` where it refers to a stage.
        digests: of local files.
    """
    identity = run_identity(config)

    def replace(names: tuple[str, ...], content: Callable[[str], Any]) -> None:
        for name in names:
            if identity[name] is not None:
                identity[name] = content(identity[name])

    replace(_MODELS, lambda name: model_identity(name, digests))
    replace(_DATA, lambda text: [_data(entry, digests) for entry in text.split(",")])
    replace(_ROUTES, lambda text: [_route(entry, digests) for entry in text.split(",")])
    replace(_TEST_SETS, lambda text: _test_sets(text, digests))
    return identity


def model_identity(text: str, digests: InputDigests) -> str:
    """What a model is: `stage:KEY`, the digest of a folder, or a name on a hub; with its sampler's temperature."""
    name, at, temperature = text.partition("@temperature=")
    content = name if name.startswith(STAGE_PREFIX) else digests.model(name)
    return content + at + temperature


# What decides the verdicts of a judge; the other options say how it is asked.
_JUDGE = {"model", "test_set", "seed", "top_p", "constrained"}


def judge_identity(options: JudgeOptions, pairs: Sequence[tuple[str, str]], digests: InputDigests) -> dict[str, Any]:
    """What decides the win rates of a judge, beside the responses.

    Args:
        options: of the judge, with `stage:KEY` where it refers to a stage.
        pairs: that are compared.
        digests: of local files.
    """
    identity = {**options.model_dump(mode="json", include=_JUDGE), "pairs": [list(pair) for pair in pairs]}
    if options.serve is not None:
        identity["model"] = {"serve": model_identity(options.serve, digests)}
    return identity


def _data(entry: str, digests: InputDigests) -> str:
    return entry if entry.startswith(STAGE_PREFIX) else digests.data(entry)


def _route(entry: str, digests: InputDigests) -> list[str]:
    value, _, model = entry.partition("=")
    return [value.strip(), model_identity(model.strip(), digests)]


def _test_sets(text: str, digests: InputDigests) -> list[Any]:
    return [[name, _data(found.path, digests), found.keys] for name, found in parse_test_datasets(text).items()]
