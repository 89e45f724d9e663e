"""What the commands that run stages of a job have in common: parse, check, print the plan, run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from openrlhf_bd.cli.flags import parse_config, resolved_yaml

if TYPE_CHECKING:
    from openrlhf_bd.config import Config
    from openrlhf_bd.driver.plan import Plan
    from openrlhf_bd.driver.resources import Stage


def run_stages(argv: Sequence[str], *, stages: Sequence[Stage], prog: str, description: str) -> int:
    """Run stages of the job that a command line describes; with `--dry_run` print what would be done.

    With `--measure` beside it, rows are generated to tell what the job will take.

    Args:
        argv: arguments, without the program's name.
        stages: stages of the job.
        prog: name of the command, for help.
        description: what it does, for help.

    Raises:
        BDError: see `openrlhf_bd.driver.job`.
    """
    config, options = parse_config(argv, prog=prog, description=description)
    # Flags and YAML files are checked before these imports, which take seconds.
    from openrlhf_bd.driver import job
    from openrlhf_bd.driver.progress import console

    if options.measure is not None:
        from openrlhf_bd.driver.measure import check_measured

        check_measured(config, stages)
    plan = job.check(config, stages=stages)
    if options.dry_run:
        print(resolved_yaml(config))
    console.print(plan)
    if options.measure is not None:
        _measure(config, plan, num_rows=options.measure)
    if not options.dry_run:
        job.run(config, resolved_config=resolved_yaml(config), plan=plan, stages=stages)
    return 0


def _measure(config: Config, plan: Plan, *, num_rows: int) -> None:
    from openrlhf_bd.driver.measure import measured_plan
    from openrlhf_bd.driver.progress import console

    measured = measured_plan(config, plan, num_rows=num_rows)
    console.print(measured)
    if warning := measured.require_room():
        console.print(f"warning: {warning}", highlight=False, markup=False)
