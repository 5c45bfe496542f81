"""How much a loaded model holds."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import nn


def parameters(model: nn.Module) -> int:
    """Parameters of the model, tied ones once, packed ones as many as they stand for."""
    return sum(_unpacked(parameter) for parameter in _own(model))


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, buffers and quantisation tables, shared storage once."""
    sizes: dict[int, int] = {}

    def count(tensor: Any) -> None:
        if isinstance(tensor, torch.Tensor):
            sizes[tensor.data_ptr() or id(tensor)] = tensor.nbytes  # offloaded: no pointer

    def count_state(state: Any) -> None:
        for value in vars(state).values():
            count(value)
        if getattr(state, "state2", None) is not None:
            count_state(state.state2)

    for tensor in [*_own(model), *model.buffers()]:
        count(tensor)
        state = getattr(tensor, "quant_state", None)
        if state is not None:
            count_state(state)
        count(getattr(tensor, "SCB", None))
    for module in model.modules():
        count(getattr(getattr(module, "state", None), "SCB", None))
    return sum(sizes.values())


def _own(model: nn.Module) -> list[nn.Parameter]:
    """The model's parameters; of offloaded ones that are tied, which no longer are one, the first.

    `all_tied_weights_keys` of transformers: name of a tied parameter -> name of its twin.
    """
    tied = getattr(model, "all_tied_weights_keys", {})
    return [p for name, p in model.named_parameters() if not (p.is_meta and name in tied)]


def _unpacked(parameter: nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)  # of bitsandbytes: two weights in a byte
    return parameter.numel() if state is None else prod(state.shape)
