"""The task families of the demo corpus, one small module per kind of skill."""

from openrlhf_bd.demo.tasks.arithmetic import ADDITION, TOTALS, UNITS
from openrlhf_bd.demo.tasks.base import Draft, Family
from openrlhf_bd.demo.tasks.dates import DATES
from openrlhf_bd.demo.tasks.lists import EDITS, SORTING
from openrlhf_bd.demo.tasks.symbols import LOGIC, REWRITING

# Order matters: a record's family is drawn by index, so a new family goes last.
FAMILIES: tuple[Family, ...] = (ADDITION, TOTALS, SORTING, DATES, EDITS, UNITS, REWRITING, LOGIC)

__all__ = ["FAMILIES", "Draft", "Family"]
