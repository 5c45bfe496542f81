"""What rows of a batch have in common, or do not: read once, and apart.

A chat template and a system prompt are the same in front of every prompt, and often as long as the
prompt itself: their keys and values are computed from one row for each edit and spread over the
rows. And prompts of very different lengths waste a batch on padding: they are read in parts of like
lengths, whose caches are put together before the first token is answered.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from engine.head import entering_head

if TYPE_CHECKING:
    from engine.decode import Decoder
    from engine.edit import Edit
    from engine.lower import States

ORIGINAL = -1  # a row's edit: none
Layers = list[tuple[Tensor, Tensor] | None]  # keys and values of each layer, (rows, heads, T, ·)


def editable_cache(decoder: Decoder, longest: int) -> DynamicCache | None:
    """An empty cache that holds the keys and values of all tokens of rows of up to `longest`; None
    where the model's holds anything else.

    A sliding window that nothing leaves is replaced by a cache without one.
    """
    if not decoder.caches:
        return None
    for layer in DynamicCache(config=decoder.text_config).layers:
        if type(layer) is DynamicSlidingWindowLayer and layer.sliding_window > longest:
            continue
        if type(layer) is not DynamicLayer:
            return None
    return DynamicCache()


@dataclass(frozen=True)
class Beginning:
    """The keys and values of the tokens `ids`, one row for each of `edits` (None: the original).

    station   the block at which the forward began
    layers    (edits, heads, T, ·) each; None where the forward left a layer empty
    """

    ids: list[int]
    edits: list[Edit | None]
    station: int
    layers: Layers

    def spread(self, edits: Sequence[Edit | None], held: int) -> Layers:
        """The first `held` tokens for rows with these edits."""
        places = [next(n for n, own in enumerate(self.edits) if own is edit) for edit in edits]

        def one(tensor: Tensor) -> Tensor:
            index = torch.tensor(places, device=tensor.device)
            return tensor[:, :, :held].index_select(0, index)

        return [None if pair is None else (one(pair[0]), one(pair[1])) for pair in self.layers]


def alike(inputs: Sequence[list[int]]) -> int:
    """How many tokens all `inputs` begin with, at most all but the last of the shortest."""
    shortest, longest = min(inputs), max(inputs)  # what these two share, all share
    most = min(map(len, inputs)) - 1
    pairs = zip(shortest[:most], longest[:most], strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), most)


@dataclass(frozen=True)
class Read:
    """A cache that holds `held` tokens of every row; `skipped`: its layers of blocks that were left
    out, which hold nothing, as long as the others."""

    cache: DynamicCache
    held: int
    skipped: list[Any]

    @classmethod
    def of(cls, layers: Layers, station: int, rows: int, held: int, device: torch.device) -> Read:
        """Layers that the model itself leaves empty stay so; with a station there are skipped ones,
        too."""
        cache = DynamicCache()
        for pair in layers:
            layer = DynamicLayer()  # type: ignore[no-untyped-call]
            if pair is not None:
                layer.lazy_initialization(*pair)
                layer.keys, layer.values = pair
            cache.layers.append(layer)
        pairs = zip(cache.layers, layers, strict=True)
        skipped = [layer for layer, pair in pairs if station and pair is None]
        leave_empty(skipped, rows, held, device)
        return cls(cache, held, skipped)


def begin(
    decoder: Decoder,
    inputs: Sequence[list[int]],
    edits: Sequence[Edit],
    numbers: Sequence[int],
    most: int,
    station: int = 0,
    states: Sequence[States] = (),
) -> Read | None:
    """Read up to `most` tokens that all `inputs` begin with, for rows with the edits `numbers`,
    which are then selected; None where that costs more than it saves.

    station, states   the block at which the forward begins, and what enters it in each row, (T, d)
    """
    if not decoder.shares:
        return None
    own = [edits[number] if number != ORIGINAL else None for number in numbers]
    distinct = list(dict.fromkeys(numbers))
    shared = min(alike(inputs), most)
    front = list(inputs[0][:shared])
    anew = shared * len(distinct) + decoder.overhead
    known, held = _known(decoder, front, own, station)
    if known is None or (shared - held) * len(inputs) > anew:
        if shared * len(inputs) <= anew:
            return None
        known, held = _front(decoder, front, edits, distinct, station, states), shared
        if decoder.begun is not None:
            decoder.begun[:] = [known]
    decoder.select(edits, list(numbers))
    return Read.of(known.spread(own, held), station, len(inputs), held, decoder.device)


def _known(
    decoder: Decoder, front: list[int], edits: Sequence[Edit | None], station: int
) -> tuple[Beginning | None, int]:
    """What was read before of `front` for all of `edits`, and how much of it."""
    for known in decoder.begun or ():
        held = min(len(known.ids), len(front))
        same = known.station == station and known.ids[:held] == front[:held]
        if held and same and all(any(one is edit for one in known.edits) for edit in edits):
            return known, held
    return None, 0


def _front(
    decoder: Decoder, ids: list[int], edits: Sequence[Edit], distinct: list[int], station: int,
    states: Sequence[States],
) -> Beginning:  # fmt: skip
    """Read `ids` once for each edit of `distinct`."""
    decoder.select(edits, distinct)
    given, mask = decoder.padded([ids] * len(distinct))
    cache = DynamicCache()
    first = [states[0][: len(ids)]] * len(distinct) if station else []
    _forward(decoder, given, mask, cache, station, first)
    own = [edits[number] if number != ORIGINAL else None for number in distinct]
    return Beginning(ids, own, station, _layers(cache, []))


def read_apart(
    decoder: Decoder,
    inputs: Sequence[list[int]],
    edits: Sequence[Edit],
    numbers: Sequence[int],
    station: int = 0,
    states: Sequence[States] = (),
) -> tuple[Read, Tensor] | None:
    """Read all tokens but the last of `inputs`, those of like lengths together, for rows with the
    edits `numbers`, which are then selected; what is read, and its mask. None where that costs more
    than it saves. `station`, `states`: see `begin`.
    """
    order = sorted(range(len(inputs)), key=lambda row: len(inputs[row]))
    lengths = [len(inputs[row]) - 1 for row in order]
    if not decoder.shares or lengths[0] < 1:
        return None
    front = alike(inputs)
    sizes = _parts(decoder, [max(1, length - front) for length in reversed(lengths)])
    if len(sizes) < 2:
        return None
    parts: list[Layers] = []
    masks: list[Tensor] = []
    for size in reversed(sizes):
        rows = order[sum(map(len, masks)) :][:size]
        some, mine = [inputs[row][:-1] for row in rows], [numbers[row] for row in rows]
        entering = [states[row] for row in rows] if station else []
        ids, mask = decoder.padded(some)
        most = min(map(len, some)) - 1
        begun = begin(decoder, some, edits, mine, most, station, entering)
        if begun is None:
            begun = Read(DynamicCache(), 0, [])
            decoder.select(edits, mine)
        ids, mask = rest(ids, mask, begun.held)
        behind = [one[begun.held : len(ids)] for one, ids in zip(entering, some, strict=False)]
        _forward(decoder, ids, mask, begun.cache, station, behind)
        parts.append(_layers(begun.cache, begun.skipped))
        masks.append(mask)
    width = max(mask.shape[1] for mask in masks)
    back: Any = torch.tensor(order).argsort()
    mask = torch.cat([pad(mask, (width - mask.shape[1], 0)) for mask in masks])
    moved = order != sorted(order)
    layers = [_joined(pairs, width, back if moved else None) for pairs in zip(*parts, strict=True)]
    decoder.select(edits, list(numbers))
    if moved:
        mask = mask[back.to(mask.device)]
    return Read.of(layers, station, len(inputs), width, decoder.device), mask


def _parts(decoder: Decoder, lengths: Sequence[int]) -> list[int]:
    """How many rows to read at once, of which the longest come first; all, where parts cost more:
    each costs a forward, and there is one more for the last tokens."""
    sizes: list[int] = []
    cost = decoder.overhead
    while (done := sum(sizes)) < len(lengths):
        sizes.append(decoder.together(lengths[done:], len(lengths)))
        cost += lengths[done] * sizes[-1] + decoder.overhead
    return sizes if cost < lengths[0] * len(lengths) + decoder.overhead else [len(lengths)]


def _forward(
    decoder: Decoder, ids: Tensor, mask: Tensor, cache: DynamicCache, station: int,
    states: Sequence[Tensor],
) -> None:  # fmt: skip
    """Read ids (rows, t) into the cache, from the station on and up to the last keys and values.

    Nobody asks for what comes after them. Which layer is the last the first forward tells, in which
    the head reads one position.
    """
    passing: AbstractContextManager[None] = nullcontext()
    if station and decoder.lower is not None:
        passing = decoder.lower.skipping(station, padded(states))
    while len(cache.layers) < decoder.cached_layers:
        cache.layers.append(DynamicLayer())  # type: ignore[no-untyped-call]
    ending = _until_last(cache) if decoder.cached_layers else nullcontext()
    with entering_head(decoder.model, lambda states: states[:1, -1:]), passing, ending:
        decoder.forward(ids, mask, 1, cache)
    decoder.cached_layers = len(cache.layers)


class _Enough(Exception):
    """The last layer holds its keys and values."""


@contextmanager
def _until_last(cache: DynamicCache) -> Iterator[None]:
    """A forward within the block ends as soon as the last layer has got something."""
    last: Any = cache.layers[-1]

    def update(*args: Any, **kwargs: Any) -> None:
        type(last).update(last, *args, **kwargs)
        raise _Enough

    last.update = update
    try:
        with suppress(_Enough):
            yield
    finally:
        del last.update


def _layers(cache: DynamicCache, skipped: Sequence[Any]) -> Layers:
    """What a cache holds."""
    layers: list[Any] = list(cache.layers)
    full = [layer.is_initialized and layer not in skipped for layer in layers]
    pairs = zip(layers, full, strict=True)
    return [(layer.keys, layer.values) if held else None for layer, held in pairs]


def _joined(
    pairs: Sequence[tuple[Tensor, Tensor] | None], width: int, back: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """One layer of several parts, filled up on the left to `width` tokens, in the order `back`."""
    found = [pair for pair in pairs if pair is not None]
    if not found:
        return None

    def one(held: Sequence[Tensor]) -> Tensor:
        whole = torch.cat([pad(part, (0, 0, width - part.shape[2], 0)) for part in held])
        return whole if back is None else whole[back.to(whole.device)]

    return one([keys for keys, _ in found]), one([values for _, values in found])


def padded(states: Sequence[Tensor]) -> Tensor:
    """States (T, d) of several rows as (rows, longest, d), padded on the left as ids are."""
    width = max(map(len, states))
    return torch.stack([pad(one, (0, 0, width - len(one), 0)) for one in states])


def leave_empty(layers: Sequence[Any], rows: int, held: int, device: torch.device) -> None:
    """Let layers of a cache that were skipped hold nothing, `held` tokens long: models ask the
    first layer for how much the cache holds."""
    empty = torch.zeros(1, device=device).expand(rows, 1, held, 1)
    for layer in layers:
        if not layer.is_initialized:
            layer.lazy_initialization(empty, empty)
        layer.keys = layer.values = empty


def rest(ids: Tensor, mask: Tensor, shared: int) -> tuple[Tensor, Tensor]:
    """The ids and the mask of padded rows (rows, t) whose first `shared` tokens are in the cache:
    (rows, t − shared) and (rows, t). What stands under the mask's zeros is of no account."""
    own = mask[:, : mask.shape[1] - shared]
    return ids[:, shared:], torch.cat([own.new_ones(len(own), shared), own], dim=1)
