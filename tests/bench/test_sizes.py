"""bench.sizes: shapes without weights, and one real run."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import sizes
from bench.inflate.shapes import SHAPES
from bench.inflate.write import inflate
from bench.memory import Line
from bench.sizes import Row
from jobs import checkpoints
from jobs.spec.job import Quantization


def test_a_shape_has_the_tensors_of_its_files(tmp_path: Path) -> None:
    inflate(SHAPES["test"], tmp_path)
    written = checkpoints.from_folder(tmp_path)
    made = sizes.checkpoint_of(SHAPES["test"])
    assert {(t.name, t.dtype, t.shape) for t in made.tensors} == {
        (t.name, t.dtype, t.shape) for t in written.tensors
    }
    for name in ("architectures", "hidden_size", "num_key_value_heads", "tie_word_embeddings"):
        assert made.config[name] == written.config[name]


@pytest.mark.parametrize(
    ("name", "billions"), [("7B", 6.738), ("8B", 8.03), ("13B", 13.016), ("70B", 68.977)]
)
def test_parameters_are_the_published_ones(name: str, billions: float) -> None:
    assert sizes.parameters_of(sizes.ESTIMATED[name]) / 1e9 == pytest.approx(billions, abs=0.005)


def test_weights_in_four_bits_are_below_the_published_memory() -> None:
    rows = [[cell.strip() for cell in line.split("|")] for line in sizes.estimated()[2:]]
    seen = {cells[1]: cells for cells in rows}
    assert set(seen) == set(sizes.ESTIMATED)
    for name, told in sizes.PUBLISHED.items():
        four = float(seen[name][6])
        assert 0.25 * told < four < told
        assert float(seen[name][4]) == pytest.approx(told / 0.3, rel=0.05), "70 % less than 16 bits"


def test_a_row_is_the_peaks_of_what_was_found() -> None:
    lines = [Line("load", 50, 60), Line("scoring", 90, 80), Line("measure", 150, 100)]
    found = {"weights": 20, "base": 5, "peaks": {"export": 75}}
    row = Row.of(lines, found, 40)
    assert (row.search.estimated, row.search.measured) == (90, 80)
    assert (row.written, row.again.measured) == (70, 100)
    assert row.cells()[1] == "25%"


@pytest.mark.slow
@pytest.mark.parametrize("kind", sizes.KINDS)
def test_a_real_run(kind: Quantization, tmp_path: Path) -> None:
    """Quantised weights are as small as the shapes say; the peaks are ordered as the phases."""
    inflate(SHAPES["test"], tmp_path / "test")
    row = sizes.measured("test", kind, "cpu", 4, tmp_path)
    least = {"none": 1.0, "bnb_8bit": 0.5, "bnb_4bit": 0.25}[kind]
    assert least < row.weights / (2 * row.parameters) + 1e-9 < least + 0.1
    assert row.search.measured > row.weights * 0.9
    assert row.again.measured > row.written * 0.9
