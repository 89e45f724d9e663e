"""Evaluation alone: `python3 -m openrlhf_bd.cli.evaluate`, for any model or several, and any test sets.

--models label=PATH,label=PATH evaluates several models in the same engines, each into a file of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from openrlhf_bd.cli.flags import COMMAND_LINE, main_guard, parse_config, resolved_yaml
from openrlhf_bd.cli.jobs import run_stages
from openrlhf_bd.errors import ConfigError

_FLAG = "--models"
_PROG = "python3 -m openrlhf_bd.cli.evaluate"
_DESCRIPTION = (
    "Sample from a model on test sets and score the responses. --models label=PATH,label=PATH in the place of "
    "--actor.model_name_or_path evaluates several models, folders or names on the hub, in the same engines, each into "
    "LABEL.json; PATH@temperature=T samples one at another temperature than the others."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate one model into evaluation.json of `--ckpt.output_dir`, or several into a file each there."""
    return main_guard(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> int:
    text, others = _taken(argv)
    if text is None:
        return run_stages(others, stages=("evaluate",), prog=_PROG, description=_DESCRIPTION)
    config, options = parse_config(others, prog=_PROG, description=_DESCRIPTION)
    # Flags and YAML files are checked before these imports, which take seconds.
    from openrlhf_bd.driver.comparison import check_comparison, run_comparison
    from openrlhf_bd.driver.progress import console
    from openrlhf_bd.evaluation.models import parse_models

    if options.measure is not None:
        raise ConfigError(f"{COMMAND_LINE}: --measure generates rows, and {_FLAG} makes none; leave one of them away")
    models = parse_models(text)
    plan = check_comparison(config, models)
    if options.dry_run:
        print(resolved_yaml(config))
    console.print(plan)
    if not options.dry_run:
        run_comparison(config, models, resolved_config=resolved_yaml(config), plan=plan)
    return 0


def _taken(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of --models, and all other arguments.

    Raises:
        ConfigError: the flag has no value, or is given twice.
    """
    found: list[str] = []
    others: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if flag != _FLAG:
            others.append(argument)
            continue
        value = value if equals else next(arguments, "")
        if not value or value.startswith("-"):
            raise ConfigError(f"{COMMAND_LINE}: {_FLAG} has no value; expected label=PATH,label=PATH")
        found.append(value)
    if len(found) > 1:
        raise ConfigError(f"{COMMAND_LINE}: {_FLAG} is given twice; separate its entries by commas")
    return (found[0] if found else None), others


if __name__ == "__main__":
    raise SystemExit(main())
