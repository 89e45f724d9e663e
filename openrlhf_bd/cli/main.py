"""The console script `openrlhf-bd`: all commands under one name. A command is imported only when it is called."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from openrlhf_bd.cli.flags import main_guard
from openrlhf_bd.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Command:
    """A subcommand.

    Attributes:
        module: has `main(argv) -> int`.
        summary: one line for help.
        arguments: put before the user's own.
    """

    module: str
    summary: str
    arguments: tuple[str, ...] = ()


COMMANDS = {
    "train": Command("openrlhf_bd.cli.train_bd_ray", "the whole job: teacher's data, student, evaluation, report"),
    "plan": Command(
        "openrlhf_bd.cli.train_bd_ray", "check a job and print what it would do (train --dry_run)", ("--dry_run",)
    ),
    "generate": Command("openrlhf_bd.cli.generate_teacher", "the teacher's data alone"),
    "evaluate": Command("openrlhf_bd.cli.evaluate", "sample from models on test sets and score them"),
    "judge": Command("openrlhf_bd.cli.judge", "win rates of saved responses, by a judge behind a server"),
    "retention": Command("openrlhf_bd.cli.retention", "standard benchmarks, through lm-evaluation-harness (an extra)"),
    "report": Command("openrlhf_bd.cli.report", "compare runs in one page"),
    "timeline": Command("openrlhf_bd.cli.timeline", "who worked and who waited in a run, also as a Perfetto trace"),
    "inspect": Command("openrlhf_bd.cli.inspect_store", "look into a folder of the teacher's data"),
    "export": Command("openrlhf_bd.cli.exchange", "the teacher's data as a Hugging Face data set", ("export",)),
    "import": Command("openrlhf_bd.cli.exchange", "the teacher's data from a data set that export wrote", ("import",)),
    "list": Command("openrlhf_bd.cli.list_algorithms", "the algorithms that can be named"),
    "new-model": Command("openrlhf_bd.cli.new_model", "a randomly initialised student with a given tokenizer"),
    "pipeline": Command("openrlhf_bd.cli.pipeline", "the stages of an experiment file, and one report"),
    "reproduce": Command("openrlhf_bd.cli.reproduce", "a table or figure of the paper, at full or toy size"),
    "prepare-data": Command("openrlhf_bd.cli.prepare_data", "the data of the paper's experiments, out of Dolly"),
    "theory": Command("openrlhf_bd.cli.theory", "what candidate sets cost in random MDPs, beside the proven bound"),
    "demo": Command("openrlhf_bd.demo.pipeline", "teacher to report on the embedded corpus, on this machine's CPUs"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit status; 2 if there is no such command."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    return main_guard(lambda: _run(arguments[0], arguments[1:]))


def _run(name: str, arguments: list[str]) -> int:
    if name not in COMMANDS:
        matches = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean openrlhf-bd {matches[0]}?" if matches else f"; commands: {', '.join(COMMANDS)}"
        raise ConfigError(f"openrlhf-bd has no command {name!r}{hint}")
    command = COMMANDS[name]
    status: int = importlib.import_module(command.module).main([*command.arguments, *arguments])
    return status


def _help() -> str:
    width = max(len(name) for name in COMMANDS)
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: openrlhf-bd COMMAND ...",
            "",
            "Distil a teacher that vLLM serves into a student that DeepSpeed trains, on Ray.",
            "",
            *lines,
            "",
            "openrlhf-bd COMMAND --help describes the options of a command.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
