"""A matrix whose output is added to the residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from jobs.spec.candidate import Component


@dataclass(frozen=True)
class Writer:
    """One matrix W (d, n), y = Wx + bias, whose output is added to the residual stream.

    via    "" where the output is added as it is (or scaled), else the norm it passes first
    scale  the factor with which the output reaches the stream; 1 almost everywhere
    """

    name: str
    layer: int
    component: Component
    module: nn.Module
    d: int
    n: int
    via: str = ""
    scale: float = 1.0

    @property
    def transposed(self) -> bool:
        """The module keeps its weight as (n, d): GPT-2's Conv1D."""
        return isinstance(self.module, Conv1D)

    def weight(self) -> Tensor:
        """W (d, n), float32, dequantised, on the model's device; may be the weight itself."""
        return weight_of(self.module)

    def bias(self) -> Tensor | None:
        """The bias (d) or None."""
        bias = getattr(self.module, "bias", None)
        return bias if isinstance(bias, Tensor) else None


def linear_width(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear-like module, else None."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    return None


def weight_of(module: nn.Module) -> Tensor:
    """The weight (d, n) of a linear-like module: float32, dequantised, out × in."""
    weight: Any = module.weight
    state = getattr(weight, "quant_state", None)
    if state is not None:
        import bitsandbytes.functional as bnb

        return bnb.dequantize_4bit(weight.data, state).float()
    if type(weight).__name__ == "Int8Params":
        # The scale moves from the parameter to the state in the first forward.
        holder: Any = weight if weight.SCB is not None else module.state
        scale: Tensor = holder.SCB
        codes: Tensor = weight.data.float()
        return codes * (scale.float() / 127)[:, None]
    plain: Tensor = weight.detach()
    return (plain.T if isinstance(module, Conv1D) else plain).float()
