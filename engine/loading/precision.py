"""The data type of the weights: which to try in turn, and whether one is sound."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from engine.loading.faults import out_of_memory
from engine.loading.placement import input_device
from jobs.spec.job import Dtype, Quantization

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def dtype_chain(
    wanted: Dtype, device: torch.device, quantization: Quantization = "none"
) -> list[torch.dtype]:
    """The dtypes to try in turn.

    auto on CPU    float32; quantised bfloat16, float32: memory is what 4 bits are chosen for, and
                   a small model's embedding in float32 weighs as much as its layers
    auto on CUDA   bfloat16 where the GPU has it, float16, float32
    any other      itself, then the wider ones of that list
    """
    half = [torch.float16]
    if device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False):
        half.insert(0, torch.bfloat16)
    if wanted == "auto":
        if device.type == "cpu":
            return [torch.float32] if quantization == "none" else [torch.bfloat16, torch.float32]
        return [*half, torch.float32]
    first = DTYPES[wanted]
    if first is torch.float32:
        return [first]
    return [first, *(d for d in half if d is not first), torch.float32]


def label(dtype: torch.dtype) -> str:
    """`bfloat16`, without `torch.`."""
    return str(dtype).removeprefix("torch.")


@torch.no_grad()
def first_forward(model: nn.Module) -> str | None:
    """What is wrong with the logits of a few tokens, or None."""
    config: Any = model.config
    vocab = int(config.get_text_config(decoder=True).vocab_size)
    ids = (torch.arange(1, 9, device=input_device(model)) % vocab)[None]
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    except torch.OutOfMemoryError as error:
        raise out_of_memory() from error
    except (RuntimeError, TypeError, NotImplementedError) as error:
        text = str(error)
        if any(word in text.lower() for word in ("dtype", "bfloat16", "half", "not implemented")):
            return f"data type not supported ({text.splitlines()[0]})"
        raise
    return None if torch.isfinite(logits).all() else "NaN or infinity in the logits"
