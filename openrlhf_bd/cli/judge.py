"""Win rates by a judge behind an OpenAI-compatible server, or one that is hosted while it judges.

openrlhf-bd judge RUN RUN [RUN ...] --output_dir DIR [--model gpt-4o-mini] [--api_base URL] [--serve MODEL]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from openrlhf_bd.cli.flags import add_flag, main_guard, section_from_flags
from openrlhf_bd.cli.options import section_options
from openrlhf_bd.config import JudgeOptions
from openrlhf_bd.errors import ClusterError, ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from openrlhf_bd.evaluation.judge import Host
    from openrlhf_bd.evaluation.judge_asking import OnProgress
    from openrlhf_bd.evaluation.win_rates import PairRates, WinRates

_EPILOG = """\
The first run is compared with each of the others. A run is its folder, the folder of an evaluation, or a file of saved
responses (responses.jsonl, LABEL.responses.jsonl). The server's key: the environment variable OPENAI_API_KEY.

examples:
  openrlhf-bd judge runs/bd runs/kd runs/seqkd --test_set dolly --output_dir runs/judge
  openrlhf-bd judge runs/bd runs/kd --api_base http://127.0.0.1:8000/v1 --model my-judge --constrained --output_dir j
  openrlhf-bd judge runs/bd runs/kd --serve Qwen/Qwen2.5-7B-Instruct --constrained --output_dir runs/judge

Exit status: 0 all is judged; 75 something is missing, and the same command goes on there.
"""


_LEGEND = """win %: of the first method, both orders averaged, ties half. p: sign test.
first, second: its wins/ties/losses where its answer was shown first, second.
same: prompts with one outcome in both orders. judged: of all prompts."""


def build_parser() -> argparse.ArgumentParser:
    """The command line of `openrlhf-bd judge`."""
    parser = argparse.ArgumentParser(
        prog="openrlhf-bd judge",
        description="Let a judge compare the saved responses of runs, in both orders, and print win rates.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run, evaluation, or file of responses")
    parser.add_argument(
        "--output_dir",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of judgements.jsonl, which is asked before the judge, and win_rates.json",
    )
    parser.add_argument("--labels", default="", metavar="A,B,...", help="names of the methods, one a run")
    parser.add_argument("--all_pairs", action="store_true", default=False, help="compare every run with every other")
    group = parser.add_argument_group("the judge, and which responses it compares")
    for option in section_options(JudgeOptions).values():
        add_flag(group, option)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status: 0, 75 if something is missing, or that of the error it printed."""
    arguments = vars(build_parser().parse_args(argv))
    return main_guard(lambda: _judge(**{name: arguments.pop(name) for name in _OWN}, flags=arguments))


_OWN = ("runs", "output_dir", "labels", "all_pairs")


def _judge(
    *, runs: list[Path], output_dir: Path, labels: str, all_pairs: bool, flags: dict[str, str | list[str]]
) -> int:
    # Imported where they are used: --help needs neither client nor NumPy.
    from rich.console import Console

    from openrlhf_bd.evaluation.judge import judge_pairs

    options, host = judge_and_host(section_from_flags(JudgeOptions, flags), output_dir)
    responses = _labelled(runs, labels)
    names = list(responses)
    pairs = list(combinations(names, 2)) if all_pairs else [(names[0], other) for other in names[1:]]
    with judge_progress() as on_progress:
        rates = judge_pairs(responses, pairs, options, output_dir, on_progress, host)
    Console().print(rates_table(rates))
    for line in _notes(rates):
        print(line)
    print(f"written: {output_dir / 'win_rates.json'}")
    if rates.num_missing:
        print(f"error: {incomplete(rates)}", file=sys.stderr)
        return ClusterError.exit_status
    return 0


def judge_and_host(options: JudgeOptions, output_dir: Path) -> tuple[JudgeOptions, Host | None]:
    """The judge by the name that its server knows, and who starts that server; None: nobody has to.

    Raises:
        ConfigError, DataError: the model to be served is none, or not what it should be.
    """
    if options.serve is None:
        return options, None
    from openrlhf_bd.driver.judge_server import check_served, hosted_judge, with_served_name

    check_served(options.serve, options)
    named = with_served_name(options)
    return named, partial(hosted_judge, named, output_dir)


