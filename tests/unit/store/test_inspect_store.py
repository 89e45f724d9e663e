"""`openrlhf-bd inspect` as a person calls it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from openrlhf_bd.cli.inspect_store import main
from openrlhf_bd.cli.store_figure import draw_summary
from openrlhf_bd.records import RecordedSets, Rollout
from openrlhf_bd.store import StoreManifest, StoreReader, StoreWriter, summary
from openrlhf_bd.store.fingerprints import fingerprint_tokenizer
from tests.unit.store.rows import gold_row, teacher_manifest, teacher_row

WORDS = ["<eos>", "yes", "no", "[bold]maybe"]


def words_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(words)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>")), eos_token="<eos>"
    )


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """One cut row: "yes", then a state of two candidates; and the tokenizer beside it."""
    tokenizer = words_tokenizer(WORDS)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    manifest = teacher_manifest(
        num_prompts=1, n_samples_per_prompt=1, fingerprints={"tokenizer": fingerprint_tokenizer(tokenizer)}
    )
    sets = RecordedSets(
        ids_M=np.array([1, 3, 2], np.int32),
        offsets=np.array([0, 1, 3], np.int64),
        neg_log_mass_S=np.zeros(2, np.float32),
        logprobs_M=np.log(np.array([1.0, 0.75, 0.25], np.float32)),
    )
    ids = np.array([1], np.int32)
    with StoreWriter(tmp_path / "store", manifest) as writer:
        writer.append([Rollout("train:0:0", ids, ids, "length", np.zeros(1, np.float32), sets)])
    return tmp_path / "store"


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def test_summary_and_verification(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A whole store gives its numbers and exit status 0."""
    assert main([str(store), "--verify"]) == 0
    shown = capsys.readouterr().out
    assert "complete, verified" in shown
    assert "mean 1.50" in shown
    assert "1: 0.875, 2: 1.000" in shown


