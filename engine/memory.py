"""How many rows fit: batch sizes from free memory by the model of `jobs.spec.memory`."""

from __future__ import annotations

import gc
from pathlib import Path

import psutil
import torch

from engine.heap import return_blocks
from jobs.spec.memory import decode_row, fitting, forward_row
from jobs.spec.shape import FLOAT32, Shape

__all__ = [
    "FLOAT32", "Shape", "decode_row", "fitting_rows", "forward_row", "free_bytes",
    "is_out_of_memory", "release",
]  # fmt: skip


def fitting_rows(free: int, per_row: int, device: torch.device) -> int:
    """How many rows of `per_row` bytes fit into `free` bytes: 1 at least, a cap at most."""
    return fitting(free, per_row, "cuda" if device.type == "cuda" else "cpu")


def free_bytes(device: torch.device) -> int:
    """Memory that new tensors may take on `device`, including what torch holds but does not use."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(int(psutil.virtual_memory().available), _container_free())


def _container_free() -> int:
    """What the control group (v2) leaves; without a limit, more than any machine has."""
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii").strip()
    except OSError:
        return 1 << 62
    return 1 << 62 if limit == "max" else max(0, int(limit) - int(used))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out, on a GPU or on the host."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in text or "CUDA out of memory" in text
    )


def release() -> None:
    """Give unused memory back to the device and to the system, as after an out-of-memory error."""
    gc.collect()
    return_blocks()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
