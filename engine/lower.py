"""What the original computes below the first edited block, kept for sequences that come again.

A search reads the same prompts, and mostly the same answers, for every candidate; and up to its
first edited block each candidate computes what the original does. So the states that enter some of
the blocks, the stations, are kept by token sequence, and a forward begins at the highest station
below the edit: the blocks before it are skipped, their output is what was kept.

The truth is the forward of all blocks: `engine.shortcuts` compares the two before this is used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from engine.anatomy import Anatomy
from jobs.spec.memory import STATIONS, lower_bytes

if TYPE_CHECKING:
    from engine.decode import Decoder
    from engine.edit import Edit

STALE = 8  # rounds without use after which they make room for others

Sequenced = tuple[int, ...]


@dataclass
class _Kept:
    """States of one sequence (stations, T, d) on the CPU, and when they were last of use."""

    states: Tensor
    used: int


class _Enough(Exception):
    """The states of all stations have been seen."""


class Lower:
    """The kept states of one model.

    station = lower.station(edits)                  # 0: nothing is saved
    states = [lower.states(ids, station) for ids in sequences]
    with lower.skipping(station, padded):           # (rows, t, d), as wide as the ids
        decoder.forward(...)
    """

    def __init__(self, anatomy: Anatomy, weight_bytes: int, lanes: int = 1) -> None:
        """`lanes`: processes that keep states, each its own."""
        self._anatomy = anatomy
        blocks = len(anatomy.blocks)
        spread = {round(blocks * step / 8) for step in range(1, STATIONS + 1)}
        self.stations = sorted(station for station in spread if 0 < station < blocks)
        self._budget = lower_bytes(weight_bytes, lanes)
        self._held = self._round = 0
        self._kept: dict[Sequenced, _Kept] = {}
        self._seen: set[int] = set()  # hashes of all sequences: thousands of answers stay small

    def station(self, edits: Sequence[Edit]) -> int:
        """The highest station that no edit reaches below; 0 where there is none."""
        first = len(self._anatomy.blocks)
        for edit in edits:
            if any(lowered is not None for lowered in edit.suppressions):
                return 0
            pairs = zip(self._anatomy.writers, edit.changes, strict=True)
            first = min([first, *(w.layer for w, change in pairs if change is not None)])
        return max((station for station in self.stations if station <= first), default=0)

    def states(self, ids: Sequence[int], station: int) -> Tensor | None:
        """What enters block `station` on these tokens, (T, d) on the CPU; None if not kept."""
        kept = self._kept.get(tuple(ids))
        if kept is None:
            return None
        kept.used = self._round
        return kept.states[self.stations.index(station)]

    def learn(self, decoder: Decoder, sequences: Sequence[list[int]]) -> None:
        """Say that these sequences were read; keep the states of those that come again."""
        self._round += 1
        times = Counter(map(tuple, sequences))
        wanted = [
            list(key)
            for key, count in times.items()
            if (count > 1 or hash(key) in self._seen) and key not in self._kept
        ]
        self._seen.update(map(hash, times))
        if not wanted:
            return
        stale = [key for key, kept in self._kept.items() if self._round - kept.used > STALE]
        for key in stale:
            self._held -= self._kept.pop(key).states.nbytes
        decoder.select([], [])
        wanted.sort(key=len)
        while wanted and self._held < self._budget:
            batch, wanted = wanted[: decoder.batch_size], wanted[decoder.batch_size :]
            with decoder.surviving(len(batch)):
                for ids, states in zip(batch, self.read(decoder, batch), strict=True):
                    self._kept[tuple(ids)] = _Kept(states, self._round)
                    self._held += states.nbytes

    def read(self, decoder: Decoder, batch: Sequence[list[int]]) -> list[Tensor]:
        """The original's states of each sequence, (stations, T, d) on the CPU."""
        ids, mask = decoder.padded(batch)
        seen: list[Tensor] = []

        def take(module: Any, args: Any, output: Any) -> None:
            seen.append(_stream(output))
            if len(seen) == len(blocks):
                raise _Enough

        blocks = [self._anatomy.blocks[station - 1] for station in self.stations]
        hooks = [block.register_forward_hook(take) for block in blocks]
        try:
            with suppress(_Enough):
                decoder.forward(ids, mask, 1)
        finally:
            for hook in hooks:
                hook.remove()
        if len(seen) != len(blocks):
            raise ValueError("a block does not run once")
        return [
            torch.stack([states[row, -len(one) :].to("cpu", copy=True) for states in seen])
            for row, one in enumerate(batch)
        ]

    @contextmanager
    def skipping(self, station: int, states: Tensor) -> Iterator[None]:
        """Within it forwards begin before block `station` with `states` (rows, t, d)."""
        blocks = self._anatomy.blocks[:station]
        # accelerate puts forwards of its own into blocks
        own = [block.__dict__.get("forward") for block in blocks]
        for number, block in enumerate(blocks, start=1):
            block.forward = _passed(block.forward, states if number == station else None)
        try:
            yield
        finally:
            for block, forward in zip(blocks, own, strict=True):
                del block.forward
                if forward is not None:
                    block.forward = forward


def _passed(forward: Any, states: Tensor | None) -> Any:
    """Instead of a block's `forward`: it gives `states`, or what it gets."""

    @wraps(forward)
    def passing(*args: Any, **kwargs: Any) -> Any:
        stream: Tensor = args[0] if args else kwargs["hidden_states"]
        return stream if states is None else states.to(stream.device)

    return passing


def padded(states: Sequence[Tensor]) -> Tensor:
    """States (T, d) of several rows as (rows, longest, d), padded on the left as ids are."""
    width = max(map(len, states))
    return torch.stack([pad(one, (0, 0, width - len(one), 0)) for one in states])


def _stream(output: Any) -> Tensor:
    """The states in what a block gives. ValueError where it gives more than them."""
    if not isinstance(output, Tensor) or output.dim() != 3:
        raise ValueError(f"a block gives {type(output).__name__}")
    return output
