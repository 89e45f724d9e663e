"""`judgements.jsonl`: what a judge answered, one line a question, only ever appended to. No question is paid for twice.

A last line without a line break is what an interruption left of one: it does not count, and the next takes its place.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from openrlhf_bd.errors import DataError, RunFolderError
from openrlhf_bd.evaluation.judge_prompt import Verdict
from openrlhf_bd.paths import existing_parent
from openrlhf_bd.store.folder import LocalFolder

JUDGEMENTS_FILE = "judgements.jsonl"


class Judgement(BaseModel):
    """What became of one question.

    Attributes:
        key: digest of judge, prompt, instruction, input and both answers in their order.
        model: name of the judge.
        test_set: of the prompt.
        prompt_id: of the prompt.
        shown_a: label of the method whose answer was shown as A.
        shown_b: label of the other.
        verdict: None where no answer was one.
        answers: what the judge said, the last one being the verdict.
        prompt_tokens: of all requests together; None where the server does not count.
        completion_tokens: of all answers together, likewise.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str
    model: str
    test_set: str
    prompt_id: str
    shown_a: str
    shown_b: str
    verdict: Verdict | None
    answers: list[str]
    prompt_tokens: int | None
    completion_tokens: int | None


class Judgements(Mapping[str, Judgement]):
    """All judgements in a folder by key; the last one with a key counts. Made by `open_judgements`."""

    def __init__(self, folder: Path) -> None:
        self._folder = LocalFolder(folder)
        self._end = 0
        self._found = {found.key: found for found in self._read()}

    def __getitem__(self, key: str) -> Judgement:
        return self._found[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def append(self, judgement: Judgement) -> None:
        """Add a line. After return it survives a power cut.

        Raises:
            OSError: the disk is full or failing; what a next call writes takes the place of this line.
        """
        line = f"{judgement.model_dump_json()}\n".encode()
        self._folder.append(JUDGEMENTS_FILE, line, position=self._end)
        self._end += len(line)
        self._found[judgement.key] = judgement

    def _read(self) -> Iterator[Judgement]:
        for number, line in enumerate(self._folder.lines(JUDGEMENTS_FILE, 0), start=1):
            if not line.endswith(b"\n"):
                return
            try:
                yield Judgement.model_validate_json(line)
            except ValidationError as error:
                raise DataError(
                    f"{self._folder}/{JUDGEMENTS_FILE}:{number}: damaged or edited by hand "
                    f"({error.errors()[0]['msg']}); remove the line and run the same command again, which asks for "
                    "this judgement anew"
                ) from None
            self._end += len(line)


@contextmanager
def open_judgements(folder: Path) -> Iterator[Judgements]:
    """Read a folder's judgements, and be the only one to add some while the block runs.

    Raises:
        RunFolderError: another process is judging there, or it is a file.
        DataError: a line is damaged.
        OSError: the folder cannot be made or written to.
    """
    existing = existing_parent(folder)
    if not existing.is_dir():
        raise RunFolderError(f"--output_dir {folder}: {existing} is a file; name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    # The folder's own lock is its run's, which may be this very process.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunFolderError(
                f"{folder}: another process is judging there; wait for it to end, or name another folder"
            ) from None
        yield Judgements(folder)
    finally:
        os.close(descriptor)
