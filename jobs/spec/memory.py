"""The memory model: bytes of a model's cache, activations and logits from its sizes alone.

The estimate before a job is submitted and the engine's batch sizes use these same formulas. Counted
is what transformers 5 holds at the widest moment of one decoder block (blocks run one after the
other, so one block's tensors are alive at a time), for w bytes a number:

    cache      w·kv·tokens for each block that keeps all keys and values, at most a window of
               tokens for each that slides, nothing for one without attention; plus the constant
               states of recurrent and convolution blocks
    prompt     tokens × the wider of: attention, w·(2d + 4q + kv + spread); feed-forward,
               w·(2d + 3m); the norm and the edit in float32, 2dw + 12d; a recurrent block's scan
    logits     2·V·w: the last step's are alive while the next are made; twice that where they are
               capped

d residual width, q = heads × head size, kv numbers of one token in one block's cache, spread the
same once they stand for every query head, m feed-forward width of one token, V vocabulary.
"""

from __future__ import annotations

from typing import Literal

from jobs.spec.shape import FLOAT32, Shape

Kind = Literal["cuda", "cpu"]
CUDA_SHARE = 0.85  # of the free memory; the rest is fragmentation and what the model leaves out
CPU_SHARE = 0.5  # other processes live in the same memory
CUDA_ROWS = 1024  # beyond this decoding is bound by arithmetic and gains nothing
CPU_ROWS = 128  # a CPU is bound by arithmetic much earlier
KL_ROWS = 256  # of one forward that compares distributions
KL_LOGITS = 1 << 28  # bytes of logits that it makes; more rows gain nothing
KL_CHUNK = 1 << 20  # numbers of each of two sides that are compared at once, in float64
KL_TENSORS = 8  # of such a chunk
DRAFT_CHUNK = 1 << 24  # logits of drafts that are made at once
KL_SHARE = 0.5  # of the free memory, for one such forward
# Candidates in one request of a worker: on a GPU they share the reading of the weights. Where each
# is scored by itself AHEAD are in hand for each lane (`engine.lanes`). The sampler loses little
# (docs/search.md).
CANDIDATES = 8
LANES: dict[Kind, int] = {"cuda": 1, "cpu": 2}  # batches that are worked on at once, at most
AHEAD = 3  # candidates in hand for each lane: one that is scored, and so many that none waits
STATIONS = 6  # blocks before which the original's states are kept, eighths of the depth
# Bytes of those states, of each process that keeps some. What two answers to each of a hundred
# prompts need grows slower than the weights: 54 MB where the demo model has 20, 191 of 1976 at 0.5
# billion parameters in float32; by their shapes 0.4 GB of 16 at 8 billion in 16 bits.
LEAST_LOWER, MOST_LOWER = 64 << 20, 2 << 30
LOWER_SHARE = 0.2  # of the weights


def cache_row(shape: Shape, tokens: int) -> int:
    """Bytes that one row of `tokens` tokens keeps between two forwards."""
    seen = shape.keeping * tokens + shape.sliding * min(tokens, shape.window or tokens)
    return shape.width * shape.kv * seen + shape.state


def block_row(shape: Shape, tokens: int) -> int:
    """Bytes of one row at the widest moment of one block over `tokens` tokens."""
    w, d = shape.width, shape.hidden
    attention = w * (2 * d + 4 * shape.queries + shape.kv + shape.spread)
    attention += tokens * shape.eager * (2 * w + FLOAT32)
    feed_forward = w * (2 * d + 3 * shape.inner + shape.gathered)
    floats = 2 * w * d + 3 * FLOAT32 * d
    padded = -(-tokens // shape.chunk) * shape.chunk
    return max(tokens * max(attention, feed_forward, floats), padded * shape.scan)


def logits_row(shape: Shape, positions: int) -> int:
    """Bytes of one row's logits at `positions` positions, with their capped copies."""
    return positions * shape.vocabulary * shape.width * (3 if shape.capped else 1)


def decode_row(shape: Shape, prompt: int, new: int) -> int:
    """Bytes of one row that is decoded from `prompt` tokens to `prompt + new`.

    The larger of two moments: one block over the prompt, beside the cache so far; or the last
    step, when the cache is full, one block's keys and values exist twice (they grow by
    concatenation), and two steps' logits are alive.
    """
    full = cache_row(shape, prompt + new)
    one_block = shape.width * shape.kv * (prompt + new)
    first = cache_row(shape, prompt) + block_row(shape, prompt) + logits_row(shape, 1)
    return max(first, full + one_block + 2 * logits_row(shape, 1))


def forward_row(shape: Shape, tokens: int, scored: int) -> int:
    """Bytes of one row of a forward without cache that keeps the logits of `scored` positions."""
    stream = tokens * shape.hidden * shape.width
    return max(block_row(shape, tokens), stream + logits_row(shape, scored))


def compared_rows(shape: Shape, positions: int) -> int:
    """Rows of one forward that compares distributions at `positions` of each.

    The original's logits come on top of the edited ones, at worst as many.
    """
    return max(1, min(KL_ROWS, KL_LOGITS // max(1, 2 * logits_row(shape, positions))))


def comparing_bytes(positions: int, vocabulary: int) -> int:
    """Bytes of comparing the distributions of two models at so many positions, besides logits."""
    return KL_TENSORS * 2 * FLOAT32 * min(max(KL_CHUNK, vocabulary), positions * vocabulary)


def drafts_bytes(shape: Shape, positions: int) -> int:
    """Bytes of the logits of drafts at so many positions: a chunk, and its copy in float32."""
    copied = FLOAT32 if shape.width < FLOAT32 else 0
    numbers = min(max(DRAFT_CHUNK, shape.vocabulary), positions * shape.vocabulary)
    return numbers * (shape.width + copied)


def fitting(free: int, per_row: int, kind: Kind) -> int:
    """How many rows of `per_row` bytes fit into `free` bytes: 1 at least, a cap at most."""
    share, cap = (CUDA_SHARE, CUDA_ROWS) if kind == "cuda" else (CPU_SHARE, CPU_ROWS)
    return max(1, min(cap, int(free * share) // max(1, per_row)))


def lower_bytes(weights: int, lanes: int = 1) -> int:
    """Bytes of host memory, at most, for the original's states of sequences that come again: of
    each of `lanes` processes, which have their own."""
    return max(LEAST_LOWER, min(MOST_LOWER, int(LOWER_SHARE * weights)) // lanes)


def basis_bytes(layers: int, d: int, n: int, matrices: int = 1) -> int:
    """Bytes of the edit basis of `matrices` writers (d, n): float32 vectors for each direction."""
    return matrices * FLOAT32 * (layers * (d + 2 * n) + d + n)
