"""What this worker runs on: one CUDA device, or the CPU. Asked without loading torch."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

PACKAGES = ("torch", "transformers", "optuna", "bitsandbytes", "peft", "safetensors")


def device(gpu: str = "") -> dict[str, Any]:
    """{"kind": "cuda"|"cpu", "name", "memory_bytes"} of the device that engines here will use.

    `gpu` is the worker's CUDA device by index or UUID; empty takes the first visible one.
    """
    return _cuda(gpu) or {
        "kind": "cpu",
        "name": _cpu_name(),
        "memory_bytes": _memory_limit(),
    }


def versions() -> dict[str, str]:
    """Python and the packages that decide what an engine can do."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _cuda(gpu: str) -> dict[str, Any] | None:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    wanted = gpu or (visible.split(",")[0].strip() if visible is not None else "0")
    if not wanted or wanted == "-1":
        return None
    try:
        import pynvml  # an extra: only machines with a GPU have it
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        try:
            handle = (
                pynvml.nvmlDeviceGetHandleByIndex(int(wanted))
                if wanted.isdigit()
                else pynvml.nvmlDeviceGetHandleByUUID(wanted)
            )
            name = pynvml.nvmlDeviceGetName(handle)
            return {
                "kind": "cuda",
                "name": name.decode() if isinstance(name, bytes) else str(name),
                "memory_bytes": int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
            }
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} cores"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _memory_limit() -> int:
    """Bytes of memory, or of the container's share where that is less (cgroup 2)."""
    total = int(psutil.virtual_memory().total)
    with suppress(OSError, ValueError):
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total
