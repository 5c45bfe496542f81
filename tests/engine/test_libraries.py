"""Settings of libraries reach them: an engine process sets them before it loads any."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from engine.libraries import SETTINGS, settle


def test_nothing_that_reads_them_is_loaded_before() -> None:
    code = "import sys, engine.__main__; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "engine.libraries" in done.stdout.split()
    assert not {"torch", "numpy", "transformers", "tokenizers"} & set(done.stdout.split())


def test_what_is_set_already_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, *others = SETTINGS
    for name in others:
        monkeypatch.setenv(name, "to be restored")
        monkeypatch.delenv(name)
    monkeypatch.setenv(kept, "mine")
    settle()
    assert os.environ[kept] == "mine"
    assert {name: os.environ[name] for name in others} == {name: SETTINGS[name] for name in others}


def test_products_in_16_bits_keep_few_kernels() -> None:
    """Of 600 numbers of rows; some 340 MB, and without the setting 430."""
    code = (
        "from engine.libraries import settle; settle()\n"
        "import psutil, torch\n"
        "torch.set_num_threads(1)\n"
        "weight = torch.randn(1024, 256, dtype=torch.bfloat16)\n"
        "def held(): return psutil.Process().memory_full_info().uss\n"
        "before = held()\n"
        "for rows in range(1, 601):\n"
        "    torch.nn.functional.linear(weight.new_ones(rows, 256), weight)\n"
        "print(held() - before)"
    )
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert int(done.stdout) < 390e6
