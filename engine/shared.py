"""What all prompts of a batch begin with, read once for each edit instead of once for each row.

A chat template and a system prompt are the same in front of every prompt, and often as long as the
prompt itself. Their keys and values go into the cache first, from one row for each edit; then the
cache is spread over the rows, and the forward reads what is left of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

if TYPE_CHECKING:
    from engine.decode import Decoder
    from engine.edit import Edit


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


def beginning(decoder: Decoder, inputs: Sequence[list[int]], edits: int) -> int:
    """How many tokens at the front of all `inputs` to read once for each of `edits` edits; 0 where
    that costs more than it saves."""
    if not decoder.shares:
        return 0
    shortest, longest = min(inputs), max(inputs)  # what these two share, all share
    most = min(map(len, inputs)) - 1
    pairs = zip(shortest[:most], longest[:most], strict=False)
    same = next((n for n, (a, b) in enumerate(pairs) if a != b), most)
    return same if same * (len(inputs) - edits) > decoder.overhead else 0


def read_beginning(
    decoder: Decoder,
    ids: Sequence[int],
    edits: Sequence[Edit],
    numbers: Sequence[int],
    cache: DynamicCache,
    station: int = 0,
    states: Tensor | None = None,
) -> list[Any]:
    """Read `ids` into `cache` for rows with the edits `numbers`, which are then selected.

    station, states   the block at which the forward begins, and what enters it, (T, d)
    Gives the cache's layers that were skipped; they hold nothing, as long as the others.
    """
    distinct = list(dict.fromkeys(numbers))
    decoder.select(edits, distinct)
    given, mask = decoder.padded([list(ids)] * len(distinct))
    passing: AbstractContextManager[None] = nullcontext()
    if station and states is not None and decoder.lower is not None:
        passing = decoder.lower.skipping(station, states.expand(len(distinct), -1, -1))
    with passing:
        decoder.forward(given, mask, 1, cache)
    place = {number: row for row, number in enumerate(distinct)}
    index: Any = torch.tensor([place[number] for number in numbers], device=given.device)
    layers: list[Any] = list(cache.layers)
    # without a station these are layers that the model never fills, and reads if they are
    skipped = [layer for layer in layers if station and not layer.is_initialized]
    cache.reorder_cache(index)
    leave_empty(skipped, len(numbers), len(ids), given.device)
    decoder.select(edits, list(numbers))
    return skipped


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
