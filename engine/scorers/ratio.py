"""A ratio of two sums over independent samples, with its 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jobs.spec.scores import Z


def ratio(tops: Sequence[float], bottoms: Sequence[float]) -> tuple[float, float | None]:
    """(R, half-width of its interval), R = Σt/Σb of paired samples; no width for a single one.

    z·√(Σ(t_i − R b_i)² / (n − 1) / n) / b̄: the linearised variance of a ratio (Cochran 1977,
    section 2.11). Σb must not be 0.
    """
    n, total = len(bottoms), sum(bottoms)
    value = sum(tops) / total
    if n < 2:
        return value, None
    rests = sum((t - value * b) ** 2 for t, b in zip(tops, bottoms, strict=True))
    return value, Z * math.sqrt(rests / (n - 1) / n) / (total / n)
