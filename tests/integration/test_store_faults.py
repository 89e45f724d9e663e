"""Damaged stores, and stores of other rows, through the commands: found before use, and mended by one command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
from safetensors.torch import load_file, save_file
from tiny_job import job_flags, run_job, write_inputs

from openrlhf_bd.cli import inspect_store, train_bd_ray
from openrlhf_bd.demo.models import TEACHER_FOLDER
from openrlhf_bd.store import StoreReader, StoreWriter
from openrlhf_bd.store.repair import take_out_damaged

pytestmark = pytest.mark.integration

ROWS_PER_SHARD = 8
OTHER_FILES = (".lock", "manifest.json", "shards.jsonl", "job.yaml")


@dataclass(frozen=True)
class Made:
    """A finished store of 48 rows in six shards, one with the same rows under another name, and the inputs of both."""

    inputs: Path
    store: Path
    foreign: Path

    def flags(self, store: Path, run: Path, **changes: str) -> list[str]:
        rows = {"teacher__store_path": str(store), "teacher__rows_per_shard": str(ROWS_PER_SHARD)}
        return job_flags(self.inputs, run, **rows, **changes)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("made")
    write_inputs(folder)
    made = Made(folder, folder / "store", folder / "foreign")
    done = run_job(*made.flags(made.store, folder / "run"), module="openrlhf_bd.cli.generate_teacher")
    assert done.returncode == 0, done.stdout
    assert set(contents(made.store)) == {*OTHER_FILES, *(shard(n) for n in range(6))}
    reader = StoreReader(made.store)
    with StoreWriter(made.foreign, reader.manifest, ROWS_PER_SHARD) as writer:
        writer.append(reader.rollouts(range(len(reader))))
    return made


@pytest.fixture
def store(made: Made, tmp_path: Path) -> Path:
    """A copy, at another place than the one where it was made."""
    return shutil.copytree(made.store, tmp_path / "store")


def shard(number: int) -> str:
    return f"shard-{number:05d}.parquet"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def cut(store: Path, foreign: Path) -> None:
    path = store / shard(0)
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(store: Path, foreign: Path) -> None:
    path = store / shard(1)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove(store: Path, foreign: Path) -> None:
    (store / shard(2)).unlink()


def exchange(store: Path, foreign: Path) -> None:
    shutil.copyfile(foreign / shard(3), store / shard(3))


def add(store: Path, foreign: Path) -> None:
    shutil.copyfile(foreign / shard(0), store / shard(9))


def spoil_the_journal(store: Path, foreign: Path) -> None:
    path = store / "shards.jsonl"
    *lines, last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines, last.replace(b'"num_rows":8', b'"num_rows":9')]))


DAMAGES: list[tuple[Callable[[Path, Path], None], str, str]] = [
    (cut, shard(0), "it was cut, overwritten or copied only in part"),
    (flip_a_bit, shard(1), "is not what was sealed (8 rows: "),
    (remove, shard(2), "missing; the store lists it (8 rows: "),
    (exchange, shard(3), "(8 rows: "),
    (add, shard(9), "does not list this shard"),
    (spoil_the_journal, "shards.jsonl, line 6", "damaged or edited by hand"),
]


@pytest.mark.parametrize(("damage", "file", "finding"), DAMAGES, ids=[damage.__name__ for damage, _, _ in DAMAGES])
def test_damage_is_found_before_use(
    made: Made,
    store: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path, Path], None],
    file: str,
    finding: str,
) -> None:
    """A shard cut, changed, gone, or of another store: `--verify` and training name file, rows and remedy, and stop.

    Training stops before the first actor, and neither changes anything.
    """
    damage(store, made.foreign)
    before = contents(store)
    assert before != contents(made.store)
    for command in (
        lambda: inspect_store.main([str(store), "--verify"]),
        lambda: train_bd_ray.main(made.flags(store, tmp_path / "run")),
    ):
        assert command() == 74
        message = capsys.readouterr().err
        assert f"{store / file}: " in message
        assert finding in message
        assert "openrlhf-bd inspect PATH --repair" in message
    assert not ray.is_initialized()
    assert not (tmp_path / "run").exists()
    assert contents(store) == before


def test_one_command_mends_all_damage(made: Made, store: Path) -> None:
    """`--repair` makes exactly the rows of the damaged shards again, wherever the store was moved, and no others.

    A shard whose line in the journal is damaged counts as not sealed.
    """
    for damage, _, _ in DAMAGES:
        damage(store, made.foreign)
    damaged = contents(store)
    repaired = run_job(str(store), "--repair", "--verify", module="openrlhf_bd.cli.inspect_store")
    assert repaired.returncode == 0, repaired.stdout
    for number in range(4):
        assert f"damaged: {shard(number)}, 8 rows to make again" in repaired.stdout
    for number in (5, 9):
        assert f"not of this store: {shard(number)}" in repaired.stdout
    assert "complete, verified" in repaired.stdout

    found, as_made = contents(store), contents(made.store)
    assert list(StoreReader(store).row_ids) == list(StoreReader(made.store).row_ids)
    assert found[shard(4)] == as_made[shard(4)]
    assert found["job.yaml"] == as_made["job.yaml"]
    entries = [json.loads(line)["shard"] for line in found["shards.jsonl"].splitlines()]
    assert set(found) == {*OTHER_FILES, *(entry["file"] for entry in entries)}
    assert [entry["num_rows"] for entry in entries] == [ROWS_PER_SHARD] * 6
    taken_out = {f"{shard(number)}.0": damaged[shard(number)] for number in (0, 1, 3, 5, 9)}
    assert contents(store / "damaged") == taken_out
    # The store that it is a copy of is as it was.
    assert as_made.keys() == {*OTHER_FILES, *(shard(number) for number in range(6))}


@pytest.fixture(scope="module")
def models(made: Made) -> dict[str, str]:
    """Copies of teacher and student: another weight ("w"), a tokenizer of fewer merges ("t"), or both."""

    def copy(model: Path, name: str, *, weight: bool, merges: bool) -> str:
        folder = shutil.copytree(model, made.inputs / name)
        if weight:
            weights = load_file(folder / "model.safetensors")
            first = min(weights)
            weights[first] = weights[first].clone()
            weights[first].view(-1)[0] += 1
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        if merges:
            tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
            del tokenizer["model"]["merges"][-20:]
            (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
        return str(folder)

    return {
        "teacher w": copy(TEACHER_FOLDER, "teacher_w", weight=True, merges=False),
        "teacher t": copy(TEACHER_FOLDER, "teacher_t", weight=False, merges=True),
        "teacher wt": copy(TEACHER_FOLDER, "teacher_wt", weight=True, merges=True),
        "student t": copy(made.inputs / "student", "student_t", weight=False, merges=True),
    }


def other_rows(models: dict[str, str], *, finished: bool) -> dict[str, tuple[dict[str, str], list[str]]]:
    """What a job changes, and the differences that are named. Out of a finished store smaller sets could be cut."""
    tokenizers = {"teacher__model_name_or_path": models["teacher t"], "actor__model_name_or_path": models["student t"]}
    return {
        "tokenizer": (tokenizers, ["fingerprints.tokenizer"]),
        "template": ({"data__prompt_wrapper": "none"}, ["fingerprints.prompts"]),
        "teacher": ({"teacher__model_name_or_path": models["teacher w"]}, ["fingerprints.teacher"]),
        "p": ({"algo__distill__top_p": "0.97"}, ["candidate sets" if finished else "top_p"]),
        "sampler": ({"rollout__temperature": "0.7", "train__seed": "5"}, ["sampling.temperature", "sampling.seed"]),
    }


@pytest.mark.parametrize("what", ["tokenizer", "template", "teacher", "p", "sampler"])
@pytest.mark.parametrize("finished", [True, False], ids=["finished", "unfinished"])
def test_other_rows_are_refused(
    made: Made,
    models: dict[str, str],
    store: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    what: str,
    finished: bool,
) -> None:
    """A job of other rows than the store's, finished or not: status 2, the difference is named, nothing changes."""
    if not finished:
        (store / shard(2)).unlink()
        take_out_damaged(store)
    before = contents(store)
    changes, named = other_rows(models, finished=finished)[what]
    assert train_bd_ray.main(made.flags(store, tmp_path / "run", **changes)) == 2
    message = capsys.readouterr().err
    assert f"{store}: the" in message
    for name in named:
        assert f"  {name}: found" in message
    assert "nothing was changed" in message
    assert not ray.is_initialized()
    assert not (tmp_path / "run").exists()
    assert contents(store) == before


def test_every_difference_is_named(made: Made, models: dict[str, str], store: Path, tmp_path: Path) -> None:
    """All of them at once, as a command of its own: each is in one message, and nothing changes."""
    before = contents(store)
    cases = other_rows(models, finished=True).values()
    changes = {name: value for change, _ in cases for name, value in change.items()}
    changes["teacher__model_name_or_path"] = models["teacher wt"]
    done = run_job(*made.flags(store, tmp_path / "run", **changes))
    assert done.returncode == 2, done.stdout
    for name in (name for _, named in cases for name in named):
        assert f"  {name}: found" in done.stdout
    assert contents(store) == before
