"""Directions of refusal in the residual stream (ENGINE.md, "Directions").

Arditi et al. 2024 (arXiv 2406.11717): difference of means. Lai 2025, "projected abliteration": the
part along the harmless mean is taken out. Piras et al. 2025 (arXiv 2511.08379): several directions
by a self-organising map. See `jobs.spec.candidate.Recipe` for all that may be chosen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.centers import center, winsorized
from engine.change import norm
from engine.errors import EngineError
from engine.report import Report
from engine.subspace import interpolated, orthonormal, self_organising_map, singular, without
from jobs.spec.candidate import Ablation, Recipe


def unit(v: Tensor) -> Tensor:
    """`v` (..., d) scaled to length 1; a zero vector stays zero."""
    return v / norm(v, -1)[..., None].clamp_min(1e-30)


@dataclass(frozen=True)
class Axes:
    """The directions of one recipe, float32.

    vectors (L, k, d)  after each block, rows orthonormal or zero: [l] is of the state l + 1
    good (L, d)        the harmless center there, not normalised
    gap (L)            how far the harmful center is from it
    """

    vectors: Tensor
    good: Tensor
    gap: Tensor


class Directions:
    """The directions of all recipes that were prepared."""

    def __init__(self, table: dict[Recipe, Axes]) -> None:
        self._table = table
        first = next(iter(table.values())).vectors
        self.layers, self.hidden = first.shape[0], first.shape[2]

    def axes(self, recipe: Recipe) -> Axes:
        """The directions of `recipe`. Raises `bad_request` for one that was not prepared."""
        if recipe not in self._table:
            raise EngineError(
                "bad_request",
                f"recipe: directions by {recipe.model_dump_json()} were not prepared",
                "Name the recipe when preparing.",
            )
        return self._table[recipe]

    def place(self, candidate: Ablation) -> tuple[int, int, float] | None:
        """⌊i⌋, the layer after it and f = i − ⌊i⌋ of a global index; None for scope `per_layer`."""
        if candidate.scope == "per_layer":
            return None
        i = candidate.index
        if i is None or not 0 <= i <= self.layers - 1:
            raise EngineError(
                "bad_request",
                f"index: {i} is not a layer index of a model with {self.layers} layers",
                f"Give a number from 0 to {self.layers - 1}, or use scope per_layer.",
            )
        low = math.floor(i)
        return low, min(low + 1, self.layers - 1), i - low

    def mixture(self, candidate: Ablation) -> tuple[int, int, float, float] | None:
        """How one global direction is made of two layers' (a, b): wa·r_a + wb·r_b.

        v = normalise((1−f) r_{⌊i⌋+1} + f r_{⌊i⌋+2}), f = i − ⌊i⌋. None for scope `per_layer`.
        """
        place = self.place(candidate)
        if place is None:
            return None
        low, high, f = place
        rows = self.axes(candidate.recipe).vectors[:, 0]
        length = max(float(norm((1 - f) * rows[low] + f * rows[high], -1)), 1e-30)
        return low, high, (1 - f) / length, f / length

    def of(self, candidate: Ablation) -> Tensor:
        """V (L, k, d) of every layer's writers under `candidate`, float32."""
        axes = self.axes(candidate.recipe)
        place = self.place(candidate)
        if place is None:  # measured where it is used: biprojected is projected
            return axes.vectors
        low, high, f = place
        if axes.vectors.shape[1] > 1:
            V = interpolated(axes.vectors[low], axes.vectors[high], f)
        else:
            V = unit((1 - f) * axes.vectors[low] + f * axes.vectors[high])
        if candidate.recipe.projection != "biprojected":
            return V.float().expand(self.layers, -1, -1)
        V, good = V.double(), unit(axes.good.double())
        return torch.stack([orthonormal(without(V, g), len(V)) for g in good]).float()


def measure(
    harmful: Mapping[int, Tensor],
    harmless: Mapping[int, Tensor],
    recipes: Sequence[Recipe] = (Recipe(),),
    report: Report | None = None,
) -> Directions:
    """Directions from residuals of both sides: prompt position -> (N, L+1, d); in float64.

    Without a recipe (a job of ARA alone) the default one is measured: bad prompts show there.
    Raises `bad_prompts` where the two centers coincide after any block at the last position, and
    `engine_failed` where the states hold NaN. At earlier positions, where prompts may still be
    alike, coinciding centers give zero directions.
    """
    wanted = dict.fromkeys(recipes or (Recipe(),))
    table: dict[Recipe, Axes] = {}
    for recipe in wanted:
        bad, good = _known(harmful, recipe), _known(harmless, recipe)
        table[recipe] = _axes(bad, good, recipe, report)
    return Directions(table)


def _known(states: Mapping[int, Tensor], recipe: Recipe) -> Tensor:
    if recipe.position not in states:
        raise EngineError("bad_request", f"position: no states of position {recipe.position}")
    return states[recipe.position]


def _axes(harmful: Tensor, harmless: Tensor, recipe: Recipe, report: Report | None) -> Axes:
    # State 0 is the last token's embedding: the template ends alike for all prompts, so the sides
    # may coincide there; blocks 1..L must differ.
    layers = []
    for state in range(1, harmful.shape[1]):
        if report is not None:
            report.progress("directions", state - 1, harmful.shape[1] - 1)
        layers.append(_layer(harmful[:, state].double(), harmless[:, state].double(), recipe))
    vectors, good, gap = (torch.stack(parts).float() for parts in zip(*layers, strict=True))
    return Axes(vectors, good, gap)


def _layer(bad: Tensor, good: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor, Tensor]:
    """V (k, d), the harmless center (d) and the gap, of the states (N, d) after one block."""
    if not (torch.isfinite(bad).all() and torch.isfinite(good).all()):
        raise EngineError(
            "engine_failed",
            "the model's hidden states hold NaN or infinity",
            "Choose dtype bfloat16 or float32.",
        )
    if recipe.winsorize is not None:
        bad, good = (winsorized(side, recipe.winsorize) for side in (bad, good))
    middle, origin = center(bad, recipe), center(good, recipe)
    difference = middle - origin
    gap = norm(difference, 0)
    if not gap > 0 and recipe.position == -1:
        raise EngineError(
            "bad_prompts",
            "harmful and harmless prompts give the same hidden states",
            "The two direction prompt sets must differ; check that they are not the same file.",
        )
    axis = torch.zeros_like(origin) if recipe.projection == "none" else unit(origin)
    count = 1 if recipe.subspace == "single" else recipe.count
    first = without(difference, axis)[None]
    deviations = without(bad - origin, axis)
    if recipe.subspace == "single":
        rows = first
    elif recipe.subspace == "svd":
        rows = torch.cat([first, singular(without(deviations, unit(first[0])), count - 1)])
    else:
        nodes, wins = self_organising_map(deviations)
        order = wins.argsort(descending=True, stable=True)
        rows = nodes[order[wins[order] > 0]]
    return orthonormal(rows, count), origin, gap
