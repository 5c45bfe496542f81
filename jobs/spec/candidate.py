"""The parameters of one edit: everything needed to make it again."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

EditMode = Literal["none", "pre", "full", "columns"]
Scope = Literal["per_layer", "global"]
Component = Literal["attention", "mlp"]
COMPONENTS: tuple[Component, ...] = ("attention", "mlp")


class Kernel(BaseModel):
    """Strength over the layers: λ falls linearly from max to min over |l − position| ≤ distance.

    `Kernel(max_weight=1, min_weight=1, position=0, distance=1e9)` is 1 on every layer.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_weight: float = Field(ge=0, le=4)
    min_weight: float = Field(ge=0, le=4)
    position: float
    distance: float = Field(gt=0)

    def weight(self, layer: int) -> float:
        """λ of `layer` (0-based); 0 beyond `distance` (ENGINE.md, search space)."""
        away = abs(layer - self.position)
        if away > self.distance:
            return 0.0
        return self.max_weight + (self.min_weight - self.max_weight) * away / self.distance


class Candidate(BaseModel):
    """One edit of a model. With the model's commit and the direction prompts it is complete."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: EditMode = "full"
    projected: bool = True
    scope: Scope = "per_layer"
    index: float | None = Field(None, ge=0, description="global scope: real layer index i")
    attention: Kernel
    mlp: Kernel

    def kernel(self, component: Component) -> Kernel:
        """The kernel of one component."""
        return self.attention if component == "attention" else self.mlp


def constant(strength: float = 1.0) -> Kernel:
    """A kernel that is `strength` on every layer."""
    return Kernel(max_weight=strength, min_weight=strength, position=0.0, distance=1e9)


def single_pass(layers: int, mode: EditMode = "full", projected: bool = True) -> Candidate:
    """The edit without a search: one direction at about 0.6 L, λ = 1 on all layers."""
    index = round(0.6 * (layers - 1))
    return Candidate(
        mode=mode,
        projected=projected,
        scope="global",
        index=float(index),
        attention=constant(),
        mlp=constant(),
    )
