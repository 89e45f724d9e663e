"""Who worked and who waited, as tables of a report."""

from __future__ import annotations

from openrlhf_bd.evaluation.overview import format_seconds
from openrlhf_bd.evaluation.sheets import Heading, Sheet, SheetCell, SheetRow
from openrlhf_bd.evaluation.timeline import Timeline
from openrlhf_bd.evaluation.utilisation import PhaseUse, utilisation, waited_text


def utilisation_sheets(timeline: Timeline, prefix: str) -> list[Sheet]:
    """A table of each phase of a run: shares of its time by lane, and for whom a lane waited.

    Args:
        timeline: of the run.
        prefix: of the tables' file names.
    """
    return [_sheet(phase, f"{prefix}_utilisation_{phase.name}") for phase in utilisation(timeline)]


def _sheet(phase: PhaseUse, name: str) -> Sheet:
    kinds = ("works", "moves weights", "starts", "waits")
    spent = {use.lane: (use.working_s, use.syncing_s, use.starting_s, use.waiting_s) for use in phase.lanes}
    parts = ", ".join(f"{activity} {seconds / phase.seconds:.0%}" for activity, seconds in phase.driver_s.items())
    return Sheet(
        name,
        f"{phase.name}, {format_seconds(phase.seconds)}",
        "Lane",
        ((*(Heading(kind, "of the time") for kind in kinds), Heading("waits while these work")),),
        tuple(
            SheetRow(
                use.lane,
                (
                    *(SheetCell(f"{seconds / use.total_s:.1%}") for seconds in spent[use.lane]),
                    SheetCell(waited_text(use)),
                ),
            )
            for use in phase.lanes
        ),
        f"The driver's time: {parts}." if parts else "",
        ("lane", *(f"{kind.replace(' ', '_')}_s" for kind in kinds)),
        tuple((lane, *seconds) for lane, seconds in spent.items()),
    )
