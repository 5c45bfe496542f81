"""Packed weights as plain numbers.

In memory (of a loaded module), by `weight_of`:

bnb 4 bit     code book value · block scale (QLoRA, arXiv 2305.14314): bitsandbytes' own routine
bnb 8 bit     row scale / 127 · code (LLM.int8, arXiv 2208.07339)
Conv1D, nn.Linear   as they are, out × in

In files (GPTQ, arXiv 2210.17323; AWQ, arXiv 2306.00978): codes q of b bits, 32/b to an int32, with
a zero point z and a scale s for each group of inputs and each output, w = s (q − z).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output that the k-th code of an int32 belongs to


@contextmanager
def present(module: nn.Module) -> Iterator[None]:
    """Within the block an offloaded module's parameters are there, on the device that runs it."""
    if not hasattr(module, "_hf_hook"):
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield


def weight_of(module: nn.Module) -> Tensor:
    """The weight (d, n) of a linear-like module: float32, dequantised, out × in; may be a view."""
    with present(module):
        for is_one, dequantise in KINDS:
            if is_one(module):
                return dequantise(module)
        weight: Any = module.weight
        plain: Tensor = weight.detach()
        return plain.float()


def _bnb_4bit(module: Any) -> Tensor:
    import bitsandbytes.functional as bnb

    return bnb.dequantize_4bit(module.weight.data, module.weight.quant_state).float()


def _bnb_8bit(module: Any) -> Tensor:
    # The scale moves from the parameter to the state in the first forward.
    holder = module.weight if module.weight.SCB is not None else module.state
    scale: Tensor = holder.SCB
    codes: Tensor = module.weight.data.float()
    return codes * (scale.float() / 127)[:, None]


def _conv1d(module: Any) -> Tensor:
    weight: Tensor = module.weight.detach()
    return weight.T.float()


KINDS: tuple[tuple[Callable[[Any], bool], Callable[[Any], Tensor]], ...] = (
    (lambda module: getattr(module.weight, "quant_state", None) is not None, _bnb_4bit),
    (lambda module: type(module.weight).__name__ == "Int8Params", _bnb_8bit),
    (lambda module: isinstance(module, Conv1D), _conv1d),
)


def gptq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, groups: Tensor, bits: int, offset: int
) -> Tensor:
    """W (d, n), float32, of GPTQ's packed tensors.

    qweight (n·b/32, d), codes packed along the inputs; qzeros (g, d·b/32), along the outputs;
    scales (g, d); groups (n), the group of each input (`g_idx`).
    offset   1 where z − 1 is stored (`gptq`, the first format), 0 (`gptq_v2`)
    """
    mask = (1 << bits) - 1
    codes = _unpacked(qweight, bits).permute(0, 2, 1).flatten(0, 1)  # (n, d)
    zeros = (_unpacked(qzeros, bits).flatten(1) + offset) & mask  # (g, d)
    index = groups.long()
    return ((codes - zeros[index]) * scales.float()[index]).T.contiguous()


def awq(qweight: Tensor, qzeros: Tensor, scales: Tensor, group: int) -> Tensor:
    """W (d, n), float32, of AWQ's packed tensors (version `gemm`, 4 bits).

    qweight (n, d/8) and qzeros (g, d/8), both packed along the outputs in `AWQ_ORDER`; scales
    (g, d); `group` consecutive inputs share a zero point and a scale.
    """
    place = torch.argsort(torch.tensor(AWQ_ORDER))
    codes = _unpacked(qweight, 4)[..., place].flatten(1)  # (n, d)
    zeros = _unpacked(qzeros, 4)[..., place].flatten(1)  # (g, d)
    index = torch.arange(len(codes)) // group
    return ((codes - zeros[index]) * scales.float()[index]).T.contiguous()


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """int32 (a, b) -> its codes (a, b, 32/bits), the lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return (packed[..., None] >> shifts) & ((1 << bits) - 1)
