"""What a measurement ran on, named by its parts: no host, no path."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch

KINDS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "asimd")  # what a product's speed hangs on
QUIET = 0.2  # load average a core below which nothing else counts

Place = Literal["cpu", "cuda"]


def machine(device: Place, threads: int) -> str:
    """`2 cores of an AMD EPYC with avx512_bf16, 1 thread; torch 2.13.0, transformers 5.23.0`."""
    if device == "cuda":
        parts = f"{torch.cuda.get_device_name()} with CUDA {torch.version.cuda}"
    else:
        name, flags = _processor()
        kind = next((f" with {flag}" for flag in KINDS if flag in flags), "")
        parts = f"{os.cpu_count()} cores of {name}{kind}, {threads} thread{'s' * (threads != 1)}"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return f"{parts}; {packages}"


def load() -> float:
    """Processes that wanted a core in the last minute, a core."""
    return os.getloadavg()[0] / (os.cpu_count() or 1)


def quiet(before: float) -> str:
    """A word on the load `before` a run: `quiet (load 0.04 a core before)`."""
    word = "quiet" if before <= QUIET else "NOT QUIET: other work beside it"
    return f"{word} (load {before:.2f} a core before)"


def demand_quiet() -> None:
    """End the program where other work would change what a clock on the wall says."""
    if load() > QUIET:
        raise SystemExit(
            f"the load is {load():.2f} a core, more than {QUIET}: wait, or leave --quiet out"
        )


def device_here(wanted: str) -> Place:
    """`cpu` or `cuda`; for `auto` a GPU where there is one."""
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return "cuda" if wanted == "cuda" else "cpu"


def _processor() -> tuple[str, frozenset[str]]:
    """The processor's model and flags as Linux tells them; elsewhere its architecture alone."""
    told: dict[str, str] = {}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            told.setdefault(name.strip(), value.strip())
    flags = told.get("flags") or told.get("Features") or ""
    return told.get("model name") or platform.machine(), frozenset(flags.split())
