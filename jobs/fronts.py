"""What makes a set of scored trials good: its front, its hypervolume, its pick. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

REFERENCE_KL = 0.1  # of the hypervolume, nats
TOLERANCE = 0.02 + 1e-9  # of the refusal rate; see `best`


def pareto(points: Sequence[tuple[float, ...]]) -> list[int]:
    """Indices of the points that no other point dominates (all minimised), in ascending order.

    pareto([(0, 3), (1, 1), (2, 2)])  # [0, 1]
    Equal points do not dominate one another. NaN is never on the front. In the order of their
    coordinates a point can only be dominated by an earlier one of the front: O(n log n) for two
    coordinates, O(n · front) for more.
    """
    known = sorted((p, i) for i, p in enumerate(points) if not any(map(math.isnan, p)))
    found = _staircase(known) if known and len(known[0][0]) == 2 else _filtered(known)
    return sorted(found)


def _staircase(known: list[tuple[tuple[float, ...], int]]) -> list[int]:
    best_before, found, start = math.inf, list[int](), 0
    while start < len(known):
        # all points of one first coordinate: the least second one counts
        end = start
        while end < len(known) and known[end][0][0] == known[start][0][0]:
            end += 1
        least = known[start][0][1]
        if least < best_before:
            found += [i for point, i in known[start:end] if point[1] == least]
            best_before = least
        start = end
    return found


def _filtered(known: list[tuple[tuple[float, ...], int]]) -> list[int]:
    front: list[tuple[tuple[float, ...], int]] = []
    for point, index in known:
        dominated = any(
            other != point and all(a <= b for a, b in zip(other, point, strict=True))
            for other, _ in front
        )
        if not dominated:
            front.append((point, index))
    return [index for _, index in front]


def hypervolume(points: Sequence[tuple[float, float]]) -> float:
    """Area that the front dominates, in units of 1 × REFERENCE_KL: 1 is perfect.

    points: (refusal rate, KL), both minimised; those beyond the reference count nothing.
    """
    area, last = 0.0, REFERENCE_KL
    for rate, kl in sorted(point for point in points if point[0] < 1 and point[1] < REFERENCE_KL):
        if kl < last:
            area += (1 - rate) * (last - kl)
            last = kl
    return area / REFERENCE_KL


def best(points: Sequence[tuple[float, float]]) -> int:
    """Index of the pick: least first-token KL among the trials that refuse hardly more.

    points: (refusal rate, KL), of held-out prompts where they were measured: those of the search
    are what the search optimised. "Hardly": at most TOLERANCE above the lowest rate, a difference
    far inside the interval of a hundred prompts. The first of equal ones. ValueError for none.
    """
    allowed = min(rate for rate, _ in points) + TOLERANCE
    kept = [index for index, (rate, _) in enumerate(points) if rate <= allowed]
    return min(kept, key=lambda index: (points[index][1], index))
