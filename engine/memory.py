"""How many rows fit: batch sizes from free memory by a model, not by trial and error."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CUDA_SHARE = 0.85  # of the free memory; the rest is fragmentation and what the model leaves out
CPU_SHARE = 0.5  # other processes live in the same memory
CUDA_ROWS = 1024  # beyond this decoding is bound by arithmetic and gains nothing
CPU_ROWS = 128  # a CPU is bound by arithmetic much earlier
FLOAT32 = 4


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that memory depends on. `width` is of one element, in bytes."""

    layers: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocabulary: int
    width: int

    @classmethod
    def of(cls, config: PretrainedConfig, width: int) -> Shape:
        """From a model's configuration; of a vision-language model the text part counts."""
        text = config.get_text_config()
        heads = int(text.num_attention_heads)
        intermediate = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
        return cls(
            layers=int(text.num_hidden_layers),
            kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
            head_dim=int(getattr(text, "head_dim", None) or text.hidden_size // heads),
            hidden=int(text.hidden_size),
            intermediate=int(intermediate),
            vocabulary=int(text.vocab_size),
            width=width,
        )


def decode_row(shape: Shape, prompt: int, new: int) -> int:
    """Bytes of one row that is decoded from `prompt` tokens to `prompt + new`.

    Keys and values of all layers, those of one layer three times over while it grows or drops rows;
    the widest moment of one layer over the prompt (residual, norm, attention in and out: 6 d; gate,
    up and product: 3 m); the logits of one position, as computed and twice in float32.
    """
    cache = 2 * shape.layers * shape.kv_heads * shape.head_dim * (prompt + new) * shape.width
    layer_cache = cache // shape.layers
    activations = prompt * (6 * shape.hidden + 3 * shape.intermediate) * shape.width
    logits = shape.vocabulary * (shape.width + 2 * FLOAT32)
    return cache + 2 * layer_cache + activations + logits


def forward_row(shape: Shape, tokens: int, scored: int) -> int:
    """Bytes of one row of a forward without cache that keeps the logits of `scored` positions."""
    activations = tokens * (6 * shape.hidden + 3 * shape.intermediate) * shape.width
    keys_values = 2 * tokens * shape.kv_heads * shape.head_dim * shape.width
    return activations + keys_values + scored * shape.vocabulary * shape.width


def fitting_rows(free: int, per_row: int, device: torch.device) -> int:
    """How many rows of `per_row` bytes fit into `free` bytes: 1 at least, a cap at most."""
    share, cap = (CUDA_SHARE, CUDA_ROWS) if device.type == "cuda" else (CPU_SHARE, CPU_ROWS)
    return max(1, min(cap, int(free * share) // max(1, per_row)))


def free_bytes(device: torch.device) -> int:
    """Memory that new tensors may take on `device`, including what torch holds but does not use."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(int(psutil.virtual_memory().available), _container_free())


def _container_free() -> int:
    """What the control group (v2) leaves; without a limit, more than any machine has."""
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii").strip()
    except OSError:
        return 1 << 62
    return 1 << 62 if limit == "max" else max(0, int(limit) - int(used))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out, on a GPU or on the host."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in text or "CUDA out of memory" in text
    )


def release() -> None:
    """Give unused memory back to the device, after an out-of-memory error."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
