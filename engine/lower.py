"""What the original computes below the first edited block, kept for sequences that come again.

A search reads the same prompts, and mostly the same answers, for every candidate; and up to its
first edited block each candidate computes what the original does. So the states that enter some of
the blocks, the stations, are kept by token sequence, and a forward begins at the highest station
below the edit: the blocks before it are skipped, their output is what was kept.

The truth is the forward of all blocks: `engine.shortcuts` compares the two before this is used.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import wraps
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.anatomy import Anatomy
from engine.report import Report
from engine.shared import ORIGINAL, alike, begin, editable_cache, rest
from jobs.spec.memory import STATIONS, lower_bytes

if TYPE_CHECKING:
    from engine.decode import Decoder
    from engine.edit import Edit

STALE = 8  # rounds in which a sequence was not read, after which it makes room for others

Sequenced = tuple[int, ...]


@dataclass
class _Kept:
    """States of one sequence on the CPU, (stations, T − front, d).

    front   tokens at its beginning whose states are kept once for all
    read    the round in which it was last read
    """

    states: Tensor
    front: int
    read: int


@dataclass(frozen=True)
class States:
    """What enters a block on the tokens of a sequence, in two parts, (F, d) and (T − F, d).

    A slice of them is a tensor: states[2:5] is (3, d).
    """

    front: Tensor
    behind: Tensor

    def __getitem__(self, places: slice) -> Tensor:
        """Those at these places."""
        start, stop, _ = places.indices(len(self.front) + len(self.behind))
        held = len(self.front)
        behind = self.behind[max(0, start - held) : max(0, stop - held)]
        return behind if start >= held else torch.cat([self.front[start:stop], behind])


@dataclass(frozen=True)
class Studied:
    """The original's states of one sequence, (stations, T − front, d), to be kept.

    front       tokens at its beginning whose states are kept once for all
    beginning   it is what most sequences begin with
    """

    ids: Sequenced
    states: Tensor
    front: int = 0
    beginning: bool = False


class _Enough(Exception):
    """The states of all stations have been seen."""


class Lower:
    """The kept states of one model.

    lower.note(sequences)                           # what was read; twice, and it is kept
    for studied in lower.study(decoder, report):
        lower.keep(studied)
    lower.keep(None)                                # that was all
    station = lower.station(edits)                  # 0: nothing is saved
    states = [lower.states(ids, station) for ids in sequences]      # States, or None
    with lower.skipping(station, padded):           # (rows, t, d), as wide as the ids
        decoder.forward(...)

    Of several that were told the same (`engine.lanes`), one studies and all keep.
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
        self._wanted: list[Sequenced] = []
        self._front: Sequenced = ()  # what most sequences begin with
        self._before: Tensor | None = None  # its states (stations, T, d)

    def station(self, edits: Sequence[Edit]) -> int:
        """The highest station that no edit reaches below; 0 where there is none."""
        first = len(self._anatomy.blocks)
        for edit in edits:
            if any(lowered is not None for lowered in edit.suppressions):
                return 0
            pairs = zip(self._anatomy.writers, edit.changes, strict=True)
            first = min([first, *(w.layer for w, change in pairs if change is not None)])
        return max((station for station in self.stations if station <= first), default=0)

    def states(self, ids: Sequence[int], station: int) -> States | None:
        """What enters block `station` on these tokens, on the CPU; None if not kept."""
        kept = self._kept.get(tuple(ids))
        if kept is None:
            return None
        place = self.stations.index(station)
        behind = kept.states[place]
        front = behind[:0] if self._before is None else self._before[place, : kept.front]
        return States(front, behind)

    def note(self, sequences: Sequence[list[int]]) -> None:
        """Say that these sequences were read; those that come again are worth keeping."""
        self._round += 1
        times = Counter(map(tuple, sequences))
        for key, count in times.items():
            if key in self._kept:
                self._kept[key].read = self._round
            elif count > 1 or hash(key) in self._seen:
                self._wanted.append(key)
        self._seen.update(map(hash, times))

    @torch.inference_mode()
    def study(self, decoder: Decoder, report: Report) -> Iterator[Studied]:
        """Read with the original what is worth keeping, as much as there is room for. It comes one
        sequence after the other, so that nobody needs to hold all of it twice."""
        wanted = [list(key) for key in dict.fromkeys(self._wanted)]
        room = self._budget - self._held + sum(kept.states.nbytes for _, kept in self._stale())
        if not wanted or room <= 0:
            return
        decoder.select([], [])
        wanted.sort(key=len)
        front = self._front
        if not front and decoder.shares and len(wanted) > 1:
            front = tuple(wanted[0][: alike(wanted)])
            if front:
                (states,) = self.read(decoder, [list(front)])
                room -= states.nbytes
                yield Studied(front, states, beginning=True)
        token = len(self.stations) * self._anatomy.hidden * decoder.model.dtype.itemsize
        own = accumulate(len(ids) - _covered(front, ids) for ids in wanted)
        wanted = wanted[: bisect_right(list(own), room // token)]
        groups: dict[int, list[list[int]]] = {}
        for ids in wanted:
            groups.setdefault(_covered(front, ids), []).append(ids)
        done = 0
        for held, some in groups.items():
            while some:
                report.progress("kept states", done, len(wanted))
                batch, found = some[: decoder.batch_size], list[Tensor]()
                with decoder.surviving(len(batch)):
                    found = self.read(decoder, batch, held)
                some, done = some[len(found) :], done + len(found)
                for ids in batch[: len(found)]:
                    yield Studied(tuple(ids), found.pop(0), held)

    def keep(self, studied: Studied | None) -> None:
        """Keep what was studied of all that has been noted so far; None: that was all of it. What
        was not read for long makes room, as far as it must."""
        if studied is None:
            self._wanted.clear()
            return
        self._held += studied.states.nbytes
        if studied.beginning:
            self._front, self._before = studied.ids, studied.states
        else:
            self._kept[studied.ids] = _Kept(studied.states, studied.front, self._round)
        for key, stale in self._stale() if self._held > self._budget else ():
            if self._held > self._budget:
                self._held -= stale.states.nbytes
                del self._kept[key]

    def _stale(self) -> list[tuple[Sequenced, _Kept]]:
        """What was not read for long; first what was not for longest."""
        old = [(key, kept) for key, kept in self._kept.items() if self._round - kept.read > STALE]
        return sorted(old, key=lambda pair: pair[1].read)

    def read(self, decoder: Decoder, batch: Sequence[list[int]], front: int = 0) -> list[Tensor]:
        """The original's states of each sequence behind the first `front` tokens, which are the
        same in all: (stations, T − front, d) on the CPU."""
        ids, mask = decoder.padded(batch)
        begun = None
        if front and editable_cache(decoder, ids.shape[1]) is not None:
            begun = begin(decoder, batch, [], [ORIGINAL] * len(batch), front)
        if begun is not None:
            ids, mask = rest(ids, mask, begun.held)
        seen: list[Tensor] = []

        def take(module: Any, args: Any, output: Any) -> None:
            seen.append(_stream(output))
            if len(seen) == len(blocks):
                raise _Enough

        blocks = [self._anatomy.blocks[station - 1] for station in self.stations]
        hooks = [block.register_forward_hook(take) for block in blocks]
        try:
            with suppress(_Enough):
                decoder.forward(ids, mask, 1, None if begun is None else begun.cache)
        finally:
            for hook in hooks:
                hook.remove()
        if len(seen) != len(blocks):
            raise ValueError("a block does not run once")
        return [
            torch.stack([states[row, front - len(one) :].to("cpu", copy=True) for states in seen])
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


def _covered(front: Sequenced, ids: Sequence[int]) -> int:
    """Tokens of a sequence whose states are kept once for all: of those that begin with `front`
    and go on."""
    behind = len(ids) > len(front) and tuple(ids[: len(front)]) == front
    return len(front) if behind else 0


def _stream(output: Any) -> Tensor:
    """The states in what a block gives. ValueError where it gives more than them."""
    if not isinstance(output, Tensor) or output.dim() != 3:
        raise ValueError(f"a block gives {type(output).__name__}")
    return output
