"""bench.workers: its figures, and one short run with two real workers."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from bench import workers
from bench.scaling import Row, read, table
from demo import MODEL


def row(count: int, seed: int, seconds: float, volume: float = 0.9) -> Row:
    return Row(
        workers=count, seed=seed, trials=60, seconds=seconds, scored=0.8 * seconds * count,
        engines=54.0, supervisors=4.0, servers=2.0, hypervolume=volume,
    )  # fmt: skip


def test_figures_of_one_run() -> None:
    assert row(2, 0, 30.0).rate == 120.0
    assert row(2, 0, 30.0).scoring == pytest.approx(0.8)
    assert row(2, 0, 30.0).cells() == [
        "30.0",
        "120.0",
        "80.0%",
        "0.900",
        "0.067",
        "0.033",
        "0.9000",
    ]


def test_ratios_are_seed_by_seed() -> None:
    rows = [row(1, 0, 60.0), row(1, 1, 90.0), row(2, 0, 30.0), row(2, 1, 50.0, 0.81)]
    one, two = table(rows)[-2:]
    assert "| 1 | 2 | 50.0 | 1.00 × (1.00–1.00)" in one
    assert "| 2 | 2 | 96.0 | 1.90 × (1.80–2.00) | 1.00 × (1.00–1.00) | 0.8550 | -5.0% |" in two


def test_finished_runs_are_read_again(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    assert read(file) == []
    file.write_text(row(2, 3, 1.0).model_dump_json() + "\n")
    assert read(file) == [row(2, 3, 1.0)]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_real_workers_fill_the_budget() -> None:
    given = argparse.Namespace(model=MODEL, prompts=8, device="cpu", dtype="bfloat16", trials=5)
    found = workers.measured(2, 0, given)
    assert found.trials == 5 and found.seconds > 0
    assert 0 < found.scoring <= 1.05
    assert found.engines > 0 and found.supervisors > 0 and found.servers > 0
    assert 0.5 < found.hypervolume <= 1
