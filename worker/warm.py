"""Which slots of a job are for warm starts, and how a point is made to fit its space. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution

from jobs import warm
from jobs.spec.methods import METHODS, MethodName, turn
from worker.space import plain_number


def places(methods: Sequence[MethodName], trials: int) -> dict[MethodName, list[int]]:
    """For each searched method the job's trial numbers right behind its plain point.

    places(["mpoa"], 200)   # {"mpoa": [2, 3, 4, 5]}
    """
    found: dict[MethodName, list[int]] = {
        name: [] for name in methods if METHODS[name].kind != "fixed"
    }
    for number in range(min(trials, len(methods) * (warm.MOST + 2))):
        method, own = turn(methods, number)
        behind = method in found and own > plain_number(method)
        if behind and len(found[method]) < warm.limit(methods, trials, method):
            found[method].append(number)
    return found


def fitted(
    params: Mapping[str, Any], table: Mapping[str, BaseDistribution], usual: Mapping[str, Any]
) -> dict[str, Any]:
    """The nearest point of a space; what it knows no value for is as in the point `usual`."""
    return {name: _nearest(params.get(name), each, usual[name]) for name, each in table.items()}


def _nearest(value: Any, distribution: BaseDistribution, usual: Any) -> Any:
    if isinstance(value, int | float):
        match distribution:
            case FloatDistribution(low=low, high=high):
                return min(max(float(value), low), high)
            case IntDistribution(low=low, high=high):
                return min(max(round(value), low), high)
    known = isinstance(value, str) and value in getattr(distribution, "choices", ())
    return value if known else usual
