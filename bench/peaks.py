"""What the machine can do at most: matrix products and memory, measured."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from bench.counting import wait

ROUNDS = 3
LEAST = {"cpu": 0.15, "cuda": 0.05}  # seconds of a round at least
CUBES = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192)}
TOKENS = {"cpu": (256, 1024), "cuda": (1024, 8192)}  # rows of a batch times their tokens
LARGEST = {"cpu": 1 << 28, "cuda": 1 << 31}  # bytes of a product's result at most
FAR = {"cpu": 1 << 28, "cuda": 1 << 32}  # bytes of what is copied and read


@dataclass(frozen=True)
class Peak:
    """Of the best run: units a second by the clock, and in a second of one thread's processor.

    `own` is 0 for a GPU: its processor tells no time of its own.
    """

    rate: float
    own: float
    where: str

    def best(self, other: Peak) -> Peak:
        """The larger of both, each by its own clock."""
        leading = self if self.rate >= other.rate else other
        return Peak(leading.rate, max(self.own, other.own), leading.where)


@dataclass(frozen=True)
class Ceilings:
    """FLOP/s of products, bytes/s of a copy (read and written) and of reading, on all threads."""

    dtype: torch.dtype
    threads: int
    product: Peak
    copy: Peak
    read: Peak

    def best(self, other: Ceilings) -> Ceilings:
        """The larger of two measurements of the same machine."""
        return Ceilings(
            self.dtype, self.threads, self.product.best(other.product),
            self.copy.best(other.copy), self.read.best(other.read),
        )  # fmt: skip

    def table(self) -> list[str]:
        """Markdown."""
        dtype = str(self.dtype).removeprefix("torch.")
        lines = [
            "| ceiling | a second | a processor second of a thread | at |",
            "|---|---|---|---|",
        ]
        for name, unit, peak in (
            (f"matrix products, {dtype}", "GFLOP", self.product),
            ("copy, read and written", "GB", self.copy),
            ("read", "GB", self.read),
        ):
            own = f"{peak.own / 1e9:.0f} {unit}" if peak.own else "-"
            lines.append(f"| {name} | {peak.rate / 1e9:.0f} {unit} | {own} | {peak.where} |")
        return lines


def measure(
    device: torch.device, dtype: torch.dtype, threads: int, layers: Iterable[tuple[int, ...]]
) -> Ceilings:
    """The ceilings; `layers` are the shapes (out, in) of a model's weights.

    torch's number of threads is as it was afterwards.
    """
    product = [
        peak
        for shape in shapes(device.type, dtype, layers)
        for peak in _runs(device, threads, partial(_product, device, dtype, *shape), _named(shape))
    ]
    copy = _runs(device, threads, partial(_copy, device), f"{FAR[device.type] / 1e6:.0f} MB")
    read = [
        peak
        for name, act in (("a sum", _sum), ("a matrix times a vector", _vector))
        for peak in _runs(device, threads, partial(act, device, dtype), name)
    ]
    return Ceilings(dtype, threads, _best(product), _best(copy), _best(read))


def shapes(
    kind: str, dtype: torch.dtype, layers: Iterable[tuple[int, ...]]
) -> list[tuple[int, int, int]]:
    """(tokens, in, out): cubes, and the layers at some numbers of tokens."""
    cubes = [(size, size, size) for size in CUBES[kind]]
    own = [(tokens, n, d) for d, n in layers for tokens in TOKENS[kind]]
    return [
        shape for shape in (*cubes, *own) if shape[0] * shape[2] * dtype.itemsize <= LARGEST[kind]
    ]


Job = tuple[Callable[[], object], float]  # what to run, and how many units it is


def _product(device: torch.device, dtype: torch.dtype, tokens: int, n: int, d: int) -> Job:
    x = torch.randn(tokens, n, device=device, dtype=dtype)
    W = torch.randn(d, n, device=device, dtype=dtype)
    return partial(nn.functional.linear, x, W), 2.0 * tokens * n * d


def _copy(device: torch.device) -> Job:
    source = torch.zeros(FAR[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return partial(target.copy_, source), 2.0 * source.nbytes


def _sum(device: torch.device, dtype: torch.dtype) -> Job:
    source = torch.zeros(FAR[device.type] // 4, device=device)
    return source.sum, float(source.nbytes)


def _vector(device: torch.device, dtype: torch.dtype) -> Job:
    wide = 1 << 13
    W = torch.zeros(FAR[device.type] // wide // dtype.itemsize, wide, device=device, dtype=dtype)
    return partial(nn.functional.linear, W.new_zeros(1, wide), W), float(W.nbytes)


def _runs(device: torch.device, threads: int, make: Callable[[], Job], name: str) -> list[Peak]:
    """The best of some rounds: all threads on one job, and a job of its own in each."""
    modes = [(threads, 1)]
    if device.type == "cpu" and threads > 1:
        modes.append((1, threads))
    kept = torch.get_num_threads()
    try:
        return [_timed(device, within, lanes, make, name) for within, lanes in modes]
    finally:
        torch.set_num_threads(kept)


def _timed(
    device: torch.device, within: int, lanes: int, make: Callable[[], Job], name: str
) -> Peak:
    """One mode: `lanes` jobs beside each other, each with `within` threads."""
    torch.set_num_threads(within)
    jobs = [make() for _ in range(lanes)]
    units = sum(count for _, count in jobs)
    found, times = Peak(0.0, 0.0, ""), 1
    for _ in range(ROUNDS):
        wall, processor = _round(device, within, jobs, times)
        while wall < LEAST[device.type]:
            times *= 2
            wall, processor = _round(device, within, jobs, times)
        own = units * times / processor if device.type == "cpu" else 0.0
        mode = f"{lanes} at once" if lanes > 1 else ""
        where = ", ".join(word for word in (name, mode) if word)
        found = found.best(Peak(units * times / wall, own, where))
    return found


def _round(
    device: torch.device, within: int, jobs: Sequence[Job], times: int
) -> tuple[float, float]:
    """Seconds and processor seconds of running every job `times` times."""

    @torch.inference_mode()
    def lane(act: Callable[[], object]) -> None:
        torch.set_num_threads(within)  # OpenMP's number is each thread's own
        for _ in range(times):
            act()

    threads = [threading.Thread(target=lane, args=(act,)) for act, _ in jobs[1:]]
    wait(device)
    wall, processor = time.perf_counter(), time.process_time()
    for thread in threads:
        thread.start()
    lane(jobs[0][0])
    for thread in threads:
        thread.join()
    wait(device)
    return time.perf_counter() - wall, time.process_time() - processor


def _best(peaks: Sequence[Peak]) -> Peak:
    found = peaks[0]
    for peak in peaks[1:]:
        found = found.best(peak)
    return found


def _named(shape: tuple[int, int, int]) -> str:
    tokens, n, d = shape
    return f"({tokens} × {n}) · ({n} × {d})"
