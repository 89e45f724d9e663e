"""Look into a store of rows: what it is, how large its candidate sets are, whether it is whole.

python3 -m openrlhf_bd.cli.inspect_store PATH [--verify] [--repair] [--rows N [--tokenizer PATH]] [--plot FILE.png]
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from openrlhf_bd.cli.flags import main_guard
from openrlhf_bd.cli.store_figure import plot_summary
from openrlhf_bd.driver.verify import verify_rows
from openrlhf_bd.errors import DataError, StoreError
from openrlhf_bd.paths import format_bytes
from openrlhf_bd.records import RecordedSets, Rollout
from openrlhf_bd.store import StoreManifest, StoreReader, StoreSummary, summary
from openrlhf_bd.store.fingerprints import fingerprint_tokenizer
from openrlhf_bd.store.folder import StorePath, open_folder
from openrlhf_bd.store.manifest import JOB_FILE, StoreState
from openrlhf_bd.store.repair import DAMAGED_FOLDER, take_out_damaged
from openrlhf_bd.store.statistics import OnlineSummary, SetSummary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Candidates of a state, and ids of a row, that a line of the terminal has room for.
_SHOWN_CANDIDATES = 8
_SHOWN_IDS = 24
_CAPTION = "* sampled from outside its set; prob. and candidates at temperature 1"


def build_parser() -> argparse.ArgumentParser:
    """The command line of `openrlhf-bd inspect`."""
    parser = argparse.ArgumentParser(
        prog="openrlhf-bd inspect", description="Summarise a store of teacher or gold rows, and check that it is whole."
    )
    parser.add_argument("path", help="folder of the store, or its URL")
    parser.add_argument("--verify", action="store_true", help="compare every byte with what was sealed (SHA-256)")
    parser.add_argument(
        "--repair", action="store_true", help="take damaged shards out, and have exactly their rows made again"
    )
    parser.add_argument(
        "--rows", type=int, default=0, metavar="N", help="show N rows, from the first to the last at equal distances"
    )
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="tokenizer that decodes the shown rows and their candidates"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="draw lengths, set sizes and sorted probabilities (Fig. 1)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status: 0, or that of the error whose message it printed."""
    options = build_parser().parse_args(argv)
    return main_guard(lambda: _inspect(options, Console()))


def _inspect(options: argparse.Namespace, console: Console) -> int:
    tokenizer = _load_tokenizer(options.tokenizer) if options.tokenizer else None
    if options.repair:
        repair(options.path, console)
    if options.verify:
        verify_rows(options.path)
    reader = StoreReader(options.path, require_complete=False)
    if tokenizer is not None:
        _require_same_tokenizer(reader, tokenizer, options.tokenizer)
    found = summary(reader)
    state = f"{found.manifest.kind}, {'complete' if found.complete else 'unfinished'}"
    console.print(Text(f"{reader.path} ({state}{', verified' if options.verify else ''})"))
    console.print(_summary_table(found, num_quarantined=len(reader.quarantined)))
    for row in reader.quarantined:
        console.print(Text(f"quarantined: row {row.row_id} ({row.reason})"))
    for rollout in reader.rollouts(_spread(len(reader), options.rows)):
        console.print(_ids_text(rollout) if tokenizer is None else _decoded_table(rollout, tokenizer))
    if options.plot is not None:
        plot_summary(found, options.plot)
        console.print(Text(f"drawn: {options.plot}"))
    return 0


