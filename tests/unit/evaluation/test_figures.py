"""Figures: what goes into them and how they come out."""

import csv
import math
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from openrlhf_bd.evaluation.figures import (
    MAX_POINTS,
    curves,
    legend_entries,
    moving_mean,
    sorted_mass,
    thin_out,
    to_svg,
    write_files,
)
from openrlhf_bd.evaluation.run_data import Curve


def test_moving_mean_by_hand():
    """Each value becomes the mean of itself and those before it in the window; gaps do not count."""
    assert moving_mean([1.0, 2.0, 6.0, 10.0], 2) == pytest.approx([1.0, 1.5, 4.0, 8.0])
    assert moving_mean([1.0, math.nan, 5.0], 2) == pytest.approx([1.0, 1.0, 5.0])
    assert math.isnan(moving_mean([math.inf, 1.0], 1)[0])


def test_long_curves_are_thinned_out_by_means():
    """Neighbouring points are averaged, finite ones only, so that a page stays small."""
    assert thin_out([1, 2, 3, 4, 5], [1.0, 3.0, math.nan, 7.0, 9.0], 3) == ([1.5, 3.5, 5.0], [2.0, 7.0, 9.0])
    steps, _ = thin_out(range(100_000), [0.0] * 100_000, MAX_POINTS)
    assert len(steps) <= MAX_POINTS


def test_methods_stay_distinguishable():
    """Sixteen methods have sixteen different pairs of colour and line style."""
    entries = legend_entries([f"m{i}" for i in range(16)]).values()
    assert len({(entry.colour, entry.line_style) for entry in entries}) == 16


def make_curves(label: str = "a & <b> $x$"):
    legend = legend_entries([label, "other"])
    by_label = {label: Curve((1, 2, 3), (1.0, math.nan, 3.0)), "other": Curve((1, 2), (0.5, math.inf))}
    return curves("train_loss", "Loss", "The loss.", "nats/token", by_label, legend)


def test_svg_is_well_formed_and_takes_the_pages_colours():
    """The SVG is an element of the page: well-formed, scalable, coloured by the page's variables, without metadata."""
    svg = to_svg(make_curves())
    root = ET.fromstring(svg)
    assert root.tag.endswith("svg")
    assert "viewBox" in root.attrib
    assert "width" not in root.attrib
    assert "var(--s0)" in svg
    assert "var(--muted)" in svg
    assert "<metadata" not in svg
    assert "optimizer step" in "".join(root.itertext())
    assert "nats/token" in "".join(root.itertext())


def test_the_same_data_give_the_same_svg():
    """A report of the same runs is the same file."""
    assert to_svg(make_curves()) == to_svg(make_curves())


def test_png_and_csv_are_written(tmp_path: Path):
    """The figure is also written as a picture and as its data."""
    write_files(make_curves(), tmp_path)
    assert (tmp_path / "train_loss.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "train_loss.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["method", "step", "nats/token"]
    assert rows[1] == ["a & <b> $x$", "1", "1.0"]
    assert len(rows) == 6


@pytest.mark.parametrize("mass", [[1.0], [0.5, 0.6], [0.999, 1.0]])
def test_sorted_mass_of_any_teacher_can_be_drawn(mass: list[float]):
    """Flat and peaked teachers, and a single rank, all give a figure."""
    assert "mean probability mass" in to_svg(sorted_mass(mass, top_p=0.8))
