"""A candidate in words."""

from __future__ import annotations

from jobs.spec.candidate import Ablation, Ara, Candidate, Recipe
from web.views.facts import Fact

MODES = {
    "none": "none: the component is removed as it stands",
    "pre": "pre: removed from rows of length one",
    "full": "full: removed, rows keep their length",
    "columns": "columns: removed, columns keep their length",
}
PROJECTIONS = {
    "none": "no",
    "projected": "off the harmless mean of the layer where it is measured",
    "biprojected": "off the harmless means of the layers where it is measured and used",
}
SUBSPACES = {"single": "one", "svd": "by singular vectors", "som": "by a self-organising map"}


def parameter_facts(candidate: Candidate) -> list[Fact]:
    """The edit in words."""
    return _ara(candidate) if isinstance(candidate, Ara) else _ablation(candidate)


def _ablation(candidate: Ablation) -> list[Fact]:
    facts = [
        Fact("Edit mode", MODES[candidate.mode]),
        Fact(
            "Direction",
            "one for all layers" if candidate.scope == "global" else "one for each layer",
            f"taken at layer {candidate.index:.2f}"
            if candidate.scope == "global" and candidate.index is not None
            else "",
        ),
        *_recipe(candidate.recipe),
    ]
    if candidate.affine:
        facts.append(Fact("Affine", "yes", "set to the harmless mean instead of zero"))
    if candidate.router is not None:
        facts.append(
            Fact(
                "Routers",
                f"− {candidate.router.bias:.3g}",
                f"from the bias of {candidate.router.experts} experts of a layer, those that "
                "harmful prompts choose more often",
            )
        )
    for name, kernel in (("Attention", candidate.attention), ("MLP", candidate.mlp)):
        if kernel.max_weight == 0 and kernel.min_weight == 0:
            facts.append(Fact(f"{name} λ", "0", "left alone"))
        elif kernel.distance >= 1e6:
            facts.append(Fact(f"{name} λ", f"{kernel.max_weight:.2f}", "on every layer"))
        else:
            facts.append(
                Fact(
                    f"{name} λ",
                    f"{kernel.max_weight:.2f} to {kernel.min_weight:.2f}",
                    f"most at layer {kernel.position:.1f}, over ± {kernel.distance:.1f} layers",
                )
            )
    return facts


def _recipe(recipe: Recipe) -> list[Fact]:
    """How the directions were made; what is usual is left out, but for the projection."""
    facts = [Fact("Projected", PROJECTIONS[recipe.projection])]
    if recipe.center == "median":
        facts.append(Fact("Centers", "geometric medians"))
    if recipe.winsorize is not None:
        facts.append(Fact("Winsorised", f"at the quantile {recipe.winsorize:g} of each state"))
    if recipe.subspace != "single":
        facts.append(Fact("Directions", f"at most {recipe.count}", SUBSPACES[recipe.subspace]))
    if recipe.position != -1:
        facts.append(Fact("Measured at", f"prompt token {recipe.position}", "-1 is the last one"))
    return facts


def _ara(candidate: Ara) -> list[Fact]:
    return [
        Fact("Layers", f"{candidate.start} to {candidate.end - 1}", "each writer is optimised"),
        Fact("Preserve p", f"{candidate.preserve:.3g}", "leave harmless outputs alone"),
        Fact("Steer q", f"{candidate.steer:.3g}", "move harmful outputs among the harmless ones"),
        Fact("Overshoot ω", f"{candidate.overshoot:.3g}", "and away from where they were"),
        Fact("Neighbours k", f"{candidate.neighbours}", "whose distances count"),
        Fact("Rank", "whole" if candidate.rank is None else f"cut to {candidate.rank}"),
    ]