def repair(path: StorePath, console: Console) -> None:
    """Take damaged shards out of a store, and run the job that made it for the rows that are missing.

    Raises:
        BDError: the store cannot be repaired, or the job fails; what was whole is as it was.
    """
    if StoreState.load(open_folder(path)).manifest.online:
        raise StoreError(
            f"{path}: rows of an online run were made under the student's weights of their steps, which only that run "
            "passes through, so they cannot be made again; nothing was changed. Start the run anew in another folder"
        )
    found = take_out_damaged(path)
    for entry in found.damaged:
        console.print(Text(f"damaged: {entry.file}, {entry.num_rows:,} rows to make again"))
    for name in found.unlisted:
        console.print(Text(f"not of this store: {name}, now in {DAMAGED_FOLDER}/"))
    if StoreReader(path, require_complete=False).complete:
        console.print("every shard is whole")
        return
    try:
        job = open_folder(path).read(JOB_FILE)
    except FileNotFoundError:
        raise StoreError(
            f"{path}/{JOB_FILE}: not found, so the missing rows cannot be made here; "
            "run the command that made the store again"
        ) from None
    # Imported where it is used: it takes seconds.
    from openrlhf_bd.cli.jobs import run_stages

    description = "Make the missing rows of a store again."
    with tempfile.TemporaryDirectory(prefix="openrlhf-bd-repair-") as folder:
        config = Path(folder) / JOB_FILE
        config.write_bytes(job)
        # The store may have been moved or copied since, and the folder of its run may be gone, or in use.
        places = ["--teacher.store_path", str(path), "--ckpt.output_dir", f"{folder}/run"]
        options = ["--config", str(config), *places]
        run_stages(options, stages=("generate",), prog="openrlhf-bd inspect", description=description)


def _spread(num_rows: int, num_shown: int) -> list[int]:
    """Rows at equal distances, the first and the last among them."""
    return np.linspace(0, num_rows - 1, max(0, min(num_shown, num_rows))).astype(int).tolist()


def _summary_table(found: StoreSummary, *, num_quarantined: int) -> Table:
    manifest = found.manifest
    unfinished = "; the command that makes it goes on there"
    table = Table(show_header=False)
    lines: list[tuple[str, str]] = [
        ("rows", f"{found.num_rows:,} of {manifest.num_rows:,}{'' if found.complete else unfinished}"),
        ("rows of", manifest.num_rows_in_words),
    ]
    if num_quarantined:
        lines.append(("quarantined", f"{num_quarantined:,}, listed below"))
    if found.num_rows:
        lines += _token_lines(found)
    lines += [(f"rows of teacher {name}", f"{count:,}") for name, count in found.rows_by_teacher.items()]
    if found.online is not None:
        lines += _online_lines(found.online)
    if found.sets is not None and found.sets.num_states:
        lines += _set_lines(found.sets, manifest)
    elif manifest.has_whole_sets:
        lines.append(("candidate sets", f"top_p 1: the whole vocabulary, {found.num_states:,} states"))
    lines += [(f"fingerprint {name}", value) for name, value in sorted(manifest.fingerprints.items())]
    lines += [(f"sampling {name}", str(value)) for name, value in sorted(manifest.sampling.items())]
    if manifest.versions:
        lines += [("made with", ", ".join(f"{name} {version}" for name, version in sorted(manifest.versions.items())))]
    lines += [("created", manifest.created)]
    for name, value in lines:
        table.add_row(Text(name), Text(value))
    return table


def _online_lines(online: OnlineSummary) -> list[tuple[str, str]]:
    staleness = f"mean {online.mean_staleness:.2f}, largest {online.max_staleness}" if online.student_share else "none"
    return [
        ("steps", f"{online.num_steps:,}"),
        ("rows of the student", f"{online.student_share:.1%}"),
        ("staleness", f"{staleness} (steps by which the weights behind them were late)"),
    ]


def _token_lines(found: StoreSummary) -> list[tuple[str, str]]:
    reasons = ", ".join(
        f"{reason} {count:,} ({count / found.num_rows:.0%})" for reason, count in found.finish_reasons.items()
    )
    length = f"mean {found.mean_response_length:.1f}, {_quantiles(found.response_length_quantiles)}"
    return [
        ("prompt tokens", f"{found.num_prompt_tokens:,}, mean {found.num_prompt_tokens / found.num_rows:.1f}"),
        ("response tokens", f"{found.num_response_tokens:,}"),
        ("response length", length),
        ("finish reasons", reasons),
        ("on disk", f"{format_bytes(found.size_bytes)}, {found.bytes_per_token:.1f} bytes a response token"),
    ]


