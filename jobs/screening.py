"""Trials that need not be decoded: a finished trial of their method dominates them anyway.

What a candidate answers costs a search most of its time; its divergence costs one forward. Where
that is no better than a finished trial's, and the finished trial refuses no more than the candidate
at best can, no front will hold the candidate, whatever it answers. The engine decides; here is what
it compares with, and why it decided so. Each method is screened by its own trials alone, because
each shows a front of its own.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Sequence

from sqlalchemy import Select, select
from sqlalchemy.orm import Session, load_only

from jobs.spec.job import JobSpec
from jobs.spec.scorers import SCORERS, ScorerName
from jobs.tables import Trial
from jobs.trial_scores import front_of, score_of

NEEDED = (Trial.number, Trial.screened, Trial.refusals, Trial.total, Trial.kl_first, Trial.kl_multi,
          Trial.values, Trial.finished_at)  # fmt: skip


def applies(spec: JobSpec, origin: str) -> bool:
    """Whether a trial of that origin may be screened.

    Only a sampler's: the others are what a search is compared with. All objectives besides the
    refusals must cost one forward, else nothing is known before the answers. And the sampler must
    rank trials: one that models their values would take what it is told for a measurement.
    """
    others = [name for name in spec.objectives if name != "refusals"]
    known = len(others) < len(spec.objectives) and all(SCORERS[n].cost == "cheap" for n in others)
    return spec.screening and known and origin == "sampler" and spec.sampler != "qnehvi"


def finished(
    session: Session,
    job_id: uuid.UUID,
    method: str,
    objectives: Sequence[ScorerName],
    without: Collection[int] = (),
) -> list[dict[str, float]]:
    """The front of a method as `protocol.Score` has it: objectives by name, refusals as a rate.

    `without`: numbers of trials that do not count as yet.
    """
    decoded = [
        row for row in session.scalars(_decoded(job_id, method)) if row.number not in without
    ]
    front = front_of(decoded, objectives)
    return [{name: _value(row, name) for name in objectives} for row in front]


def dominator(session: Session, row: Trial, objectives: Sequence[ScorerName]) -> Trial | None:
    """The trial that was first to dominate a screened one; None for a trial that is not screened.

    The refusals among its few answers are the fewest that the screened trial can have in all.
    """
    if not row.screened:
        return None
    others = [name for name in objectives if name != "refusals"]
    for other in session.scalars(_decoded(row.job_id, row.method).order_by(Trial.finished_at)):
        fewer = (other.refusals or 0) <= (row.refusals or 0)
        if fewer and all(_value(other, name) <= _value(row, name) for name in others):
            return other
    return None


def _decoded(job_id: uuid.UUID, method: str) -> Select[Trial]:
    return (
        select(Trial)
        .options(load_only(*NEEDED))
        .where(Trial.job_id == job_id, Trial.method == method)
        .where(Trial.state == "complete", Trial.screened.is_(False))
    )


def _value(row: Trial, name: str) -> float:
    """One objective, refusals as a rate. Infinite where it is missing: that dominates nothing."""
    found = score_of(row, name)
    if found is None:
        return float("inf")
    return found / max(1, row.total or 0) if name == "refusals" else found
