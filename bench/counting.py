"""How much arithmetic and memory traffic a trial is, counted exactly from the shapes it runs with.

Operations are those of matrix products, two for a multiply-add: 2·tokens·in·out of every linear
layer and 2·q·k·(d + d_v) of every head's attention, padding and masked pairs included, since they
are computed. What the edit adds (2·tokens·(in + out) a writer), norms, softmax and the divergence
itself are left out: below 1 % of the operations, though not of the time.

Bytes are those that a forward cannot avoid: the weights of each linear layer once, as they are
stored, and the keys and values that attention reads. Activations are left out.

`torch.utils.flop_counter` counts the same (tests hold one against the other), but in one process
alone and without the packed layers of bitsandbytes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import wraps
from multiprocessing import Lock
from multiprocessing.sharedctypes import RawArray
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import engine.scorers
from engine.decode import Decoder
from engine.lower import Lower

REST = "rest"  # of a trial: building edits, counting, and lanes that wait
PHASES = {
    "divergence": (engine.scorers, "divergences"),
    "answers": (Decoder, "answers"),
    "kept states": (Lower, "read"),
}
MISSED = 0.02  # share of the parameters that may lie outside of linear layers and embeddings


@dataclass
class Work:
    """What a phase of all trials took; `wall` and `processor` are seconds.

    Its fields are the places in the counter's arrays.
    """

    flops: int = 0
    bytes: int = 0
    wall: float = 0.0
    processor: float = 0.0


class Counter:
    """Counts by phase, in this process and in the lanes that it forks (`engine.lanes`).

    with Counter(model, device) as counter:
        session.handle(Score(...), report)      # not counted
        counter.restart()
        session.handle(Score(...), report)
    counter.phases["answers"].flops

    Where candidates run side by side, a lane each, a phase's seconds of the clock are those of all
    lanes by their number.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        """ValueError where operations would be missed: stacks of experts, attention of its own."""
        self.phases = {name: Work() for name in (*PHASES, REST)}
        self.total = Work()
        self._device, self._phase, self._own = device, REST, os.getpid()
        self._counts = {
            (name, beside): RawArray("d", len(fields(Work)))
            for name in self.phases
            for beside in (False, True)
        }
        self._lanes = RawArray("i", 2)  # now in a phase, and the most that were
        self._lock = Lock()
        self._linear = linear_layers(model)
        config: Any = model.config
        if config._attn_implementation != "sdpa":
            raise ValueError(f"attention by {config._attn_implementation} is not counted, use sdpa")

    def __enter__(self) -> Counter:
        self._stack = ExitStack()
        for layer in self._linear:
            self._stack.callback(layer.register_forward_hook(self._of_linear).remove)
        attend = nn.functional.scaled_dot_product_attention
        spied = self._spied(attend)
        self._stack.enter_context(patch.object(nn.functional, attend.__name__, spied))
        for name, (owner, function) in PHASES.items():
            timed = self._timed(name, getattr(owner, function))
            self._stack.enter_context(patch.object(owner, function, timed))
        self.restart()
        return self

    def restart(self) -> None:
        """Count from here on. No lane may be at work."""
        wait(self._device)
        for counts in (*self._counts.values(), self._lanes):
            counts[:] = [0] * len(counts)
        self._began = time.perf_counter(), time.process_time()

    def __exit__(self, *exception: object) -> None:
        wait(self._device)
        wall, processor = self._began
        self.total.wall = time.perf_counter() - wall
        self.total.processor = time.process_time() - processor
        self._stack.close()
        for name, work in self.phases.items():
            here, beside = (self._counts[name, place] for place in (False, True))
            work.flops, work.bytes = int(here[0] + beside[0]), int(here[1] + beside[1])
            work.wall = here[2] + beside[2] / max(1, self._lanes[1])
            work.processor = here[3] + beside[3]
            self.total.processor += beside[3]
        rest, named = self.phases[REST], [self.phases[name] for name in PHASES]
        rest.wall = self.total.wall - sum(work.wall for work in named)
        rest.processor = self.total.processor - sum(work.processor for work in named)
        self.total.flops = sum(work.flops for work in self.phases.values())
        self.total.bytes = sum(work.bytes for work in self.phases.values())

    def _count(self, phase: str, flops: float, read: float, wall: float, processor: float) -> None:
        counts = self._counts[phase, os.getpid() != self._own]
        with self._lock:
            for place, more in enumerate((flops, read, wall, processor)):
                counts[place] += more

    def _of_linear(self, layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        read = sum(parameter.nbytes for parameter in layer.parameters())
        self._count(self._phase, 2 * args[0].numel() * out.shape[-1], read, 0, 0)

    def _spied(self, attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """`attend`, counted: query (B, H, t, d), key (B, H', T, d), value (B, H', T, e)."""

        @wraps(attend)
        def spied(query: Tensor, key: Tensor, value: Tensor, *args: Any, **more: Any) -> Tensor:
            pairs = query.shape[:-1].numel() * key.shape[-2]
            flops = 2 * pairs * (query.shape[-1] + value.shape[-1])
            self._count(self._phase, flops, key.nbytes + value.nbytes, 0, 0)
            return attend(query, key, value, *args, **more)

        return spied

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, during which this process is in phase `name`, and no longer in the one that
        called it."""

        @wraps(function)
        def timed(*args: Any, **more: Any) -> Any:
            outer = self._phase
            if outer == REST:
                self._enter(1)
            wait(self._device)
            wall, processor = time.perf_counter(), time.process_time()
            self._phase = name
            try:
                return function(*args, **more)
            finally:
                wait(self._device)
                took = time.perf_counter() - wall, time.process_time() - processor
                self._phase = outer
                self._count(name, 0, 0, *took)
                if outer == REST:
                    self._enter(-1)
                else:
                    self._count(outer, 0, 0, -took[0], -took[1])

        return timed

    def _enter(self, change: int) -> None:
        """One lane more, or less."""
        if os.getpid() == self._own:
            return
        with self._lock:
            self._lanes[0] += change
            self._lanes[1] = max(self._lanes)


def linear_layers(model: nn.Module) -> list[nn.Module]:
    """The model's linear layers, packed ones included. ValueError where much lies outside."""
    layers: list[nn.Module] = [
        part for part in model.modules() if isinstance(part, (nn.Linear, Conv1D))
    ]
    embeddings = [part for part in model.modules() if isinstance(part, nn.Embedding)]
    known = {id(p) for part in (*layers, *embeddings) for p in part.parameters()}
    sizes = [(id(p) in known, p.numel()) for p in model.parameters()]
    if sum(size for inside, size in sizes if not inside) > MISSED * sum(size for _, size in sizes):
        raise ValueError("much of this model is no linear layer, such as stacks of experts")
    return layers


def wait(device: torch.device) -> None:
    """Wait for what was sent to a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
