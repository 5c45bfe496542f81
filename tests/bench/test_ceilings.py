"""bench.ceilings as a whole, on the demo model with few prompts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from bench import ceilings, machine, peaks
from bench.counting import Work
from bench.peaks import Ceilings, Peak


def test_cells_are_means_and_shares() -> None:
    limits = Ceilings(torch.float32, 1, Peak(100e9, 120e9, ""), Peak(1, 1, ""), Peak(10e9, 9e9, ""))
    work = Work(flops=400_000_000_000, bytes=16_000_000_000, wall=8.0, processor=5.0)
    assert ceilings.cells_of(work, limits, trials=4) == [
        "2.000", "1.250", "100.0", "50 G", "50%", "67%", "4.00", "20%",
    ]  # fmt: skip


def test_the_tables(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (
        ("LEAST", {"cpu": 0.01}), ("CUBES", {"cpu": (64, 256)}), ("FAR", {"cpu": 1 << 24}),
    ):  # fmt: skip
        monkeypatch.setattr(peaks, name, value)
    few = ["--trials", "2", "--warm", "2", "--prompts", "4"]
    monkeypatch.setattr(sys, "argv", ["ceilings", "--model", "demo", "--device", "cpu", *few])
    kept = torch.get_num_threads()
    try:
        ceilings.main()
    finally:
        torch.set_num_threads(kept)
    said = capsys.readouterr().out
    rows = {
        cells[3]: cells
        for line in said.splitlines()
        if len(cells := [cell.strip() for cell in line.split("|")]) == 13
    }
    assert {"divergence", "answers", "whole trial"} <= set(rows)
    whole = rows.pop("whole trial")
    parts = [rows[name] for name in ("divergence", "answers", "kept states") if name in rows]
    assert float(whole[6]) == pytest.approx(sum(float(part[6]) for part in parts), abs=0.2)
    # 4 prompts of 20 tokens and 4 with an answer, 4 million parameters in linear layers
    assert 0.5 < float(whole[6]) < 20
    assert 0 < float(whole[9].rstrip("%")) < 100
    assert "core" in said.splitlines()[0] and "load" in said.splitlines()[0]


def test_a_busy_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (50.0, 0.0, 0.0))
    assert "NOT QUIET" in machine.quiet(machine.load())
    with pytest.raises(SystemExit, match="wait"):
        machine.demand_quiet()
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    machine.demand_quiet()


def test_the_machine_is_named_by_its_parts_alone() -> None:
    import platform

    name = machine.machine("cpu", 2)
    assert "2 threads" in name and torch.__version__ in name
    assert platform.node() not in name and str(Path.cwd()) not in name
