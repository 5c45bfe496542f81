"""Run a program as a person at a terminal would, and note its peak memory."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

TICK = 1.0  # seconds between two looks at the memory and the processor time: they take a while
SILENCE = 1200.0  # seconds without a word after which a program counts as hung
ROWS, COLUMNS = 50, 200  # of the terminal


@dataclass(frozen=True)
class Watched:
    """When the process began (`now()`), its peak bytes, and its processor seconds over time.

    `memory` counts pages that several processes share once.

    `cpu` has (when, processor seconds until then), in order.
    """

    began: float
    memory: int
    gpu: int
    cpu: list[tuple[float, float]]

    def cpu_until(self, when: float) -> float:
        """Processor seconds until the time `when`."""
        return max((used for at, used in self.cpu if at <= when), default=0.0)


def watch(
    command: Sequence[str], folder: Path, environment: Mapping[str, str], until: str
) -> Watched:
    """Run `command` in `folder` until it prints `until`, then end it and its children.

    A program may ask what to do next and never end by itself. Raises RuntimeError, with the end of
    its output, when it ends or falls silent before.
    """
    before = gpu_used()
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    began = now()
    process = psutil.Popen(
        list(command), cwd=folder, env=dict(environment), start_new_session=True,
        stdin=slave, stdout=slave, stderr=subprocess.STDOUT,
    )  # fmt: skip
    os.close(slave)
    memory, gpu, tail, heard, looked = 0, 0, "", began, 0.0
    cpu: list[tuple[float, float]] = []
    try:
        while until not in tail:
            if select.select([master], [], [], TICK)[0]:
                piece = _read(master)
                if not piece:
                    raise RuntimeError(f"{command[0]} ended too soon:\n{tail}")
                tail, heard = (tail + piece)[-8000:], now()
            elif now() - heard > SILENCE:
                raise RuntimeError(f"{command[0]} said nothing for {SILENCE:.0f} s:\n{tail}")
            if now() - looked >= TICK or until in tail:
                memory, gpu = max(memory, _memory(process)), max(gpu, gpu_used() - before)
                cpu.append((now(), _cpu(process)))
                looked = now()
    finally:
        _end(process)
        os.close(master)
    return Watched(began, memory, gpu, cpu)


def now() -> float:
    """Seconds since the epoch: a clock that two processes share."""
    return time.time()


def gpu_used() -> int:
    """Bytes in use on all NVIDIA GPUs of this machine; 0 where there is none."""
    try:
        import pynvml  # an extra: only machines with a GPU have it
    except ImportError:
        return 0
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return 0
    handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
    return sum(int(pynvml.nvmlDeviceGetMemoryInfo(handle).used) for handle in handles)


def _read(master: int) -> str:
    try:
        return os.read(master, 65536).decode(errors="replace")
    except OSError:  # EIO: the last process at the terminal has ended
        return ""


def _tree(process: psutil.Process) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return [process, *process.children(recursive=True)]
    return []


def _memory(process: psutil.Process) -> int:
    total = 0
    for one in _tree(process):
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
            total += one.memory_full_info().pss
    return total


def _cpu(process: psutil.Process) -> float:
    total = 0.0
    for one in _tree(process):
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            used = one.cpu_times()
            total += used.user + used.system + used.children_user + used.children_system
    return total


def _end(process: psutil.Popen) -> None:
    for one in reversed(_tree(process)):
        with suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()
