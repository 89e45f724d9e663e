"""`openrlhf-bd theory`."""

import csv
import struct

import pytest

from openrlhf_bd.cli.main import main
from openrlhf_bd.theory.bounds import kappa

SMALL = ["--num_mdps", "8", "--num_states", "4", "--num_actions", "5"]


def rows(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_prints_draws_and_writes(tmp_path, capsys, monkeypatch):
    """One line a pair of gamma and p, no violation, a figure, and its points and the table as CSV."""
    monkeypatch.setenv("COLUMNS", "80")
    folder = tmp_path / "new" / "theory"
    arguments = ["--gammas", "0.5", "0.99", "--top_ps", "0.5", "0.8", "0.95", "--output_dir", str(folder)]
    assert main(["theory", *SMALL, *arguments]) == 0
    printed = capsys.readouterr().out
    assert all(len(line) <= 80 for line in printed.splitlines() if str(folder) not in line)
    assert "…" not in printed
    assert "22.1" in printed  # kappa(.8) at gamma .99

    table = rows(folder / "theory.csv")
    assert [(float(row["gamma"]), float(row["p"])) for row in table] == [
        (gamma, top_p) for gamma in (0.5, 0.99) for top_p in (0.5, 0.8, 0.95)
    ]
    points = rows(folder / "gaps.csv")
    assert len(points) == 6 * 8
    for line in table:
        same = [point for point in points if (point["gamma"], point["p"]) == (line["gamma"], line["p"])]
        largest = max(float(point["projected_gap"]) for point in same)
        assert float(line["largest_projected_gap"]) == largest <= float(line["kappa_p"])
        assert float(line["mean_lower_bound"]) <= float(line["mean_optimal_gap"]) <= float(line["mean_projected_gap"])
        assert float(line["mean_kappa_mass"]) <= float(line["kappa_p"])
        assert int(line["violations"]) == 0
        assert float(line["largest_residual"]) <= 1e-11
    image = (folder / "gaps.png").read_bytes()
    assert image[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", image[16:24])
    assert width > height > 400


def test_one_gamma_and_one_p(tmp_path):
    """A single panel with a single bound can be drawn; the same seed gives the same numbers."""
    for name in ("first", "second"):
        assert (
            main(["theory", *SMALL, "--gammas", "0.9", "0.9", "--top_ps", "0.8", "--output_dir", str(tmp_path / name)])
            == 0
        )
    assert (tmp_path / "first" / "gaps.csv").read_bytes() == (tmp_path / "second" / "gaps.csv").read_bytes()


def test_broken_claims_end_with_status_one(tmp_path, capsys, monkeypatch):
    """Were the bound wrong, the command would say so and exit with 1."""
    monkeypatch.setattr("openrlhf_bd.theory.gaps.kappa", lambda mass, gamma: 0.1 * kappa(mass, gamma))
    assert main(["theory", *SMALL, "--gammas", "0.9", "--top_ps", "0.8", "--output_dir", str(tmp_path)]) == 1
    assert "claims did not hold" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gammas", "1"], "--gammas has 1; expected numbers between 0 and 1"),
        (["--gammas", "0.5", "0"], "--gammas has 0;"),
        (["--top_ps", "1"], "--top_ps has 1;"),
        (["--num_mdps", "0"], "--num_mdps is 0; expected at least 1"),
        (["--seed", "-1"], "--seed is -1; expected 0 or more"),
        (["--output_dir", __file__], "can't be made: File exists"),
    ],
)
def test_wrong_options(arguments, message, capsys):
    """An option that makes no sense ends with status 2 and what was expected, before anything is solved."""
    assert main(["theory", *SMALL, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_help_has_examples(capsys):
    """--help describes every option and shows commands to copy."""
    with pytest.raises(SystemExit) as stop:
        main(["theory", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    options = ("num_mdps", "num_states", "num_actions", "gammas", "top_ps", "seed", "output_dir")
    assert all(f"--{name}" in text for name in options)
    assert text.count("openrlhf-bd theory --") >= 2
