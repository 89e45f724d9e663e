"""Look into a store of rows: what it is, how large its candidate sets are, whether it is whole.

python3 -m openrlhf_bd.cli.inspect_store PATH [--verify] [--repair] [--rows N [--tokenizer PATH]] [--plot FILE.png]
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from openrlhf_bd.cli.flags import main_guard
from openrlhf_bd.errors import DataError, StoreError
from openrlhf_bd.records import RecordedSets, Rollout
from openrlhf_bd.store import StoreReader, StoreSummary, summary
from openrlhf_bd.store.fingerprints import fingerprint_tokenizer
from openrlhf_bd.store.manifest import JOB_FILE
from openrlhf_bd.store.repair import DAMAGED_FOLDER, take_out_damaged
from openrlhf_bd.store.statistics import SetSummary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Candidates of a state, and ids of a row, that a line of the terminal has room for.
_SHOWN_CANDIDATES = 8
_SHOWN_IDS = 24


def build_parser() -> argparse.ArgumentParser:
    """The command line of `openrlhf-bd inspect`."""
    parser = argparse.ArgumentParser(
        prog="openrlhf-bd inspect", description="Summarise a store of teacher or gold rows, and check that it is whole."
    )
    parser.add_argument("path", type=Path, help="folder of the store")
    parser.add_argument("--verify", action="store_true", help="compare every byte with what was sealed (SHA-256)")
    parser.add_argument(
        "--repair", action="store_true", help="take damaged shards out, and have exactly their rows made again"
    )
    parser.add_argument("--rows", type=int, default=0, metavar="N", help="show the first N rows")
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="tokenizer that decodes the shown rows and their candidates"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw set sizes and sorted probability mass")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status: 0, or that of the error whose message it printed."""
    options = build_parser().parse_args(argv)
    return main_guard(lambda: _inspect(options, Console()))


def _inspect(options: argparse.Namespace, console: Console) -> int:
    tokenizer = _load_tokenizer(options.tokenizer) if options.tokenizer else None
    if options.repair:
        repair(options.path, console)
    reader = StoreReader(options.path, require_complete=False)
    if tokenizer is not None:
        _require_same_tokenizer(reader, tokenizer, options.tokenizer)
    if options.verify:
        reader.verify()
    found = summary(reader)
    console.print(_summary_table(found, reader.path, verified=options.verify))
    for row in reader.quarantined:
        console.print(Text(f"quarantined: row {row.row_id} ({row.reason})"))
    for rollout in reader.rollouts(range(min(options.rows, len(reader)))):
        console.print(_ids_text(rollout) if tokenizer is None else _decoded_table(rollout, tokenizer))
    if options.plot is not None:
        plot_summary(found, options.plot)
        console.print(Text(f"drawn: {options.plot}"))
    return 0


def repair(path: Path, console: Console) -> None:
    """Take damaged shards out of a store, and run the job that made it for the rows that are missing.

    Raises:
        BDError: the store cannot be repaired, or the job fails; what was whole is as it was.
    """
    found = take_out_damaged(path)
    for entry in found.damaged:
        console.print(Text(f"damaged: {entry.file}, {entry.num_rows:,} rows to make again"))
    for name in found.unlisted:
        console.print(Text(f"not of this store: {name}, now in {DAMAGED_FOLDER}/"))
    if StoreReader(path, require_complete=False).complete:
        console.print("every shard is whole")
        return
    job = path / JOB_FILE
    if not job.exists():
        raise StoreError(
            f"{job}: not found, so the missing rows cannot be made here; run the command that made the store again"
        )
    # Imported where it is used: it takes seconds.
    from openrlhf_bd.cli.jobs import run_stages

    description = "Make the missing rows of a store again."
    run_stages(["--config", str(job)], stages=("generate",), prog="openrlhf-bd inspect", description=description)


def _summary_table(found: StoreSummary, path: Path, *, verified: bool) -> Table:
    manifest = found.manifest
    state = "complete" if found.complete else "unfinished"
    table = Table(title=Text(f"{path} ({manifest.kind}, {state}{', verified' if verified else ''})"), show_header=False)
    lines: list[tuple[str, str]] = [
        ("rows", f"{found.num_rows:,} of {manifest.num_rows:,}"),
        ("prompts x responses", f"{manifest.num_prompts:,} x {manifest.n_samples_per_prompt}"),
        ("prompt tokens", f"{found.num_prompt_tokens:,}"),
        ("response tokens", f"{found.num_response_tokens:,}"),
        ("response length", f"mean {found.mean_response_length:.1f}, {_quantiles(found.response_length_quantiles)}"),
        ("finish reasons", ", ".join(f"{reason} {count:,}" for reason, count in found.finish_reasons.items())),
        ("on disk", f"{found.size_bytes / 1e6:,.2f} MB, {found.bytes_per_token:.1f} bytes a response token"),
    ]
    lines += [(f"rows of teacher {name}", f"{count:,}") for name, count in found.rows_by_teacher.items()]
    if found.sets is not None:
        lines += _set_lines(found.sets, top_p=manifest.top_p)
    elif manifest.has_whole_sets:
        lines.append(("candidate sets", f"top_p 1: the whole vocabulary, {found.num_states:,} states"))
    lines += [(f"fingerprint {name}", value) for name, value in sorted(manifest.fingerprints.items())]
    lines += [(f"sampling {name}", str(value)) for name, value in sorted(manifest.sampling.items())]
    lines += [("made with", ", ".join(f"{name} {version}" for name, version in sorted(manifest.versions.items())))]
    lines += [("created", manifest.created)]
    for name, value in lines:
        table.add_row(Text(name), Text(value))
    return table