def _labelled(runs: Sequence[Path], labels: str) -> dict[str, Path]:
    """The runs' files of responses by label."""
    from openrlhf_bd.evaluation.judge_responses import find_responses, label_of

    if len(runs) < 2:
        raise ConfigError(f"found {len(runs)} run, expected at least two to compare")
    paths = [find_responses(run) for run in runs]
    names = [name.strip() for name in labels.split(",") if name.strip()] or [label_of(path) for path in paths]
    if len(names) != len(runs):
        raise ConfigError(f"--labels {labels}: found {len(names)} names for {len(runs)} runs, expected one a run")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"two runs are called {repeated[0]!r}; tell them apart by --labels")
    return dict(zip(names, paths, strict=True))


@contextmanager
def judge_progress() -> Iterator[OnProgress]:
    """A bar that begins when it is known how many questions there are."""
    from openrlhf_bd.driver.progress import StageProgress, stage_progress

    with ExitStack() as stack:
        bar: StageProgress | None = None
        shown = 0

        def on_progress(done: int, total: int) -> None:
            nonlocal bar, shown
            if bar is None:
                bar = stack.enter_context(stage_progress("judge", total, "verdicts"))
                bar.start_at(done)
            else:
                bar.advance(done - shown)
            shown = done

        yield on_progress


def rates_table(rates: WinRates) -> Table:
    """Win rates of every pair, for the terminal."""
    from rich import box
    from rich.table import Table

    table = Table(
        title=f"Win rates by {rates.model}: {rates.test_set}, seed {rates.seed}, top-p {rates.top_p:g}",
        caption=_LEGEND,
        caption_justify="left",
        box=box.SIMPLE,
        padding=0,
        pad_edge=False,
    )
    table.add_column("pair", overflow="fold")
    for name in ("win %", "95 %", "p", "first", "second", "same", "judged"):
        table.add_column(name, justify="right", no_wrap=True)
    for pair in rates.pairs:
        table.add_row(*_row(pair))
    return table


def _row(pair: PairRates) -> tuple[str, ...]:
    counts = [f"{order.wins}/{order.ties}/{order.losses}" for order in (pair.a_first, pair.b_first)]
    judged = f"{pair.num_judged}/{pair.num_prompts}"
    if pair.win_rate is None or pair.interval is None or pair.p_value is None:
        return (f"{pair.a} - {pair.b}", "n/a", "n/a", "n/a", *counts, "n/a", judged)
    low, high = (100 * bound for bound in pair.interval)
    return (
        f"{pair.a} - {pair.b}",
        f"{100 * pair.win_rate:.1f}",
        f"{low:.1f}-{high:.1f}",
        f"{pair.p_value:.2g}",
        *counts,
        f"{100 * pair.num_consistent / pair.num_judged:.0f}%",
        judged,
    )


def _notes(rates: WinRates) -> Iterator[str]:
    from openrlhf_bd.evaluation.win_rates import NO_VERDICT

    for pair in rates.pairs:
        for reason, number in pair.not_judged.items():
            hint = " (a vLLM server can answer nothing else with --constrained)" if reason == NO_VERDICT else ""
            yield f"{pair.a} - {pair.b}: {number} prompts not judged: {reason}{hint}"
        for label, number in zip((pair.a, pair.b), pair.num_empty, strict=True):
            if number:
                yield f"{pair.a} - {pair.b}: {number} responses of {label} are empty; they were compared like others"
    if rates.first_error is not None and rates.first_error != rates.stopped:
        yield f"the first question without a judgement: {rates.first_error}"
    used = rates.usage
    tokens = f"{used.prompt_tokens} prompt and {used.completion_tokens} answer tokens"
    yield f"all calls together: {used.num_requests} requests, {tokens}"


def incomplete(rates: WinRates) -> str:
    """What is missing of win rates, and what to do."""
    total = sum(pair.num_prompts for pair in rates.pairs)
    reason = f": {rates.stopped}" if rates.stopped else ""
    return (
        f"{rates.num_missing} of {total} comparisons are missing{reason}. What is judged is kept; the same command "
        "asks for the rest"
    )


if __name__ == "__main__":
    sys.exit(main())
