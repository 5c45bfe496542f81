"""Length drift: how long the answers to harmless prompts are, compared with the original's."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jobs.spec.scores import Value

Z = 1.959963984540054


def drift(edited: Sequence[int], original: Sequence[int]) -> Value:
    """Tokens of the edited model's answers / tokens of the original's, prompt by prompt paired.

    R = Σe/Σo with the interval R ± z·√(Σ(e_i − R o_i)² / (n − 1) / n) / ō (linearised variance of a
    ratio, Cochran 1977, section 2.11). Answers that reach the token limit count as that long.
    """
    n, total = len(original), sum(original)
    if n == 0 or total == 0:
        return Value(value=1.0, n=n)
    ratio = sum(edited) / total
    if n == 1:
        return Value(value=ratio, n=n)
    rests = sum((e - ratio * o) ** 2 for e, o in zip(edited, original, strict=True))
    error = Z * math.sqrt(rests / (n - 1) / n) / (total / n)
    return Value(value=ratio, low=max(0.0, ratio - error), high=ratio + error, n=n)
