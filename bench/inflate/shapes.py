"""Shapes of well-known models, and where the demo model lies in one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama, as `LlamaConfig` has them, and whose they are."""

    like: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    vocabulary: int
    tied: bool


SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        "test": Shape("none: for tests", 384, 11, 12, 3, 128, 768, 2048, True),
        "0.5B": Shape("Qwen2.5-0.5B", 896, 24, 14, 2, 64, 4864, 151_936, True),
        "0.6B": Shape("Qwen3-0.6B", 1024, 28, 16, 8, 128, 3072, 151_936, True),
        "1.7B": Shape("Qwen3-1.7B", 2048, 28, 16, 8, 128, 6144, 151_936, True),
        "8B": Shape("Llama-3.1-8B", 4096, 32, 32, 8, 128, 14_336, 128_256, False),
        "32B": Shape("Qwen3-32B", 5120, 64, 64, 8, 128, 25_600, 151_936, False),
    }
)


@dataclass(frozen=True)
class Places:
    """Where the demo's rows and columns lie in the wide matrices: indices, in the demo's order.

    depths    layer of the wide model for each of the demo's
    queries   rows of q_proj, and of k_proj in `keys`: rotary pairs of the demo's frequencies
    unasked   the other rows of q_proj in the same heads: with zeros there the keys' are not heard
    values    rows of v_proj; the columns of o_proj that read them are `outputs`
    live      columns of o_proj whose input is not zero: those, and the heads that share the
              demo's values with them
    """

    depths: tuple[int, ...]
    queries: Tensor
    unasked: Tensor
    keys: Tensor
    values: Tensor
    outputs: Tensor
    live: Tensor


def places(config: Any, shape: Shape) -> Places:
    """Where a Llama of `config` (default rotary embedding) lies in `shape`.

    Layers are spread evenly from the first to the last, so that depth as a fraction is kept. Query
    heads stay with their key-value head. Rotary frequency j of a head of h is θ^(−2j/h): that of a
    head of r·h at j·r, bit for bit. ValueError where the model does not fit.
    """
    width, wide = config.head_dim, shape.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    group, wide_group = heads // kv_heads, shape.heads // shape.kv_heads
    if config.rope_parameters["rope_type"] != "default" or wide % width or width % 2:
        raise ValueError(
            f"rotary frequencies of heads of {width} are none of those of heads of {wide}"
        )
    for name, old, new in (
        ("hidden, with two constants,", config.hidden_size + 2, shape.hidden),
        ("layers", config.num_hidden_layers, shape.layers),
        ("key-value heads", kv_heads, shape.kv_heads),
        ("query heads of a key-value head", group, wide_group),
        ("feed-forward", config.intermediate_size, shape.feed_forward),
        ("vocabulary", config.vocab_size, shape.vocabulary),
    ):
        if new < old:
            raise ValueError(f"{name}: {old} do not fit into {new}")
    last, wide_last = config.num_hidden_layers - 1, shape.layers - 1
    pairs = torch.arange(width // 2) * (wide // width)
    rotated = torch.cat([pairs, pairs + wide // 2])
    plain = torch.arange(width)
    between = torch.tensor(sorted({*range(wide)} - {*rotated.tolist()}), dtype=torch.long)
    kept = torch.arange(kv_heads)
    mine = torch.cat([j * wide_group + torch.arange(group) for j in range(kv_heads)])
    sharing = torch.arange(kv_heads * wide_group)

    def within(which: Tensor, rows: Tensor) -> Tensor:
        return (which[:, None] * wide + rows).flatten()

    return Places(
        depths=tuple(i * wide_last // max(last, 1) for i in range(last + 1)),
        queries=within(mine, rotated),
        unasked=within(mine, between),
        keys=within(kept, rotated),
        values=within(kept, plain),
        outputs=within(mine, plain),
        live=within(sharing, plain),
    )
