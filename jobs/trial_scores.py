"""The scores in a trial's row, and which rows form a front. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from jobs import fronts
from jobs.spec.scorers import ALWAYS
from jobs.spec.scores import Scores
from jobs.tables import Trial


def front_of(rows: Iterable[Trial], objectives: Sequence[str]) -> list[Trial]:
    """The rows that no other one dominates, the best by the first objective first.

    Never a screened one: what is known of its refusals is a lower bound.
    """
    scored = [
        (found, row)
        for row in rows
        if not row.screened and (found := objectives_of(row, objectives)) is not None
    ]
    kept = [scored[index] for index in fronts.pareto([point for point, _ in scored])]
    return [row for _, row in sorted(kept, key=lambda pair: (pair[0], pair[1].number))]


def objectives_of(row: Trial, names: Sequence[str]) -> tuple[float, ...] | None:
    """What a search minimises, of a scored trial; None where one is missing or not finite.

    Of a screened trial the refusals are the fewest that it can have: those of its few answers.
    """
    found = tuple(score_of(row, name) for name in names)
    known = tuple(value for value in found if value is not None and math.isfinite(value))
    return known if len(known) == len(found) else None


def score_of(row: Trial, name: str) -> float | None:
    """One score on the search prompts, as `Scores.value` would give it."""
    if name in ALWAYS:
        found = getattr(row, name)
    else:
        found = ((row.values or {}).get(name) or {}).get("value")
    return None if found is None else float(found)


def search_scores(row: Trial) -> Scores | None:
    """The scores on the search prompts, which a trial keeps in columns of its own."""
    if row.refusals is None or row.total is None:
        return None
    return Scores(
        role="search",
        refusals=row.refusals,
        total=row.total,
        kl_first=row.kl_first,
        kl_multi=row.kl_multi,
        mean_tokens=row.mean_tokens or 0.0,
        values=row.values or {},
    )


def further(scores: Scores) -> dict[str, Any]:
    """The further scores as JSON, without those that are no number."""
    return {
        name: value.model_dump(mode="json")
        for name, value in scores.values.items()
        if math.isfinite(value.value)
    }
