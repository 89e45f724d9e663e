"""`openrlhf-bd theory`: what restriction to top-p sets costs in random MDPs, beside the bound of Propositions 2 and 4.

Each MDP is solved exactly, as are the top-p MDP of its soft-optimal teacher and the projected teacher in it. For every
gamma and p: kappa(p), the finer kappa(min P), the measured gaps of Q, the lower bound, and how many claims failed.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from openrlhf_bd.cli.flags import main_guard
from openrlhf_bd.errors import ConfigError, RunFolderError

if TYPE_CHECKING:
    from rich.table import Table

    from openrlhf_bd.theory.gaps import Gaps

_EXAMPLES = """examples:
  openrlhf-bd theory
  openrlhf-bd theory --gammas 0.9 0.99 --top_ps 0.5 0.8 0.95 --num_mdps 1000
  openrlhf-bd theory --num_states 30 --num_actions 40 --output_dir runs/theory
"""

_LEGEND = """k(p): the bound; k(min P): with the mass that the sets have, mean.
Q^: Q* less Q of the projected teacher (Prop. 2), largest in each MDP.
Qp: Q* less Q of the optimum on the sets (Prop. 4).
low: lower bound, mean. bad: claims that failed.
excl: MDPs that break k(p) if sets leave out the crossing action.
res: largest residual of the fixed points."""


@dataclass(frozen=True)
class Cell:
    """All MDPs at one gamma and p."""

    gamma: float
    top_p: float
    gaps: list[Gaps]


def build_parser() -> argparse.ArgumentParser:
    """The command line of `openrlhf-bd theory`."""
    parser = argparse.ArgumentParser(
        prog="openrlhf-bd theory",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--num_mdps", type=int, default=200, help="random MDPs of each gamma (default: 200)")
    parser.add_argument("--num_states", type=int, default=12, help="states of each (default: 12)")
    parser.add_argument("--num_actions", type=int, default=20, help="actions of each state (default: 20)")
    parser.add_argument(
        "--gammas", type=float, nargs="+", default=[0.5, 0.9, 0.99], help="discounts (default: 0.5 0.9 0.99)"
    )
    parser.add_argument(
        "--top_ps", type=float, nargs="+", default=[0.5, 0.8, 0.9, 0.95], help="masses p (default: 0.5 0.8 0.9 0.95)"
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of the MDPs (default: 1)")
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("runs/theory"),
        help="folder of gaps.png, the figure; gaps.csv, its points; theory.csv, the table (default: runs/theory)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status: 0 if every claim held, 1 if one did not, 2 for a wrong option."""
    options = build_parser().parse_args(argv)
    return main_guard(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    from rich.console import Console

    _check(options)
    cells = measure(options)
    Console().print(_table(cells, options))
    _write(cells, options.output_dir)
    violations = sum(gaps.violations for cell in cells for gaps in cell.gaps)
    if violations:
        print(f"{violations} claims did not hold beyond rounding: see the column violations", file=sys.stderr)
    return 1 if violations else 0


def measure(options: argparse.Namespace) -> list[Cell]:
    """Solve every MDP at every gamma and p; cells in the order of the options."""
    from openrlhf_bd.theory.gaps import measure_gaps
    from openrlhf_bd.theory.random_mdps import random_mdps
    from openrlhf_bd.theory.solve import solve_optimal

    shape = {"num_states": options.num_states, "num_actions": options.num_actions}
    cells = []
    for gamma in dict.fromkeys(options.gammas):
        mdps = list(random_mdps(options.num_mdps, seed=options.seed, gamma=gamma, **shape))
        optima = [solve_optimal(mdp) for mdp in mdps]
        for top_p in dict.fromkeys(options.top_ps):
            gaps = [measure_gaps(mdp, optimum, top_p) for mdp, optimum in zip(mdps, optima, strict=True)]
            cells.append(Cell(gamma, top_p, gaps))
    return cells


def _check(options: argparse.Namespace) -> None:
    for name in ("num_mdps", "num_states", "num_actions"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} is {getattr(options, name)}; expected at least 1")
    if options.seed < 0:
        raise ConfigError(f"--seed is {options.seed}; expected 0 or more")
    for gamma in options.gammas:
        if not 0 < gamma < 1:
            raise ConfigError(
                f"--gammas has {gamma:g}; expected numbers between 0 and 1: at 0 gap and bound are 0, at 1 the bound "
                "is infinite"
            )
    for top_p in options.top_ps:
        if not 0 < top_p < 1:
            raise ConfigError(f"--top_ps has {top_p:g}; expected numbers between 0 and 1: at 1 gap and bound are 0")
    try:
        options.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(
            f"--output_dir {options.output_dir}: can't be made: {error.strerror}; name another path"
        ) from error


def summary(cell: Cell) -> dict[str, float]:
    """One line of the table: gamma, p, bounds and gaps in nats, counts."""
    import numpy as np

    column = {field.name: np.array([getattr(gaps, field.name) for gaps in cell.gaps]) for field in fields(cell.gaps[0])}
    return {
        "gamma": cell.gamma,
        "p": cell.top_p,
        "kappa_p": float(column["kappa_p"][0]),
        "mean_kappa_mass": float(column["kappa_mass"].mean()),
        "largest_projected_gap": float(column["projected_gap"].max()),
        "mean_projected_gap": float(column["projected_gap"].mean()),
        "largest_optimal_gap": float(column["optimal_gap"].max()),
        "mean_optimal_gap": float(column["optimal_gap"].mean()),
        "mean_lower_bound": float(column["lower_bound"].mean()),
        "violations": int(column["violations"].sum()),
        "share_broken_if_exclusive": float((column["exclusive_gap"] > column["kappa_p"] + column["error"]).mean()),
        "largest_residual": float(column["residual"].max()),
    }


def _table(cells: Sequence[Cell], options: argparse.Namespace) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(
        title=f"Gaps of Q in nats: {options.num_mdps} random MDPs, {options.num_states} states, "
        f"{options.num_actions} actions",
        caption=_LEGEND,
        caption_justify="left",
        box=box.SIMPLE,
        padding=0,
        pad_edge=False,
    )
    headings = ("gamma", "p", "k(p)", "k(min P)", "Q^ max", "mean", "Qp max", "mean", "low", "bad", "excl", "res")
    for name in headings:
        table.add_column(name, justify="right", no_wrap=True)
    for number, cell in enumerate(cells):
        gamma, top_p, *nats, violations, exclusive, residual = summary(cell).values()
        table.add_row(
            f"{gamma:g}",
            f"{top_p:g}",
            *(_nats(value) for value in nats),
            f"{violations:g}",
            f"{exclusive:.0%}",
            f"{residual:.0e}",
            end_section=number + 1 < len(cells) and cells[number + 1].gamma != gamma,
        )
    return table


def _nats(value: float) -> str:
    """A gap in at most five characters, unless it is 100,000 nats."""
    if value >= 100:
        return f"{value:.0f}"
    if value >= 1:
        return f"{value:#.3g}"
    return f"{value:.3f}" if value >= 0.001 or value == 0 else f"{value:.0e}"


def _write(cells: Sequence[Cell], folder: Path) -> None:
    from openrlhf_bd.cli.theory_figure import draw_gaps

    lines = [summary(cell) for cell in cells]
    points = [
        {"gamma": cell.gamma, "p": cell.top_p, "mdp": number, **asdict(gaps)}
        for cell in cells
        for number, gaps in enumerate(cell.gaps)
    ]
    for name, rows in (("theory.csv", lines), ("gaps.csv", points)):
        with (folder / name).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    draw_gaps(cells, folder / "gaps.png")
    print(f"written: {folder / 'gaps.png'}, {folder / 'theory.csv'}, {folder / 'gaps.csv'}")


if __name__ == "__main__":
    sys.exit(main())
