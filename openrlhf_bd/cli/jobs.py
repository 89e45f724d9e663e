"""What the commands that run stages of a job have in common: parse, check, print the plan, run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from openrlhf_bd.cli.flags import parse_config, resolved_yaml

if TYPE_CHECKING:
    from openrlhf_bd.driver.resources import Stage


def run_stages(argv: Sequence[str], *, stages: Sequence[Stage], prog: str, description: str) -> int:
    """Run stages of the job that a command line describes; with `--dry_run` print what would be done.

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

    plan = job.check(config, stages=stages)
    if options.dry_run:
        print(resolved_yaml(config))
    console.print(plan)
    if not options.dry_run:
        job.run(config, resolved_config=resolved_yaml(config), plan=plan, stages=stages)
    return 0
