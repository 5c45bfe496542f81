"""Warm starts: a search begins with points that earlier jobs on such models have found good.

Which ones is decided once for a job, under its lock, and kept in `Job.warm_starts`: all workers
agree, and what a crash interrupts begins with the same points again.

A job learns of completed jobs that whoever sees it may see: a shared one of shared ones, a private
one of its owner's private ones, too. An administrator's job learns no more than a member's.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from sqlalchemy import Integer, func, or_, select
from sqlalchemy.orm import Session

from jobs import comparison, queue
from jobs.spec.job import JobSpec
from jobs.spec.methods import MethodName, share
from jobs.spec.protocol import AnatomyReport
from jobs.tables import Job, Task, Trial
from jobs.trial_scores import front_of

ORIGIN = "warm_start"  # of a trial
MOST = 4  # for each method
SHARE = 10  # a method has at most one for so many of its trials
SOURCES = 8  # earlier jobs that are looked through for a method


class Source(BaseModel):
    """The trial of an earlier job that a warm start was taken from."""

    job: uuid.UUID
    trial: int


class WarmStart(Source):
    """A point to begin with, in the layers of the job that begins with it."""

    params: dict[str, Any]


def limit(methods: Sequence[MethodName], trials: int, method: MethodName) -> int:
    """How many warm starts a method may have in a job of `trials` trials."""
    return min(MOST, share(methods, trials, method) // SHARE)


def starts(
    session: Session,
    task: Task,
    token: int,
    slots: Mapping[MethodName, Sequence[int]],
    anatomy: AnatomyReport,
) -> dict[int, WarmStart]:
    """The warm starts of the task's job by trial number, chosen now if they are not yet. Fenced.

    slots: the numbers that each searched method of the job has for them. All methods get the same
    count, that of the method of which the least is known: they are compared under one budget.
    """
    job = session.get_one(Job, queue.fence(session, task.id, token).job_id, populate_existing=True)
    if job.warm_starts is None:
        found = {name: _found(session, job, name, len(slots[name]), anatomy) for name in slots}
        count = min(map(len, found.values()), default=0)
        job.warm_starts = {
            str(number): start.model_dump(mode="json")
            for name, numbers in slots.items()
            for number, start in zip(numbers, found[name][:count], strict=False)
        }
        session.flush()
    return {int(number): WarmStart.model_validate(it) for number, it in job.warm_starts.items()}


def source(job: Job, row: Trial) -> Source | None:
    """Where a warm start of the job was found; None for its other trials."""
    stored = (job.warm_starts or {}).get(str(row.number))
    return Source.model_validate(stored) if stored and row.origin == ORIGIN else None


def _found(
    session: Session, job: Job, method: MethodName, count: int, anatomy: AnatomyReport
) -> list[WarmStart]:
    """At most `count` points of a method, from the jobs that are most like this one."""
    objectives = JobSpec.model_validate(job.spec).objectives
    found: list[WarmStart] = []
    for job_id, layers in _sources(session, job, method, anatomy):
        if len(found) == count:
            break
        rows = session.scalars(
            select(Trial)
            .where(Trial.job_id == job_id, Trial.method == method, Trial.state == "complete")
            .order_by(Trial.number)
        )
        for row in chosen(front_of(rows, objectives), count - len(found)):
            params = scaled(row.params, layers, anatomy.layers)
            if all(params != known.params for known in found):  # that job began with it, too
                found.append(WarmStart(job=job_id, trial=row.number, params=params))
    return found


def _sources(
    session: Session, job: Job, method: MethodName, anatomy: AnatomyReport
) -> list[tuple[uuid.UUID, int]]:
    """Earlier jobs of a method with their layers: the same model first, then models as deep."""
    report = Job.prepared["anatomy"]
    layers = report["layers"].astext.cast(Integer)
    shared = Job.private.is_(False)
    rows = session.execute(
        select(Job.id, layers)
        .where(
            or_(shared, Job.owner_id == job.owner_id) if job.private else shared,
            Job.id != job.id,
            Job.state == "completed",
            Job.trials > 0,
            Job.spec.contains({"methods": [method]}),
            report["architecture"].astext == anatomy.architecture,
        )
        .order_by(
            Job.model != job.model,
            func.abs(layers - anatomy.layers),
            Job.trials.desc(),
            Job.finished_at.desc(),
        )
        .limit(SOURCES)
    )
    return [(job_id, count) for job_id, count in rows]


def chosen(front: Sequence[Trial], count: int) -> list[Trial]:
    """At most `count` trials of a front: its pick (`comparison.pick`), others spread along it.

    Never the single pass and the plain point, with which every search begins.
    """
    rows = [row for row in front if row.params and row.origin != "plain"]
    pick = comparison.pick(list(front))
    first = [row for row in rows if row is pick][:count]
    rest = [row for row in rows if row is not pick]
    wanted = min(count - len(first), len(rest))
    return first + [rest[(2 * n + 1) * len(rest) // (2 * wanted)] for n in range(wanted)]


def scaled(params: Mapping[str, Any], before: int, after: int) -> dict[str, Any]:
    """A point of a model of `before` layers at the same depths of one of `after`, not rounded.

    Layers and distances × (after − 1)/(before − 1); of ARA's range [start, end) its first and last.
    """
    ratio = (after - 1) / max(1, before - 1)
    found = dict(params)
    for name, value in params.items():
        match name.rpartition(".")[2]:
            case "index" | "position" | "distance" | "start":
                found[name] = value * ratio
            case "end":
                found[name] = (value - 1) * ratio + 1
    return found
