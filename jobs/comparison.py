"""The methods of a job side by side, each by its own trials."""

from __future__ import annotations

import uuid
from typing import cast

from pydantic import BaseModel, Field
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from jobs import fronts, trials
from jobs.listing import RoleScores
from jobs.spec.job import JobSpec
from jobs.spec.methods import METHODS, MethodName, share
from jobs.spec.scores import Scores
from jobs.tables import Job, Trial
from jobs.trial_scores import search_scores


class MethodBest(BaseModel):
    """A method's best pick: the rule of `nullspace run --pick best` on its own front."""

    number: int
    picked: bool
    search: RoleScores
    heldout: RoleScores | None


class MethodReport(BaseModel):
    """What one method of a job has come to."""

    method: MethodName
    title: str
    about: str
    complete: int = Field(description="trials scored")
    budget: int = Field(description="trials that it will have")
    front: list[int] = Field(description="trials that no other trial of the method dominates")
    hypervolume: float | None = Field(
        description="area that its trials dominate: refusal rate 0..1 by first-token KL 0..0.1 "
        "nats, on the search prompts; 1 is perfect"
    )
    best: MethodBest | None
    seconds: float | None = Field(description="mean seconds of a trial")


def compare(session: Session, job: Job) -> list[MethodReport]:
    """One report per method, in the order of the job's specification; none without a search."""
    spec = JobSpec.model_validate(job.spec)
    methods = spec.methods if spec.kind == "abliterate" else []
    by_front = trials.fronts_by_method(session, job.id)
    points = _points(session, job.id)
    seconds = _seconds(session, job.id)
    found = []
    for name in methods:
        mine = points.get(name, [])
        found.append(
            MethodReport(
                method=name,
                title=METHODS[name].title,
                about=METHODS[name].about,
                complete=len(mine),
                budget=share(methods, job.trials, name),
                front=[row.number for row in by_front.get(name, [])],
                hypervolume=fronts.hypervolume(mine) if mine else None,
                best=_best(by_front.get(name, [])),
                seconds=seconds.get(name),
            )
        )
    return found


def pick(front: list[Trial]) -> Trial | None:
    """The trial that `fronts.best` chooses, by held-out figures where there are any."""
    rows = sorted(front, key=lambda row: row.number)
    return rows[fronts.best([_figures(row) for row in rows])] if rows else None


def _figures(row: Trial) -> tuple[float, float]:
    scores = Scores.model_validate(row.heldout) if row.heldout else search_scores(row)
    if scores is None:
        return 1.0, float("inf")
    return scores.refusals / max(1, scores.total), scores.kl_first or 0.0


def _best(front: list[Trial]) -> MethodBest | None:
    row = pick(front)
    search = RoleScores.of(search_scores(row)) if row is not None else None
    if row is None or search is None:
        return None
    return MethodBest(
        number=row.number, picked=row.picked, search=search, heldout=RoleScores.of(row.heldout)
    )


def _points(session: Session, job_id: uuid.UUID) -> dict[str, list[tuple[float, float]]]:
    """(refusal rate, first-token KL) of every complete trial, by method; NaN: dominates nothing."""
    found: dict[str, list[tuple[float, float]]] = {}
    for method, refusals, total, kl, screened in session.execute(
        select(Trial.method, Trial.refusals, Trial.total, Trial.kl_first, Trial.screened).where(
            Trial.job_id == job_id, Trial.state == "complete"
        )
    ):
        known = float("nan") if kl is None or screened else float(kl)
        point = ((refusals or 0) / max(1, total or 0), known)
        found.setdefault(method, []).append(point)
    return found


def _seconds(session: Session, job_id: uuid.UUID) -> dict[str, float]:
    rows = session.execute(
        select(Trial.method, func.avg(Trial.seconds))
        .where(Trial.job_id == job_id, Trial.state == "complete", Trial.seconds.is_not(None))
        .group_by(Trial.method)
    )
    return {method: float(cast(float, mean)) for method, mean in rows}
