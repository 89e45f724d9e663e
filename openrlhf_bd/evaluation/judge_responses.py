"""The saved responses that a judge compares: of one test set, seed and nucleus, matched by prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from openrlhf_bd.config import JudgeOptions
from openrlhf_bd.errors import DataError
from openrlhf_bd.evaluation.results import RESPONSES_FILE, Evaluation, SavedResponse, evaluation_path, read_responses
from openrlhf_bd.paths import nearest_path_hint


@dataclass(frozen=True, slots=True)
class Match:
    """Two methods' responses to the same prompts.

    Attributes:
        a: label of the first method.
        b: label of the second.
        prompts: (response of a, response of b), in the order of a's file.
        only_a: prompts that b has no response to.
        only_b: prompts that a has no response to.
    """

    a: str
    b: str
    prompts: list[tuple[SavedResponse, SavedResponse]]
    only_a: int
    only_b: int


def find_responses(path: Path) -> Path:
    """The responses in a run folder; in another folder the only file of responses there; a file is itself.

    Raises:
        DataError: there is none, or there are several.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise DataError(
            f"{path}: not found{nearest_path_hint(path)}; expected the folder of an evaluation, or its {RESPONSES_FILE}"
        )
    own = path / RESPONSES_FILE
    found = [own] if own.is_file() else sorted(path.glob(f"*.{RESPONSES_FILE}"))
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(f"{path}: holds {', '.join(file.name for file in found)}; name one of these files")
    raise DataError(
        f"{path}: holds no {RESPONSES_FILE}, expected the responses of an evaluation; run `openrlhf-bd evaluate` there "
        "first"
    )


def choose_responses(path: Path, options: JudgeOptions) -> dict[str, SavedResponse]:
    """The responses of `options.test_set`, `seed` and `top_p` by prompt id.

    Args:
        path: a file of responses.
        options: which of them.

    Raises:
        DataError: the file is not there or damaged, has none of these, or has two to one prompt.
    """
    wanted = (options.test_set, options.seed, options.top_p)
    responses = read_responses(path)
    chosen: dict[str, SavedResponse] = {}
    for response in responses:
        if _sampled(response) != wanted:
            continue
        if response.prompt_id in chosen:
            raise DataError(
                f"{path}: two responses to prompt {response.prompt_id!r} of {_name(wanted)}, expected one; evaluate "
                "the model again"
            )
        chosen[response.prompt_id] = response
    if not chosen:
        raise DataError(
            f"{path}: no response of {_name(wanted)}; {_what_is_there(responses)}. Name what is there by test_set, "
            "seed and top_p"
        )
    return chosen


def match_responses(a: str, b: str, responses: Mapping[str, Mapping[str, SavedResponse]]) -> Match:
    """Put two methods' responses to the same prompts together.

    Args:
        a: label of the first method.
        b: label of the second.
        responses: of each label, by prompt id.

    Raises:
        DataError: they share no prompt, or one id names two prompts.
    """
    of_a, of_b = responses[a], responses[b]
    shared = [prompt_id for prompt_id in of_a if prompt_id in of_b]
    for prompt_id in shared:
        one, other = of_a[prompt_id], of_b[prompt_id]
        if (one.instruction, one.input) != (other.instruction, other.input):
            raise DataError(
                f"{a} and {b} were evaluated on different prompts: prompt {prompt_id!r} of {one.test_set!r} is "
                f"{one.instruction[:60]!r} to {a}, and {other.instruction[:60]!r} to {b}; evaluate both on one file"
            )
    if not shared:
        raise DataError(
            f"{a} and {b} share no prompt: {a} has {len(of_a)}, such as {next(iter(of_a))!r}, {b} has {len(of_b)}, "
            f"such as {next(iter(of_b))!r}; evaluate both on one file"
        )
    return Match(
        a,
        b,
        prompts=[(of_a[prompt_id], of_b[prompt_id]) for prompt_id in shared],
        only_a=len(of_a) - len(shared),
        only_b=len(of_b) - len(shared),
    )


def label_of(path: Path) -> str:
    """Name of the method whose responses a file holds: LABEL of LABEL.responses.jsonl, else what its folder says.

    Args:
        path: the file.
    """
    if path.name.endswith(f".{RESPONSES_FILE}"):
        return path.name.removesuffix(f".{RESPONSES_FILE}")
    if path.name == RESPONSES_FILE and evaluation_path(path.parent).is_file():
        return Evaluation.read(path.parent).label
    return path.resolve().parent.name if path.name == RESPONSES_FILE else path.stem


def _sampled(response: SavedResponse) -> tuple[str, int, float]:
    return response.test_set, response.seed, response.top_p


def _what_is_there(responses: Sequence[SavedResponse]) -> str:
    there = sorted({_sampled(response) for response in responses})
    return f"it has {'; '.join(_name(sampled) for sampled in there[:8])}" if there else "it is empty"


def _name(sampled: tuple[str, int, float]) -> str:
    test_set, seed, top_p = sampled
    return f"{test_set}, seed {seed}, top-p {top_p:g}"
