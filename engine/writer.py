"""A matrix whose output is added to the residual stream."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from engine.dequantise import present, weight_of
from jobs.spec.candidate import Component


@dataclass(frozen=True)
class Writer:
    """One matrix W (d, n), y = Wx + bias, whose output is added to the residual stream.

    A stack is E such matrices in one parameter: the output projections of a layer's fused experts.

    name       the module's path; of a matrix that is a parameter of something else, the parameter's
    parameter  the attribute of `module` that holds the matrix
    experts    E of a stack, 0 of a single matrix
    via        "" where the output is added as it is (or scaled), else the norm it passes first
    scale      the factor with which the output reaches the stream; 1 almost everywhere
    transposed it is stored as (n, d), or (E, n, d): GPT-2's Conv1D, experts with `is_transposed`
    """

    name: str
    layer: int
    component: Component
    module: nn.Module
    d: int
    n: int
    via: str = ""
    scale: float = 1.0
    parameter: str = "weight"
    experts: int = 0
    transposed: bool = False

    @property
    def hooked(self) -> bool:
        """Whether the module's input and output are the matrix's own, so that hooks can edit it.

        All others are edited in place.
        """
        return self.parameter == "weight" and linear_width(self.module) is not None

    @property
    def shape(self) -> tuple[int, ...]:
        """(d, n), or (E, d, n) of a stack."""
        return (self.experts, self.d, self.n) if self.experts else (self.d, self.n)

    def oriented(self, stored: Tensor) -> Tensor:
        """The stored tensor as (d, n) or (E, d, n): a view of it."""
        if self.experts and self.transposed:
            return stored.view(self.experts, self.n, self.d).transpose(1, 2)
        if self.experts:
            return stored.view(self.experts, self.d, self.n)
        return stored.T if self.transposed else stored

    def weight(self) -> Tensor:
        """W (d, n) or (E, d, n), float32, dequantised, on the model's device; may be a view."""
        if self.hooked:
            return weight_of(self.module)
        held: Tensor = getattr(self.module, self.parameter)
        return self.oriented(held.detach()).float()

    def bias(self) -> Tensor | None:
        """The bias (d), (E, d) of a stack, or None."""
        name = "bias" if self.hooked else f"{self.parameter}_bias"
        with present(self.module):
            bias = getattr(self.module, name, None)
            return bias if isinstance(bias, Tensor) else None


def linear_width(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear-like module, else None."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    return None
