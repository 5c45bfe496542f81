"""The search spaces (ENGINE.md): tables of distributions, and parameters to candidate. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from jobs.spec.candidate import (
    COMPONENTS,
    Ablation,
    Ara,
    Candidate,
    Kernel,
    Router,
    single_pass,
)
from jobs.spec.methods import METHODS, MethodName

SCOPES = ("global", "per_layer")
RANK = 64  # of ARA's changes: whole ones score the same and take 7 times the memory at 8B width
MOST_EXPERTS = 8  # per layer that are suppressed
BIAS = (0.01, 10.0)  # next to nothing, to never chosen: of scores within 0..1, of logits
PLAIN_ROUTER = Router(experts=4, bias=0.3)  # the middle of the ranges
LEAST_MAX_WEIGHT = {"attention": 0.8, "mlp": -0.25}  # below 0: the component is switched off


def space(layers: int, method: MethodName) -> dict[str, BaseDistribution]:
    """Name → distribution for a model of `layers` layers. Every trial has every parameter.

    ValueError for a fixed method: nothing is searched there.
    """
    match METHODS[method].kind:
        case "ablation":
            return _kernels(layers) | (_router() if METHODS[method].router else {})
        case "ara":
            return _ranges(layers)
        case "fixed":
            raise ValueError(f"{method} is not searched")


def _kernels(layers: int) -> dict[str, BaseDistribution]:
    """`index` counts in trials of scope global only; it is drawn always, because multivariate TPE
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
    return table


def _router() -> dict[str, BaseDistribution]:
    return {
        "router.experts": IntDistribution(1, MOST_EXPERTS),
        "router.bias": FloatDistribution(*BIAS, log=True),
    }


def _ranges(layers: int) -> dict[str, BaseDistribution]:
    return {
        "start": IntDistribution(0, layers // 2),
        "end": IntDistribution((layers + 1) // 2, layers),
        "preserve": FloatDistribution(0.0, 1.0),
        "steer": FloatDistribution(1e-4, 1.0, log=True),
        "overshoot": FloatDistribution(0.0, 1.3),
        "neighbours": IntDistribution(1, 15),
    }


def candidate_from(params: Mapping[str, Any], layers: int, method: MethodName) -> Candidate:
    """The candidate of a point of `space(layers, method)`."""
    fixed = METHODS[method]
    if fixed.kind == "ara":
        start = int(params["start"])
        return Ara(
            start=start,
            end=max(start + 1, int(params["end"])),  # one layer at least
            preserve=float(params["preserve"]),
            steer=float(params["steer"]),
            overshoot=float(params["overshoot"]),
            neighbours=int(params["neighbours"]),
            rank=RANK,
        )
    scope = params["scope"]
    return Ablation(
        mode=fixed.mode,
        recipe=fixed.recipe,
        affine=fixed.affine,
        scope=scope,
        index=min(max(float(params["index"]), 0.0), layers - 1.0) if scope == "global" else None,
        attention=_kernel("attention", params),
        mlp=_kernel("mlp", params),
        router=_suppression(params) if fixed.router else None,
    )


def first(layers: int, method: MethodName) -> Ablation:
    """The edit without a search: the whole of a fixed method, and trial 0 of each ablation."""
    fixed = METHODS[method]
    router = PLAIN_ROUTER if fixed.router else None
    return single_pass(layers, fixed.mode, fixed.recipe, fixed.affine, router)


def plain(layers: int, method: MethodName) -> dict[str, Any]:
    """A point of the space that asks for no luck: the first of the points that are scored.

    Ablation: λ = 1 on every layer, each with its own direction. With position = distance =
    0.6 · last the kernel reaches from layer 0 beyond the last one. ARA: all layers, the middle of
    the ranges.
    """
    if METHODS[method].kind == "ara":
        return {
            "start": 0,
            "end": layers,
            "preserve": 0.5,
            "steer": 0.01,
            "overshoot": 0.65,
            "neighbours": 8,
        }
    last = float(layers - 1)
    params: dict[str, Any] = {"scope": "per_layer", "index": 0.6 * last}
    for name in COMPONENTS:
        params[f"{name}.max_weight"] = 1.0
        params[f"{name}.position"] = 0.6 * last
        params[f"{name}.min_fraction"] = 1.0
        params[f"{name}.distance"] = max(1.0, 0.6 * last)
    if METHODS[method].router:
        params["router.experts"] = PLAIN_ROUTER.experts
        params["router.bias"] = PLAIN_ROUTER.bias
    return params


def plain_number(method: MethodName) -> int:
    """Which of the method's own trials is the plain point; an ablation's single pass is its 0."""
    return 0 if METHODS[method].kind == "ara" else 1


def _kernel(component: str, params: Mapping[str, Any]) -> Kernel:
    strongest = max(0.0, float(params[f"{component}.max_weight"]))
    return Kernel(
        max_weight=strongest,
        min_weight=strongest * float(params[f"{component}.min_fraction"]),
        position=float(params[f"{component}.position"]),
        distance=float(params[f"{component}.distance"]),
    )


def _suppression(params: Mapping[str, Any]) -> Router:
    return Router(experts=int(params["router.experts"]), bias=float(params["router.bias"]))
