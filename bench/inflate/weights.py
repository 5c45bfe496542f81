"""The tensors of the wide model, one at a time, from those of the demo model.

d, D: width of the demo's residual stream and of the wide one. The stream's coordinates are

    0..d−1        the demo's stream, bit for bit in exact arithmetic
    d, d+1        both c = 2^-7 for every token of the demo: never written, read by the head alone
    d+2..D−1      always zero

RMSNorm of the wide stream is x √D / √(‖x‖² + 2c² + ε'D). With the weight times √(d/D) and
ε' = (εd − 2c²)/D it is the demo's norm: the constants stand where a part of its ε stood.

Padding holds random numbers of the size of the demo's, so that quantisation, bandwidth and caches
see what they see of a real model. They cannot be heard:

    q, k, gate    all columns beyond d multiply zeros. Padding rows speak, and nobody reads them:
                  in the demo's heads those of q are zero in columns 0..d−1
    v, up         padding rows are zero in columns 0..d−1: what they say is exactly zero
    o, down       rows 0..d−1 are zero but for the demo's block. The other rows are zero in the
                  columns that carry something (`live`), so the padding of the stream stays zero
    norms         0 at the constants, so that only the head reads them
    head, embedding   a padding token has 0 in columns 0..d−1 and ∓16 at the constants, where the
                  last norm has ±G: its logit is −BELOW/√(‖x‖² + εd), x the demo's last state,
                  while at the demo's own tokens the two constants cancel exactly

Layers between the demo's are the same with no block in o and down: the identity. Zeros begin and
end at multiples of 64 columns, so a block-wise quantiser never mixes the demo's numbers with
padding. Edits keep all of this (a direction has zeros where the stream has), except that a
direction projected off the harmless mean has a share of the constants, of c/‖mean‖. The modes
`none` and `columns` write that share, the same on both: the constants still cancel.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bench.inflate.shapes import Places, Shape, places

CONSTANT = 2.0**-7  # c
AGAINST = 16.0  # what a padding token's row has at the constants
POOL = 4_194_301  # a prime, so that the repeats fall into different columns
BELOW = 2.0**15  # the demo's last states have ‖x‖ of 19 to 104: logits of −1700 to −310
OUTSIDE = ("tokens", "last norm")  # of the layers

# (noise to be written into, the demo's tensor, whether the layer is one of the demo's)
Rule = Callable[[Tensor, Tensor, bool], None]
Maker = Callable[[], Tensor]


def epsilon(config: Any, shape: Shape) -> float:
    """ε' of the wide norms. ValueError where the demo's ε leaves no room for the constants."""
    rest: float = config.rms_norm_eps * config.hidden_size - 2 * CONSTANT**2
    if rest <= 0:
        raise ValueError(f"rms_norm_eps {config.rms_norm_eps} is too small for the constants")
    return rest / shape.hidden


def tensors(
    source: Mapping[str, Tensor], config: Any, shape: Shape
) -> dict[str, tuple[tuple[int, ...], Maker]]:
    """Every tensor of the wide model in the order of its files: name -> shape and what makes it.

    `source` are the demo's tensors in float32, `config` is its LlamaConfig. A maker returns a new
    float32 tensor; the same name gives the same numbers. ValueError where the demo does not fit.
    """
    where = places(config, shape)
    table = _rules(config, shape, where)
    made: dict[str, tuple[tuple[int, ...], Maker]] = {}

    def add(name: str, original: str, kind: str, true: bool = True) -> None:
        size, rule = table[kind]

        def make() -> Tensor:
            wide = _noise(name, size, source[original])
            rule(wide, source[original], true)
            return wide

        made[name] = size, make

    add("model.embed_tokens.weight", "model.embed_tokens.weight", "tokens")
    for layer in range(shape.layers):
        lower = max(k for k, depth in enumerate(where.depths) if depth <= layer)
        true = where.depths[lower] == layer
        for kind in table:
            if kind not in OUTSIDE:
                name, below = (f"model.layers.{n}.{kind}.weight" for n in (layer, lower))
                add(name, below, kind, true)
    add("model.norm.weight", "model.norm.weight", "last norm")
    if not shape.tied:
        add("lm_head.weight", "model.embed_tokens.weight", "tokens")
    return made


def _rules(config: Any, shape: Shape, where: Places) -> dict[str, tuple[tuple[int, ...], Rule]]:
    """Wide size and rule of every kind of tensor; this module's docstring in code."""
    old, new = config.hidden_size, shape.hidden
    constants = slice(old, old + 2)
    narrower = math.sqrt(old / new)
    units, none = torch.arange(config.intermediate_size), torch.arange(0)

    def reader(rows: Tensor, zero: Tensor, scale: float = 1.0) -> Rule:
        def write(wide: Tensor, W: Tensor, true: bool) -> None:
            wide[zero, :old] = 0
            if true:
                wide[rows, :old] = W * scale

        return write

    def silent(rows: Tensor) -> Rule:
        def write(wide: Tensor, W: Tensor, true: bool) -> None:
            heard = W if true else wide[rows, :old]
            wide[:, :old] = 0
            wide[rows, :old] = heard

        return write

    def writer(columns: Tensor, live: Tensor) -> Rule:
        def write(wide: Tensor, W: Tensor, true: bool) -> None:
            wide[: old + 2] = 0
            wide[:, live] = 0
            if true:
                wide[:old, columns] = W

        return write

    def norm(constant: float = 0.0) -> Rule:
        def write(wide: Tensor, w: Tensor, true: bool) -> None:
            wide.fill_(float(w.mean()) * narrower)
            wide[:old] = w * narrower
            wide[constants] = torch.tensor([constant, -constant])

        return write

    def tokens(wide: Tensor, W: Tensor, true: bool) -> None:
        wide[: len(W)] = 0
        wide[: len(W), :old], wide[: len(W), constants] = W, CONSTANT
        wide[len(W) :, :old] = 0
        wide[len(W) :, constants] = torch.tensor([-AGAINST, AGAINST])

    softmax = math.sqrt(shape.head_dim / config.head_dim)  # scores are divided by √head_dim
    loud = BELOW / (2 * AGAINST * CONSTANT * math.sqrt(new))
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    inner = shape.feed_forward
    return {
        "tokens": ((shape.vocabulary, new), tokens),
        "input_layernorm": ((new,), norm()),
        "self_attn.q_proj": ((q, new), reader(where.queries, where.unasked, softmax)),
        "self_attn.k_proj": ((kv, new), reader(where.keys, none)),
        "self_attn.v_proj": ((kv, new), silent(where.values)),
        "self_attn.o_proj": ((new, q), writer(where.outputs, where.live)),
        "post_attention_layernorm": ((new,), norm()),
        "mlp.gate_proj": ((inner, new), reader(units, none)),
        "mlp.up_proj": ((inner, new), silent(units)),
        "mlp.down_proj": ((new, inner), writer(units, units)),
        "last norm": ((new,), norm(loud)),
    }


def _noise(name: str, size: tuple[int, ...], like: Tensor) -> Tensor:
    """Normal numbers with the deviation of `like`, none greater than its greatest.

    They repeat after POOL, from a place that the name decides: making them anew would take most of
    the time, and nothing that is measured sees it.
    """
    pool, count = _normal(), math.prod(size)
    start = zlib.crc32(name.encode()) % POOL
    wide = pool.roll(-start).repeat(-(-count // POOL))[:count].reshape(size)
    peak = float(like.abs().max())
    return wide.mul_(float(like.std())).clamp_(-peak, peak)


@cache
def _normal() -> Tensor:
    return torch.randn(POOL, generator=torch.Generator().manual_seed(0))
