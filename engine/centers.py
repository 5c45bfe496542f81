"""The middle of a cloud of states: mean or geometric median, with or without winsorising."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.change import norm
from jobs.spec.candidate import Recipe

STEPS = 1000  # of Weiszfeld's iteration, at most
STEADY = 1e-10  # it ends when a step is this share of the cloud's radius


def center(h: Tensor, recipe: Recipe) -> Tensor:
    """The middle (d) of states h (N, d) by `recipe.center`; float64."""
    return geometric_median(h) if recipe.center == "median" else h.mean(0, dtype=torch.float64)


def winsorized(h: Tensor, quantile: float) -> Tensor:
    """h (N, d) with |h| of each row clamped at that quantile of the row's |entries|.

    A few massive activations (Sun et al. 2024, arXiv 2402.17762) would otherwise decide a mean. The
    quantile is interpolated linearly between order statistics, as numpy does by default.
    """
    ordered = h.abs().sort(dim=-1).values
    place = quantile * (h.shape[-1] - 1)
    low = int(place)
    high = min(low + 1, h.shape[-1] - 1)
    limit = torch.lerp(ordered[:, low], ordered[:, high], place - low)[:, None]
    return h.clamp(-limit, limit)


def geometric_median(points: Tensor) -> Tensor:
    """The point (d) with the least sum of distances to `points` (N, d); float64.

    Weiszfeld's iteration as Vardi and Zhang (2000) mended it for an iterate that equals some of the
    points: those are left out of the weighted mean T, and the step to T is shortened by
    γ = min(1, η / ‖Σ (x − y)/‖x − y‖‖), η of them; γ = 1 proves the iterate the median.
    """
    X = points.double()
    y = X.mean(0)
    radius = float(norm(X - y, 1).max())
    for _ in range(STEPS):
        away = norm(X - y, 1)
        apart = away > 1e-14 * radius
        if not apart.any():
            return y
        inverse = torch.where(apart, 1 / away.clamp_min(1e-300), 0.0)
        mean = inverse @ X / inverse.sum()
        equal = len(X) - int(apart.sum())
        if equal:
            pull = float(norm(inverse @ (X - y), 0))
            gamma = min(1.0, equal / pull) if pull > 0 else 1.0
            mean = (1 - gamma) * mean + gamma * y
        step = float(norm(mean - y, 0))
        y = mean
        if step <= STEADY * radius:
            break
    return y
