"""What the paper reports: Tables 1 to 4 and the figures' numbers as data, to stand beside our own.

Source: "Language Model Distillation: A Temporal Difference Imitation Learning Perspective" (AAAI 2026,
arXiv:2505.20335). Rows and groups are found by name, whatever their spelling: "Qwen2.5 0.5B" is "Qwen-2.5 0.5B".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from openrlhf_bd.errors import ConfigError

PAPER = "arXiv:2505.20335"
TEST_SETS = ("dolly", "self_inst", "vicuna")

Figures = tuple[float, ...]
Block = Mapping[str, Figures]


@dataclass(frozen=True, slots=True)
class Published:
    """One table or figure of the paper.

    Attributes:
        name: "table1" ... "figure2".
        title: what it shows.
        source: where it stands.
        unit: of its figures.
        columns: what the figures of a row belong to: test sets, or the one quantity.
        groups: block ("GPT-2 120M") -> row ("BD") -> one figure a column.
        notes: what a reader has to know before comparing.
        aliases: other name of a row -> its name here; "BD" is the row of the paper's own choice.
    """

    name: str
    title: str
    source: str
    unit: str
    columns: tuple[str, ...]
    groups: Mapping[str, Block]
    notes: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)

    def find(self, group: str, label: str, column: str) -> float | None:
        """The published figure, or None where the paper has none.

        Args:
            group: block, in any spelling ("Qwen-2.5 0.5B" or "qwen2.5 0.5b").
            label: row ("BD", "MiniLLM", "p = 0.8").
            column: test set ("dolly", "SelfInst"), or the one quantity of the table.
        """
        row = self.row_name(label)
        figures = next((found for name, found in self.rows_of(group).items() if _plain(name) == _plain(row)), None)
        columns = [_plain(name) for name in self.columns]
        if figures is None or _plain(column) not in columns:
            return None
        return figures[columns.index(_plain(column))]

    def row_name(self, label: str) -> str:
        """The name under which the paper has a row, if it has it."""
        aliases = {_plain(other): name for other, name in self.aliases.items()}
        names = {_plain(name): name for rows in self.groups.values() for name in rows}
        return aliases.get(_plain(label)) or names.get(_plain(label), label)

    def rows_of(self, group: str) -> Block:
        """All published rows of a block; empty where the paper has no such block."""
        return next((rows for name, rows in self.groups.items() if _plain(name) == _plain(group)), {})


def published(name: str) -> Published:
    """A table or figure of the paper.

    Args:
        name: "table1", "table2", "table3", "table4", "figure1" or "figure2".

    Raises:
        ConfigError: no such name.
    """
    if name not in _ALL:
        raise ConfigError(f"published {name!r}: the paper has no such figures here; expected one of {', '.join(_ALL)}")
    return _ALL[name]


def _plain(text: str) -> str:
    """A name without case, space and punctuation, but with its decimal points: "GPT-2 1.5B" -> "gpt21.5b"."""
    return re.sub(r"[^a-z0-9.]|(?<!\d)\.|\.(?!\d)", "", text.casefold())


_BD = "BD"
_WITH, _WITHOUT = "with chi-squared", "without chi-squared"
_TABLE_1 = Published(
    name="table1",
    title="Main results: Rouge-L, mean over five sampling seeds",
    source=f"{PAPER}, Table 1",
    unit="Rouge-L",
    columns=TEST_SETS,
    groups={
        "GPT-2 120M": {
            "Teacher": (27.6, 14.3, 16.3),
            "SFT": (23.2, 9.9, 14.3),
            "KD": (22.8, 10.8, 13.4),
            "SeqKD": (22.7, 10.1, 14.3),
            "MiniLLM": (24.6, 13.2, 16.9),
            _BD: (24.7, 13.3, 16.2),
        },
        "GPT-2 340M": {
            "Teacher": (27.6, 14.3, 16.3),
            "SFT": (25.5, 13.0, 16.0),
            "KD": (25.0, 12.0, 15.4),
            "SeqKD": (25.3, 12.6, 16.9),
            "MiniLLM": (25.4, 15.6, 17.7),
            _BD: (25.8, 15.4, 16.5),
        },
        "GPT-2 760M": {
            "Teacher": (27.6, 14.3, 16.3),
            "SFT": (25.4, 12.4, 16.1),
            "KD": (25.9, 13.4, 16.9),
            "SeqKD": (25.6, 14.0, 15.9),
            "MiniLLM": (26.4, 15.9, 18.3),
            _BD: (26.2, 16.1, 17.3),
        },
        "OPT 125M": {
            "Teacher": (27.6, 16.4, 17.8),
            "SFT": (23.2, 9.9, 14.3),
            "KD": (21.9, 9.7, 14.0),
            "SeqKD": (22.0, 10.1, 13.7),
            "MiniLLM": (23.8, 10.2, 15.3),
            _BD: (25.1, 11.4, 14.8),
        },
        "OPT 350M": {
            "Teacher": (27.6, 16.4, 17.8),
            "SFT": (23.6, 10.6, 15.5),
            "KD": (22.5, 11.1, 14.9),
            "SeqKD": (23.1, 11.4, 14.7),
            "MiniLLM": (24.3, 11.5, 17.9),
            _BD: (26.0, 12.1, 18.1),
        },
        "OPT 1.3B": {
            "Teacher": (27.6, 16.4, 17.8),
            "SFT": (26.0, 11.4, 15.6),
            "KD": (25.5, 12.0, 15.4),
            "SeqKD": (26.0, 12.5, 16.4),
            "MiniLLM": (26.2, 13.7, 16.7),
            _BD: (27.1, 15.1, 16.3),
        },
        "Qwen-2.5 0.5B": {
            "Teacher": (28.8, 24.1, 21.0),
            "SFT": (24.5, 16.5, 17.6),
            "KD": (24.4, 14.7, 17.8),
            "SeqKD": (24.7, 15.3, 17.4),
            "MiniLLM": (26.7, 19.1, 20.5),
            _BD: (27.8, 19.5, 20.7),
        },
    },
    notes=(
        "The paper copied its GPT-2 baselines from Gu et al. (2023), which sampled at top-p 1.0; the authors' code of "
        "the method samples at 0.8.",
        "The paper prints the same three figures for SFT of OPT 125M as for SFT of GPT-2 120M.",
        "The paper used p = 0.5 for OPT 1.3B and p = 0.8 elsewhere.",
    ),
    aliases={"BD (Ours)": _BD},
)

_TABLE_2 = Published(
    name="table2",
    title="Impact of p: Rouge-L, mean over five sampling seeds",
    source=f"{PAPER}, Table 2",
    unit="Rouge-L",
    columns=TEST_SETS,
    groups={
        "GPT-2 340M": {"p = 1.0": (24.9, 15.2, 15.7), "p = 0.8": (25.8, 15.4, 16.5), "p = 0.5": (25.6, 15.5, 16.1)},
        "OPT 125M": {"p = 1.0": (23.6, 10.5, 14.2), "p = 0.8": (25.1, 11.4, 14.8), "p = 0.5": (24.4, 11.0, 14.7)},
        "Qwen-2.5 0.5B": {
            "p = 1.0": (26.6, 18.1, 18.6),
            "p = 0.8": (27.8, 19.5, 20.7),
            "p = 0.5": (27.6, 19.2, 20.2),
        },
    },
    aliases={"BD": "p = 0.8"} | {f"BD p {p}": f"p = {p}" for p in ("1.0", "0.8", "0.5")},
)

_TABLE_3 = Published(
    name="table3",
    title="Training time to the best validation score",
    source=f"{PAPER}, Table 3",
    unit="hours",
    columns=("hours",),
    groups={
        "GPT-2 340M": {"MiniLLM": (11.2,), _BD: (1.3,)},
        "OPT 350M": {"MiniLLM": (12.8,), _BD: (3.5,)},
        "Qwen-2.5 0.5B": {"MiniLLM": (10.7,), _BD: (0.8,)},
    },
    notes=("On 4 A40 GPUs; the paper does not say whether the time to sample the teacher's responses is in it.",),
)

_TABLE_4 = Published(
    name="table4",
    title="Chi-squared regularisation: Rouge-L, mean over five sampling seeds",
    source=f"{PAPER}, Table 4",
    unit="Rouge-L",
    columns=TEST_SETS,
    groups={
        "GPT-2 760M": {_WITH: (26.2, 16.1, 17.3), _WITHOUT: (25.9, 15.7, 17.1)},
        "Qwen-2.5 0.5B": {_WITH: (27.8, 19.5, 20.7), _WITHOUT: (27.4, 19.2, 20.3)},
    },
    aliases={"BD": _WITH, "BD with chi-squared": _WITH, "BD without chi-squared": _WITHOUT},
)

_FIGURE_1 = Published(
    name="figure1",
    title="Sorted token probabilities of the teacher",
    source=f"{PAPER}, Figure 1",
    unit="probability mass",
    columns=("mass",),
    groups={"Qwen-2.5 3B": {"top 7": (0.90,), "top 50": (0.96,)}},
    notes=("Mean over 20 sequences of Qwen-2.5 3B. Of the top 7 the paper says at least 90 %.",),
)

_FIGURE_2 = Published(
    name="figure2",
    title="Win rates of BD against KD, SeqKD and MiniLLM",
    source=f"{PAPER}, Figure 2",
    unit="share of the prompts",
    columns=("win rate",),
    groups={},
    notes=(
        "The paper draws its win rates and prints no number, so there is none to set beside ours. It judged 500 "
        "responses of Qwen-2.5 0.5B under the Dolly evaluation with GPT-4o-mini, each pair in both orders.",
    ),
)

_ALL: Mapping[str, Published] = MappingProxyType(
    {item.name: item for item in (_TABLE_1, _TABLE_2, _TABLE_3, _TABLE_4, _FIGURE_1, _FIGURE_2)}
)
