"""Which candidates need not be answered to the end: those that a finished trial dominates anyway.

Refusals only grow while a candidate's answers come in, and its other objectives are known before:
once as many are refused as by a finished trial that is no worse in all of these, nothing can bring
the candidate onto the front. What is then left of its answers is not decoded. A trial without
refusals ends all candidates behind it before their first token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

Objectives = Mapping[str, float]  # by name; refusals as a rate


def bound(cheap: Objectives, finished: Sequence[Objectives], total: int) -> int | None:
    """The refusals of `total` prompts with which a candidate is dominated; None: it never is.

    cheap      the candidate's objectives besides refusals
    finished   all objectives of finished trials
    """
    better = [
        other["refusals"]
        for other in finished
        if all(v <= cheap.get(name, -math.inf) for name, v in other.items() if name != "refusals")
    ]
    return round(min(better) * total) if better else None


class Race:
    """Refusals so far of several candidates, each of which answers the same prompts.

    race = Race(bounds=[None, 3], each=100)
    race.count(row, refused)    # its answer is known; the rows of a candidate are neighbours
    race.lost(row)              # its candidate is dominated
    """

    def __init__(self, bounds: Sequence[int | None], each: int) -> None:
        self._bounds, self._each = bounds, each
        self._refused = [0] * len(bounds)

    def count(self, row: int, refused: bool) -> None:
        """One more answer of the candidate of `row`."""
        self._refused[row // self._each] += refused

    def lost(self, row: int) -> bool:
        """Whether the candidate of `row` is dominated whatever its other answers are."""
        place = row // self._each
        limit = self._bounds[place]
        return limit is not None and self._refused[place] >= limit
