"""How long a job takes: its tokens over what a device does in a second.

    reading    rows × tokens × 2·active / operations
    a step     max(loaded bytes / bandwidth, rows × 2·active / operations) + layers × launch

`active` are the numbers that one token's forward multiplies with, and two operations each. A share
of the data sheet's peak is reached in practice (`REACHED`); blocks cost a fixed time per step on a
GPU, where they are many small kernels. Answers are taken to run to their limit, and what drafts,
kept states and screening save (docs/speed.md) is left out: a search mostly takes less.
"""

from __future__ import annotations

from dataclasses import dataclass

from jobs.needs import PREFIX_PROMPTS, PREFIX_TOKENS, Workload, width_of
from jobs.spec.job import JobSpec
from jobs.spec.memory import CANDIDATES, Kind
from jobs.spec.methods import budget
from jobs.spec.shape import Shape
from jobs.weights import Weights

FRONT = 10  # trials that are checked on held-out prompts
DISK = 1e9  # bytes a second that a checkpoint is read with
EXPORT = 3e8  # and that an artifact is made with: read, edited, hashed, synced
REACHED = {"cuda": (0.4, 0.6), "cpu": (1.0, 1.0)}  # of the table's operations and bandwidth
LAUNCH = {"cuda": 6e-4, "cpu": 0.0}  # seconds a block and step: some twenty eager kernels
DEQUANTISED = 3.0  # reading a packed weight costs this many times its bytes


@dataclass(frozen=True)
class Device:
    """Dense 16-bit operations and bytes of memory a second.

    For GPUs the vendor's data sheet; for CPUs what plain decoding of the demo model comes to
    (bench/levers.md).
    """

    name: str
    operations: float
    bandwidth: float


DEVICES = (  # the first whose name is part of the device's own
    Device("B200", 2250e12, 8.0e12),
    Device("GH200", 989e12, 4.0e12),
    Device("H200", 989e12, 4.8e12),
    Device("H100 NVL", 835e12, 3.9e12),
    Device("H100 PCIe", 756e12, 2.0e12),
    Device("H100", 989e12, 3.35e12),
    Device("A100", 312e12, 1.9e12),
    Device("A40", 150e12, 0.696e12),
    Device("A10", 125e12, 0.6e12),
    Device("L40S", 362e12, 0.864e12),
    Device("L4", 121e12, 0.3e12),
    Device("RTX 5090", 209e12, 1.79e12),
    Device("RTX 4090", 165e12, 1.01e12),
    Device("RTX 3090", 71e12, 0.936e12),
    Device("V100", 125e12, 0.9e12),
    Device("T4", 65e12, 0.32e12),
    Device("EPYC", 8e10, 2e10),  # two cores, one thread, float32
)


def device_of(name: str) -> Device | None:
    """The device with this name, or None for one that nobody measured."""
    return next((device for device in DEVICES if device.name in name), None)


def seconds(
    spec: JobSpec, shape: Shape, weights: Weights, kind: Kind, name: str, prompt: int, roomy: bool
) -> float | None:
    """From load to one measured export, on one device; None where `name` is not known.

    `roomy`: the candidates of a request share their batches. None for a benchmark too: its tasks
    say how long they are only while they run.
    """
    device = device_of(name)
    if device is None or spec.kind == "benchmark":
        return None
    work = Workload.of(spec, weights, kind, prompt, CANDIDATES if roomy else 1)
    computed, moved = REACHED[kind]
    loaded = weights.loaded(spec.quantization, width_of(spec, kind))
    slowed = 1.0 if spec.quantization == "none" else DEQUANTISED

    def read(rows: int, tokens: int) -> float:
        return rows * tokens * 2 * weights.active / (device.operations * computed)

    def answer(rows: int, new: int) -> float:
        batches = -(-rows // work.rows(rows))
        fetched = batches * loaded * slowed / (device.bandwidth * moved)
        step = max(fetched, read(rows, 1)) + batches * shape.layers * LAUNCH[kind]
        return read(rows, work.prompt) + new * step

    def score(rows: int, group: int = 1, compared: int = work.compared) -> float:
        divergence = read(group * rows, work.prompt + compared)
        return (answer(group * rows, work.new) + divergence) / group

    total = weights.files / DISK
    total += answer(2 * min(PREFIX_PROMPTS, work.side), PREFIX_TOKENS)
    for rows in (work.scored, work.heldout):
        total += score(rows) + answer(rows, work.compared)
    if spec.kind == "abliterate":
        trials = budget(spec.methods, spec.trials)
        total += read(2 * work.side, work.prompt)
        each = score(work.scored, work.group, 1) / work.lanes
        total += trials * each / min(spec.parallelism, trials)
        total += min(FRONT, trials) * score(work.heldout)
        total += weights.files / EXPORT + score(work.scored) + score(work.heldout)
    return total