def _set_lines(sets: SetSummary, manifest: StoreManifest) -> list[tuple[str, str]]:
    histogram = [
        f"{low if low == high else f'{low}-{high}'}: {count / sets.num_states:.1%}"
        for low, high, count in sets.size_histogram
    ]
    lines = [
        ("candidate sets", f"top_p {manifest.top_p}, {sets.num_states:,} states, {sets.num_candidates:,} candidates"),
        ("set size", f"mean {sets.mean_size:.2f}, {_quantiles(sets.size_quantiles)}"),
        ("share of sizes", ", ".join(histogram)),
        ("one-token sets", f"{sets.one_token_share:.1%}"),
        ("mass P", f"mean {sets.mean_mass:.4f}"),
        ("out of set", f"{sets.out_of_set_rate:.2%} of the response tokens"),
    ]
    if sets.incomplete_share is not None:
        incomplete = (
            f"{sets.incomplete_share:.2%} of the sets: the {manifest.max_candidates} likeliest tokens hold less"
        )
        lines.append(("incomplete", incomplete))
    if sets.sorted_mass is not None:
        ranks = [rank for rank in (1, 2, 4, 7, 16, 50) if rank <= len(sets.sorted_mass)]
        lines.append(("mass of the top k", ", ".join(f"{rank}: {sets.sorted_mass[rank - 1]:.3f}" for rank in ranks)))
    return lines


def _quantiles(quantiles: dict[float, int]) -> str:
    names = {0.5: "median", 1.0: "largest"}
    return ", ".join(f"{names.get(quantile, f'{quantile:.0%}')} {value:,}" for quantile, value in quantiles.items())


def _ids_text(rollout: Rollout) -> Text:
    return Text(
        f"{_row_title(rollout)}\n"
        f"  prompt {len(rollout.prompt_ids)}: {_shortened(rollout.prompt_ids)}\n"
        f"  response {len(rollout.response_ids)}: {_shortened(rollout.response_ids)}"
    )


def _row_title(rollout: Rollout) -> str:
    by = "" if rollout.teacher is None else f"  by teacher {rollout.teacher}"
    origin = rollout.origin
    made = "" if origin is None else f"  step {origin.step} by {origin.source}"
    if origin is not None and origin.policy_version is not None:
        made += f" version {origin.policy_version}"
    return f"{rollout.row_id}  {rollout.finish_reason}{by}{made}"


def _shortened(ids: Iterable[int]) -> str:
    words = [str(token_id) for token_id in ids]
    return " ".join(words[:_SHOWN_IDS]) + (" ..." if len(words) > _SHOWN_IDS else "")


def _decoded_table(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> Table:
    """One line a response token: the token, its probability, and the candidates of its state."""
    prompt = str(tokenizer.decode(rollout.prompt_ids.tolist())).strip()
    title = Text(f"{_row_title(rollout)}\n{prompt}", justify="left")
    table = Table(title=title, title_style="", caption=_CAPTION, caption_justify="left")
    for name in ("t", "token", "prob.", "mass P", "size", "candidates"):
        table.add_column(name, justify="right" if name in ("t", "prob.", "mass P", "size") else "left")
    sets = rollout.sets
    num_lines = len(rollout.response_ids) if sets is None else sets.num_states
    for state in range(num_lines):
        has_token = state < len(rollout.response_ids)
        token_id = int(rollout.response_ids[state]) if has_token else None
        token = "(cut here)" if token_id is None else repr(tokenizer.decode([token_id]))
        if token_id is not None and sets is not None and not sets.is_whole and not _holds(sets, state, token_id):
            token += " *"
        probability = _probability(rollout.logprobs_T[state]) if has_token and rollout.logprobs_T is not None else ""
        cells = [str(state), token, probability, *_set_cells(sets, state, tokenizer)]
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _holds(sets: RecordedSets, state: int, token_id: int) -> bool:
    return token_id in sets.ids_M[sets.offsets[state] : sets.offsets[state + 1]]


def _probability(logprob: float) -> str:
    shown = f"{math.exp(logprob):.3f}"
    return shown if shown != "0.000" else "<.001"


def _set_cells(sets: RecordedSets | None, state: int, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str]:
    if sets is None:
        return "", "", ""
    if sets.is_whole:
        return "1.000", "all", "the whole vocabulary"
    start, end = int(sets.offsets[state]), int(sets.offsets[state + 1])
    words = []
    for place in range(start, min(end, start + _SHOWN_CANDIDATES)):
        probability = "" if sets.logprobs_M is None else f" {_probability(sets.logprobs_M[place])}"
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


if __name__ == "__main__":
    sys.exit(main())
