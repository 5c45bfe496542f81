"""The parameters of one edit: everything needed to make it again."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, TypeAdapter

EditMode = Literal["none", "pre", "full", "columns"]
Scope = Literal["per_layer", "global"]
Component = Literal["attention", "mlp"]
COMPONENTS: tuple[Component, ...] = ("attention", "mlp")


class Frozen(BaseModel):
    """Base of all parts: unknown fields are errors, values may be keys of a table."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Kernel(Frozen):
    """Strength over the layers: λ falls linearly from max to min over |l − position| ≤ distance.

    `Kernel(max_weight=1, min_weight=1, position=0, distance=1e9)` is 1 on every layer.
    """

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


class Recipe(Frozen):
    """How directions of refusal are made from the states of harmful and harmless prompts.

    center      the middle of each side: arithmetic mean or geometric median
    winsorize   clamp |h| of each state at this quantile of its entries (massive activations)
    projection  projected: off the harmless mean of the layer where it is measured;
                biprojected: also off that of the layer where it is used (Lai 2025)
    subspace    single: the difference of the two centers (Arditi et al. 2024);
                svd: it and the first singular vectors of the harmful states' deviations;
                som: a self-organising map of the harmful states (arXiv 2511.08379)
    count       how many directions at most; 1 for `single`
    position    which prompt token: -1 the last one, -2 the one before, ...
    """

    center: Literal["mean", "median"] = "mean"
    winsorize: float | None = Field(None, gt=0.5, lt=1)
    projection: Literal["none", "projected", "biprojected"] = "projected"
    subspace: Literal["single", "svd", "som"] = "single"
    count: int = Field(1, ge=1, le=16)
    position: int = Field(-1, ge=-16, le=-1)


class Router(Frozen):
    """Fewer tokens for the experts of refusal, in each mixture whose router has a bias.

    experts  how many per layer: those that harmful prompts choose more often than harmless ones do
             (SteerMoE's risk difference, arXiv 2509.09660), the greatest difference first
    bias     what is subtracted from their entries of the router's bias, in the unit of the scores
             to which the router adds it: logits (gpt-oss), or sigmoids within 0..1 (DeepSeek-V3),
             where 1 is never to be chosen
    """

    experts: int = Field(ge=1, le=64)
    bias: float = Field(ge=0, le=100)


class Ablation(Frozen):
    """Directional ablation: directions are taken out of what the writers write.

    With the model's commit and the direction prompts it is complete.
    affine   the component along the directions becomes its harmless mean instead of 0
    router   experts that are suppressed besides; None leaves the routers as they are
    """

    method: Literal["ablation"] = "ablation"
    mode: EditMode = "full"
    recipe: Recipe = Recipe()
    scope: Scope = "per_layer"
    index: float | None = Field(None, ge=0, description="global scope: real layer index i")
    attention: Kernel
    mlp: Kernel
    affine: bool = False
    router: Router | None = None

    def kernel(self, component: Component) -> Kernel:
        """The kernel of one component."""
        return self.attention if component == "attention" else self.mlp


class Ara(Frozen):
    """Arbitrary-rank ablation (ENGINE.md): each writer of layers [start, end) is optimised.

    preserve     p, weight of leaving harmless outputs alone
    steer        q, weight of moving harmful outputs among the harmless ones
    overshoot    ω, how much being away from the harmful outputs counts
    neighbours   k of the nearest-neighbour distances
    rank         rank to which each change is truncated; None keeps it whole
    """

    method: Literal["ara"] = "ara"
    start: int = Field(ge=0)
    end: int = Field(ge=0)
    preserve: float = Field(ge=0, le=1)
    steer: float = Field(gt=0, le=1)
    overshoot: float = Field(ge=0, le=2)
    neighbours: int = Field(ge=1, le=64)
    rank: int | None = Field(None, ge=1)


def _method(value: Any) -> str:
    """The tag of a candidate; absent in JSON it is an ablation."""
    if isinstance(value, dict):
        return str(value.get("method", "ablation"))
    return str(getattr(value, "method", "ablation"))


Candidate = Annotated[
    Annotated[Ablation, Tag("ablation")] | Annotated[Ara, Tag("ara")], Discriminator(_method)
]
_CANDIDATES: TypeAdapter[Ablation | Ara] = TypeAdapter(Candidate)


def parse(value: Any) -> Ablation | Ara:
    """A candidate from its JSON. pydantic.ValidationError where it is none."""
    return _CANDIDATES.validate_python(value)


def constant(strength: float = 1.0) -> Kernel:
    """A kernel that is `strength` on every layer."""
    return Kernel(max_weight=strength, min_weight=strength, position=0.0, distance=1e9)


def single_pass(
    layers: int,
    mode: EditMode = "full",
    recipe: Recipe | None = None,
    affine: bool = False,
    router: Router | None = None,
) -> Ablation:
    """The edit without a search: one direction at about 0.6 L, λ = 1 on all layers."""
    index = round(0.6 * (layers - 1))
    return Ablation(
        mode=mode,
        recipe=recipe or Recipe(),
        scope="global",
        index=float(index),
        attention=constant(),
        mlp=constant(),
        affine=affine,
        router=router,
    )
