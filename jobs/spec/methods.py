"""The methods that a job can search with or compare: one row each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jobs.spec.candidate import EditMode, Recipe

MethodName = Literal[
    "mpoa", "mpoa_columns", "pre", "ablate", "raw", "biprojected", "median", "winsorized", "svd",
    "som", "affine", "router", "ara", "deccp", "arditi",
]  # fmt: skip

MEAN = Recipe()
RAW = Recipe(projection="none")
POSITIONS = (-1, -2, -3, -4, -5)  # of the prompt, where `arditi` looks for its direction


@dataclass(frozen=True)
class Method:
    """What is fixed while a method is searched.

    kind    ablation: kernels are searched; ara: its own space; fixed: one trial, nothing searched
    router  ablation: which experts are suppressed, and how much, is searched besides
    """

    title: str
    about: str
    kind: Literal["ablation", "ara", "fixed"] = "ablation"
    mode: EditMode = "full"
    recipe: Recipe = MEAN
    affine: bool = False
    router: bool = False


METHODS: dict[MethodName, Method] = {
    "mpoa": Method(
        "MPOA, rows",
        "Magnitude-preserving orthogonal ablation; row norms kept, direction off the harmless "
        "mean. The default.",
    ),
    "mpoa_columns": Method(
        "MPOA, columns", "As its author codes it: column norms kept.", mode="columns"
    ),
    "pre": Method("Normalised rows", "Ablation of the row-normalised weight.", mode="pre"),
    "ablate": Method(
        "Plain ablation", "The orthogonalisation of Arditi et al. 2024, norms not kept.",
        mode="none",
    ),
    "raw": Method(
        "MPOA, unprojected", "MPOA with the plain difference of means.", recipe=RAW
    ),
    "biprojected": Method(
        "Biprojected", "Directions off the harmless mean of the layer that is edited, too.",
        recipe=Recipe(projection="biprojected"),
    ),
    "median": Method(
        "Geometric median", "Robust centers instead of means.", recipe=Recipe(center="median")
    ),
    "winsorized": Method(
        "Winsorised", "Massive activations are clamped before the means.",
        recipe=Recipe(winsorize=0.995),
    ),
    "svd": Method(
        "Several directions, SVD", "The difference of means and two further singular vectors.",
        recipe=Recipe(subspace="svd", count=3),
    ),
    "som": Method(
        "Several directions, SOM", "Directions to the nodes of a self-organising map.",
        recipe=Recipe(subspace="som", count=4),
    ),
    "affine": Method(
        "Affine", "The component becomes its harmless mean instead of zero.",
        mode="none", affine=True,
    ),
    "router": Method(
        "MPOA and router",
        "MPOA, and fewer tokens to the experts that harmful prompts choose; for mixtures of "
        "experts whose routers have a bias.",
        router=True,
    ),
    "ara": Method(
        "ARA", "Arbitrary-rank ablation: each writer is optimised, no direction is assumed.",
        kind="ara",
    ),
    "deccp": Method(
        "Single pass", "One direction at 0.6 of the depth on all layers, after DECCP and "
        "ErisForge; no search.",
        kind="fixed", mode="none", recipe=RAW,
    ),
    "arditi": Method(
        "Single pass, selected", "The original paper's choice among positions and layers by "
        "first-token log-odds, KL and an induction test; no search.",
        kind="fixed", mode="none", recipe=RAW,
    ),
}  # fmt: skip


def turn(methods: Sequence[MethodName], number: int) -> tuple[MethodName, int]:
    """The method of trial `number` and the trial's number within that method.

    Fixed methods have the first numbers, one each; the others take turns, so that all have the
    same budget and more trials may be added later.

    turn(["mpoa", "ara", "deccp"], 0)   # ("deccp", 0)
    turn(["mpoa", "ara", "deccp"], 3)   # ("mpoa", 1)
    """
    fixed = [name for name in methods if METHODS[name].kind == "fixed"]
    searched = [name for name in methods if METHODS[name].kind != "fixed"]
    if number < len(fixed):
        return fixed[number], 0
    if not searched:
        raise ValueError(f"{len(fixed)} fixed methods have no trial {number}")
    place = number - len(fixed)
    return searched[place % len(searched)], place // len(searched)


def budget(methods: Sequence[MethodName], trials: int) -> int:
    """The trials that a job really has: one per method where none is searched."""
    if all(METHODS[name].kind == "fixed" for name in methods):
        return len(methods)
    return max(trials, len(methods))


def share(methods: Sequence[MethodName], trials: int, method: MethodName) -> int:
    """How many of the first `trials` trials are of `method`: what `turn` gives it."""
    fixed = [name for name in methods if METHODS[name].kind == "fixed"]
    if method in fixed:
        return int(fixed.index(method) < trials)
    if method not in methods:
        return 0
    searched = [name for name in methods if METHODS[name].kind != "fixed"]
    whole, rest = divmod(max(0, trials - len(fixed)), len(searched))
    return whole + (searched.index(method) < rest)


def recipes(methods: Sequence[MethodName]) -> list[Recipe]:
    """The directions that candidates of these methods ask for, each once.

    `arditi` chooses among the last POSITIONS prompt tokens, so it needs one recipe for each.
    """
    found: list[Recipe] = []
    for name in methods:
        method = METHODS[name]
        if name == "arditi":
            found += [method.recipe.model_copy(update={"position": p}) for p in POSITIONS]
        elif method.kind != "ara":
            found.append(method.recipe)
    return list(dict.fromkeys(found))


def needs_ara(methods: Sequence[MethodName]) -> bool:
    """Whether some candidates will be of arbitrary rank."""
    return any(METHODS[name].kind == "ara" for name in methods)


def needs_affine(methods: Sequence[MethodName]) -> bool:
    """Whether some candidates will be affine: the writers' harmless means must be measured."""
    return any(METHODS[name].affine for name in methods)


def needs_router(methods: Sequence[MethodName]) -> bool:
    """Whether some candidates will suppress experts: the routers must be found and watched."""
    return any(METHODS[name].router for name in methods)