def _set_lines(sets: SetSummary, *, top_p: float | None) -> list[tuple[str, str]]:
    histogram = [
        f"{low if low == high else f'{low}-{high}'}: {count / sets.num_states:.1%}"
        for low, high, count in sets.size_histogram
    ]
    lines = [
        ("candidate sets", f"top_p {top_p}, {sets.num_states:,} states, {sets.num_candidates:,} candidates"),
        ("set size", f"mean {sets.mean_size:.2f}, {_quantiles(sets.size_quantiles)}"),
        ("share of sizes", ", ".join(histogram)),
        ("one-token sets", f"{sets.one_token_share:.1%}"),
        ("mean mass", f"{sets.mean_mass:.4f}"),
        ("out of set", f"{sets.out_of_set_rate:.2%} of the response tokens"),
    ]
    if sets.sorted_mass is not None:
        ranks = [rank for rank in (1, 2, 4, 7, 16, 50) if rank <= len(sets.sorted_mass)]
        lines.append(("sorted mass", ", ".join(f"top {rank}: {sets.sorted_mass[rank - 1]:.3f}" for rank in ranks)))
    return lines


def _quantiles(quantiles: dict[float, int]) -> str:
    return ", ".join(f"{quantile:.0%} {value:,}" for quantile, value in quantiles.items())


def _ids_text(rollout: Rollout) -> Text:
    return Text(
        f"{_row_title(rollout)}\n"
        f"  prompt {len(rollout.prompt_ids)}: {_shortened(rollout.prompt_ids)}\n"
        f"  response {len(rollout.response_ids)}: {_shortened(rollout.response_ids)}"
    )


def _row_title(rollout: Rollout) -> str:
    by = "" if rollout.teacher is None else f"  by teacher {rollout.teacher}"
    return f"{rollout.row_id}  {rollout.finish_reason}{by}"


def _shortened(ids: Iterable[int]) -> str:
    words = [str(token_id) for token_id in ids]
    return " ".join(words[:_SHOWN_IDS]) + (" ..." if len(words) > _SHOWN_IDS else "")


def _decoded_table(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> Table:
    """One line a response token: the token, its log-probability, and the candidates of its state."""
    prompt = tokenizer.decode(rollout.prompt_ids.tolist())
    table = Table(title=Text(f"{_row_title(rollout)}\n{prompt}", justify="left"))
    for name in ("t", "token", "log-prob", "mass", "size", "candidates"):
        table.add_column(name)
    sets = rollout.sets
    num_lines = len(rollout.response_ids) if sets is None else sets.num_states
    for state in range(num_lines):
        has_token = state < len(rollout.response_ids)
        token = repr(tokenizer.decode([int(rollout.response_ids[state])])) if has_token else "(cut here)"
        logprob = f"{rollout.logprobs_T[state]:.3f}" if has_token and rollout.logprobs_T is not None else ""
        cells = [str(state), token, logprob, *_set_cells(sets, state, tokenizer)]
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _set_cells(sets: RecordedSets | None, state: int, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str]:
    if sets is None:
        return "", "", ""
    if sets.is_whole:
        return "1.000", "all", "the whole vocabulary"
    start, end = int(sets.offsets[state]), int(sets.offsets[state + 1])
    words = []
    for place in range(start, min(end, start + _SHOWN_CANDIDATES)):
        probability = "" if sets.logprobs_M is None else f" {math.exp(sets.logprobs_M[place]):.3f}"
        words.append(f"{tokenizer.decode([int(sets.ids_M[place])])!r}{probability}")
    more = f", ... {end - start - _SHOWN_CANDIDATES} more" if end - start > _SHOWN_CANDIDATES else ""
    return f"{math.exp(-sets.neg_log_mass_S[state]):.3f}", str(end - start), ", ".join(words) + more


def _load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    # Imported where it is used: --help, and a store without decoding, need no torch.
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise DataError(f"--tokenizer {path}: could not be loaded: {error}") from error


def _require_same_tokenizer(reader: StoreReader, tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    expected = reader.manifest.fingerprints.get("tokenizer")
    found = fingerprint_tokenizer(tokenizer)
    if expected is not None and found != expected:
        raise DataError(
            f"--tokenizer {path}: fingerprint {found}, but the ids in {reader.path} are those of {expected}; "
            "give the tokenizer that the store was made with"
        )


def plot_summary(found: StoreSummary, path: Path) -> None:
    """Draw set sizes, and the mean sorted probability mass (Figure 1 of the paper), to an image file.

    Raises:
        DataError: the store has no candidate sets, or the file can't be written.
    """
    if found.sets is None:
        raise DataError(
            f"--plot {path}: the store has no candidate sets to draw; use a store made with them, at a top_p below 1"
        )
    # Figure alone, without pyplot: no window system and no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    sizes, mass = figure.subplots(1, 2)
    labels = [str(low) if low == high else f"{low}-{high}" for low, high, _ in found.sets.size_histogram]
    shares = [count / found.sets.num_states for _, _, count in found.sets.size_histogram]
    sizes.bar(labels, shares)
    sizes.set(xlabel=f"candidates in the set (top_p {found.manifest.top_p})", ylabel="share of states")
    sizes.tick_params(axis="x", rotation=45)
    if found.sets.sorted_mass is None:
        mass.text(0.5, 0.5, "no log-probabilities recorded", ha="center", va="center")
    else:
        mass.plot(np.arange(1, len(found.sets.sorted_mass) + 1), found.sets.sorted_mass, marker=".")
        mass.set(xlabel="k", ylabel="mean mass of the top k", ylim=(0, 1))
        mass.grid(alpha=0.3)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise DataError(
            f"--plot {path}: can't be written: {error}; name a file ending in .png, .svg or .pdf"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
