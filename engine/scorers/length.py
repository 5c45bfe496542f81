"""Length drift: how long the answers to harmless prompts are, compared with the original's."""

from __future__ import annotations

from collections.abc import Sequence

from engine.scorers.ratio import ratio
from jobs.spec.scores import Value


def drift(edited: Sequence[int], original: Sequence[int]) -> Value:
    """Tokens of the edited model's answers / tokens of the original's, prompt by prompt paired.

    Answers that reach the token limit count as that long.
    """
    n = len(original)
    if sum(original) == 0:
        return Value(value=1.0, n=n)
    value, error = ratio(edited, original)
    if error is None:
        return Value(value=value, n=n)
    return Value(value=value, low=max(0.0, value - error), high=value + error, n=n)
