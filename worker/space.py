"""The search space (ENGINE.md): a table of distributions, and parameters to candidate. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from jobs.spec.candidate import COMPONENTS, Candidate, Kernel
from jobs.spec.job import JobSpec

SCOPES = ("global", "per_layer")
LEAST_MAX_WEIGHT = {"attention": 0.8, "mlp": -0.25}  # below 0: the component is switched off


def space(layers: int, spec: JobSpec) -> dict[str, BaseDistribution]:
    """Name → distribution for a model of `layers` layers. Every trial has every parameter.

    `index` counts in trials of scope global only; it is drawn always, because multivariate TPE
    models the parameters that all trials share.
    """
    last = float(layers - 1)
    table: dict[str, BaseDistribution] = {
        "scope": CategoricalDistribution(SCOPES),
        "index": FloatDistribution(0.4 * last, 0.9 * last),
    }
    for name in COMPONENTS:
        table[f"{name}.max_weight"] = FloatDistribution(LEAST_MAX_WEIGHT[name], 1.5)
        table[f"{name}.position"] = FloatDistribution(0.6 * last, last)
        table[f"{name}.min_fraction"] = FloatDistribution(0.0, 1.0)
        table[f"{name}.distance"] = FloatDistribution(1.0, max(1.0, 0.6 * last))
    if len(spec.modes) > 1:
        table["mode"] = CategoricalDistribution(spec.modes)
    return table


def candidate_from(params: Mapping[str, Any], layers: int, spec: JobSpec) -> Candidate:
    """The candidate of a point of `space(layers, spec)`."""
    scope = params["scope"]
    return Candidate(
        mode=params.get("mode", spec.modes[0]),
        projected=spec.projected,
        scope=scope,
        index=min(max(float(params["index"]), 0.0), layers - 1.0) if scope == "global" else None,
        attention=_kernel("attention", params),
        mlp=_kernel("mlp", params),
    )


def plain(layers: int, spec: JobSpec) -> dict[str, Any]:
    """The plain per-layer edit as a point of the space: λ = 1 on every layer.

    With position = distance = 0.6 · last the kernel reaches from layer 0 beyond the last one.
    """
    last = float(layers - 1)
    params: dict[str, Any] = {"scope": "per_layer", "index": 0.6 * last}
    for name in COMPONENTS:
        params[f"{name}.max_weight"] = 1.0
        params[f"{name}.position"] = 0.6 * last
        params[f"{name}.min_fraction"] = 1.0
        params[f"{name}.distance"] = max(1.0, 0.6 * last)
    if len(spec.modes) > 1:
        params["mode"] = spec.modes[0]
    return params


def _kernel(component: str, params: Mapping[str, Any]) -> Kernel:
    strongest = max(0.0, float(params[f"{component}.max_weight"]))
    return Kernel(
        max_weight=strongest,
        min_weight=strongest * float(params[f"{component}.min_fraction"]),
        position=float(params[f"{component}.position"]),
        distance=float(params[f"{component}.distance"]),
    )