def test_rows_as_ids(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows are shown by their ids where no tokenizer is given."""
    assert main([str(store), "--rows", "5"]) == 0
    assert "response 1: 1\n" in capsys.readouterr().out


def test_rows_decoded_with_candidates(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the tokenizer each state shows its candidates and their probabilities; brackets in a token are text."""
    assert main([str(store), "--rows", "1", "--tokenizer", str(store.parent / "tokenizer")]) == 0
    shown = capsys.readouterr().out
    assert "'[bold]maybe' 0.750, 'no' 0.250" in shown
    assert "(cut here)" in shown


def test_store_of_p_of_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sets without ids are called what they are, in the summary and beside a decoded token."""
    tokenizer = words_tokenizer(WORDS)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    manifest = teacher_manifest(
        num_prompts=1,
        n_samples_per_prompt=1,
        fingerprints={"tokenizer": fingerprint_tokenizer(tokenizer)},
        top_p=1.0,
        always_include=(),
        has_logprobs=False,
    )
    ids = np.array([1], np.int32)
    with StoreWriter(tmp_path / "store", manifest) as writer:
        writer.append([Rollout("train:0:0", ids, ids, "stop", np.zeros(1, np.float32), RecordedSets.whole(1))])
    assert main([str(tmp_path / "store"), "--rows", "1", "--tokenizer", str(tmp_path / "tokenizer")]) == 0
    shown = capsys.readouterr().out
    assert "top_p 1: the whole vocabulary, 1 states" in shown
    assert "the whole vocabulary" in shown.split("train:0:0")[1]


def test_other_tokenizer_is_refused(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ids are not decoded by a tokenizer that did not make them: exit status 2 and a message alone."""
    words_tokenizer([*WORDS, "more"]).save_pretrained(tmp_path / "other")
    assert main([str(store), "--rows", "1", "--tokenizer", str(tmp_path / "other")]) == 2
    assert "give the tokenizer that the store was made with" in capsys.readouterr().err
    assert main([str(store), "--tokenizer", str(tmp_path / "store")]) == 2


def test_plot(store: Path, tmp_path: Path) -> None:
    """The drawing is a picture file, of lengths alone without sets; no rows or a strange file type are refused."""
    assert main([str(store), "--plot", str(tmp_path / "sets.png")]) == 0
    assert (tmp_path / "sets.png").read_bytes().startswith(b"\x89PNG")
    assert main([str(store), "--plot", str(tmp_path / "sets.docx")]) == 2
    with StoreWriter(tmp_path / "gold", StoreManifest(kind="gold", num_prompts=1)) as writer:
        writer.append([gold_row(0)])
    assert main([str(tmp_path / "gold"), "--plot", str(tmp_path / "gold.png")]) == 0
    assert (tmp_path / "gold.png").read_bytes().startswith(b"\x89PNG")
    StoreWriter(tmp_path / "empty", teacher_manifest()).suspend()
    assert main([str(tmp_path / "empty"), "--plot", str(tmp_path / "empty.png")]) == 2
    assert not (tmp_path / "empty.png").exists()


def test_picture_shows_the_store(store: Path) -> None:
    """Bars and lines of the picture are the store's numbers: lengths, set sizes, and Fig. 1's sorted probabilities."""
    from matplotlib.figure import Figure

    figure = Figure()
    draw_summary(summary(StoreReader(store)), figure)
    lengths, sizes, ranks = figure.axes
    # One cut response of one token.
    assert [bar.get_height() for bar in lengths.patches] == [1]
    # A set of one token and a set of two.
    assert [bar.get_height() for bar in sizes.patches] == [0.5, 0.5]
    # The most probable tokens have 1.0 and 0.75, the second ones nothing and 0.25, in float16.
    assert [bar.get_height() for bar in ranks.patches[:3]] == pytest.approx([0.875, 0.125, 0.0], abs=1e-3)
    assert ranks.lines[0].get_ydata()[:3] == pytest.approx([0.875, 1.0, 1.0], abs=1e-3)


def test_unfinished_and_quarantined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An unfinished store tells how many rows it has, an empty one no means of nothing, and lost rows are named."""
    manifest = teacher_manifest(num_prompts=3, n_samples_per_prompt=1)
    writer = StoreWriter(tmp_path / "store", manifest)
    writer.suspend()
    assert main([str(tmp_path / "store"), "--rows", "2"]) == 0
    shown = capsys.readouterr().out
    assert "0 of 3; the command that makes it goes on there" in shown
    assert "nan" not in shown
    with StoreWriter(tmp_path / "store", manifest) as writer:
        writer.append([teacher_row(number) for number in range(2)])
        writer.quarantine("train:2:0", "it died")
    assert main([str(tmp_path / "store")]) == 0
    shown = capsys.readouterr().out
    assert "2 of 3 " in shown
    assert "stop 2 (100%)" in shown
    assert "quarantined: row train:2:0 (it died)" in shown


def test_shown_rows_are_spread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--rows shows the first row, the last, and others at equal distances."""
    with StoreWriter(tmp_path / "store", teacher_manifest(num_prompts=5, n_samples_per_prompt=1)) as writer:
        writer.append([teacher_row(number) for number in range(5)])
    assert main([str(tmp_path / "store"), "--rows", "3"]) == 0
    shown = capsys.readouterr().out
    assert [number for number in range(5) if f"train:{number}:0" in shown] == [0, 2, 4]


def test_sampled_token_outside_its_set(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A token that lies outside the set of its state is marked, and small probabilities are no zeros."""
    sets = RecordedSets(
        ids_M=np.array([2, 0], np.int32),
        offsets=np.array([0, 2], np.int64),
        neg_log_mass_S=np.zeros(1, np.float32),
        logprobs_M=np.log(np.array([0.75, 1e-4], np.float32)),
    )
    manifest = StoreReader(store).manifest
    ids = np.array([1], np.int32)
    with StoreWriter(store.parent / "other", manifest) as writer:
        writer.append([Rollout("train:0:0", ids, ids, "stop", np.log(np.array([0.25], np.float32)), sets)])
    assert main([str(store.parent / "other"), "--rows", "1", "--tokenizer", str(store.parent / "tokenizer")]) == 0
    shown = capsys.readouterr().out
    assert "'yes' *" in shown
    assert "0.250" in shown
    assert "'no' 0.750, '<eos>' <.001" in shown


def test_damage_and_absence(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Damage ends with status 74 and the file's name, without a traceback; so does a path without a store."""
    shard = store / "shard-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert main([str(store)]) == 74
    shown = capsys.readouterr().err
    assert "shard-00000.parquet" in shown
    assert "Traceback" not in shown
    assert main([str(store.parent)]) == 74
    assert "manifest.json: not found" in capsys.readouterr().err


def test_unfinished_store_can_be_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A store that is still being made shows the rows sealed by now."""
    StoreWriter(tmp_path, teacher_manifest()).suspend()
    assert main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "unfinished" in shown
    assert "0 of 20" in shown
