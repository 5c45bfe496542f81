"""Points of a search space as points of the unit cube, for samplers that compute with numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

Points = NDArray[np.float64]
Numeric: TypeAlias = FloatDistribution | IntDistribution


def encode(params: Mapping[str, Any], table: Mapping[str, BaseDistribution]) -> Points:
    """(len(table),) in 0..1, in the table's order.

    Numbers lie between their ends, on a log scale where the distribution has one; categories at
    equal distances.
    """
    return np.array([_to_unit(table[name], params[name]) for name in table])


def decode(point: Points, table: Mapping[str, BaseDistribution]) -> dict[str, Any]:
    """The nearest point of the space; what lies outside of the cube is moved to its border."""
    units = np.clip(point, 0.0, 1.0)
    return {name: _from_unit(table[name], float(u)) for name, u in zip(table, units, strict=True)}


def _to_unit(distribution: BaseDistribution, value: Any) -> float:
    match distribution:
        case CategoricalDistribution():
            return distribution.choices.index(value) / max(1, len(distribution.choices) - 1)
        case FloatDistribution() | IntDistribution():
            low, high = _ends(distribution)
            here = math.log(value) if distribution.log else float(value)
            return (here - low) / (high - low) if high > low else 0.5
    raise TypeError(f"no number for a {type(distribution).__name__}")


def _from_unit(distribution: BaseDistribution, unit: float) -> Any:
    match distribution:
        case CategoricalDistribution():
            return distribution.choices[round(unit * (len(distribution.choices) - 1))]
        case FloatDistribution() | IntDistribution():
            low, high = _ends(distribution)
            here = low + unit * (high - low)
            value = math.exp(here) if distribution.log else here
            if isinstance(distribution, IntDistribution):
                value = round(value)
            return min(max(value, distribution.low), distribution.high)
    raise TypeError(f"no number for a {type(distribution).__name__}")


def _ends(distribution: Numeric) -> tuple[float, float]:
    low, high = float(distribution.low), float(distribution.high)
    return (math.log(low), math.log(high)) if distribution.log else (low, high)
