"""The methods of a job side by side, as the job's page shows them."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from jobs.comparison import MethodReport
from web import plots
from web.views import scores
from web.views.scores import Score


@dataclass(frozen=True)
class Row:
    """One line of the comparison. `heldout` is None until the front has been checked."""

    title: str
    about: str
    mark: Markup
    complete: int
    budget: int
    front: int
    hypervolume: float | None
    number: int | None
    href: str
    search: Score | None
    heldout: Score | None
    seconds: float | None

    @property
    def shown(self) -> Score | None:
        """The best trial's scores: on held-out prompts, where they were measured."""
        return self.heldout or self.search


def has_several(rows: Iterable[Row]) -> bool:
    """Whether a KL over several tokens is known of any best trial."""
    return any(row.shown is not None and row.shown.kl_multi is not None for row in rows)


def rows(job_id: uuid.UUID, reports: Sequence[MethodReport]) -> list[Row]:
    """A line per method, in the order of the specification, which also gives its mark."""
    return [_row(job_id, place, report) for place, report in enumerate(reports)]


def marks(compared: Sequence[str], others: Iterable[str] = ()) -> dict[str, Markup]:
    """The mark of each method in a box of 16 × 16; `others`, which are not compared, get a dot."""
    found = {name: plots.shape(None, 8, 8, 5.5) for name in others}
    return found | {name: plots.shape(at, 8, 8, 5.5) for at, name in enumerate(compared)}


def _row(job_id: uuid.UUID, place: int, report: MethodReport) -> Row:
    best = report.best
    heldout = best.heldout if best is not None else None
    return Row(
        title=report.title,
        about=report.about,
        mark=plots.shape(place, 8, 8, 5.5),
        complete=report.complete,
        budget=report.budget,
        front=len(report.front),
        hypervolume=report.hypervolume,
        number=best.number if best is not None else None,
        href=f"/jobs/{job_id}/trials/{best.number}" if best is not None else "",
        search=scores.score(best.search.model_dump()) if best is not None else None,
        heldout=scores.score(heldout.model_dump()) if heldout is not None else None,
        seconds=report.seconds,
    )
