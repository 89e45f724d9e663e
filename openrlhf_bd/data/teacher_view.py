"""What the teacher sees where it is not what the student sees, and which teacher it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from openrlhf_bd.config import Config
from openrlhf_bd.data.formats import PromptFormat, teacher_format
from openrlhf_bd.data.readers import Record
from openrlhf_bd.data.routes import is_routed, route_of


@dataclass(frozen=True, slots=True)
class TeacherView:
    """How the teachers of a job see its records.

    Attributes:
        formats: by the teacher's name; None: the student's prompt.
        route_key: key in a record of the value that names its teacher; None: there is one teacher.
    """

    formats: Mapping[str, PromptFormat | None]
    route_key: str | None

    def of(self, records: Sequence[Record]) -> list[tuple[NDArray[np.int32] | None, str | None]]:
        """For each record its prompt's tokens as its teacher sees them (None: as the student), and the teacher's name.

        Raises:
            DataError: a record lacks what the teacher's template needs, or has no teacher.
        """
        if self.route_key is None:
            (only,) = self.formats.values()
            return [(ids, None) for ids in _token_ids(only, records)]
        names = [route_of(record, self.route_key, self.formats) for record in records]
        found: list[tuple[NDArray[np.int32] | None, str | None]] = [(None, name) for name in names]
        for name, template in self.formats.items():
            places = [place for place, chosen in enumerate(names) if chosen == name]
            for place, ids in zip(places, _token_ids(template, [records[place] for place in places]), strict=True):
                found[place] = (ids, name)
        return found


def teacher_view(
    config: Config, tokenizer: PreTrainedTokenizerBase, teacher_tokenizers: Mapping[str, PreTrainedTokenizerBase]
) -> TeacherView:
    """The view of the teachers that answer the prompts of training.

    Args:
        config: `teacher` and `data`.
        tokenizer: of the student.
        teacher_tokenizers: of each teacher, by name.

    Raises:
        ConfigError: see `teacher_format`.
    """
    formats = {name: teacher_format(config, tokenizer, each) for name, each in teacher_tokenizers.items()}
    return TeacherView(formats, config.teacher.route_key if is_routed(config) else None)


def scoring_view(
    config: Config, tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase
) -> TeacherView:
    """The view of the one teacher, that of `teacher.model_name_or_path`, that scores a student's responses.

    Raises:
        ConfigError: see `teacher_format`.
    """
    return TeacherView({"": teacher_format(config, tokenizer, teacher_tokenizer)}, None)


def _token_ids(template: PromptFormat | None, records: Sequence[Record]) -> Sequence[NDArray[np.int32] | None]:
    return [None] * len(records) if template is None else template.token_ids(records)
