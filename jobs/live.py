"""What a live view of a job reads: its new events, whether more can come, its tasks' logs."""

from __future__ import annotations

import uuid
from typing import NamedTuple

from sqlalchemy import exists, select
from sqlalchemy.orm import Session

from jobs import events, lifecycle
from jobs.states import JOB_OVER, JobState
from jobs.tables import Event, Job, Task


class Pulse(NamedTuple):
    """Events after a number, oldest first; `over`: these are the last."""

    events: list[Event]
    state: JobState | None
    over: bool


def pulse(session: Session, job_id: uuid.UUID, after: int, limit: int = 500) -> Pulse:
    """The job's events numbered above `after`.

    Whether the job is over is read before the events: whatever was written until then is among
    them. A finished job is not over while one of its exports, chats or benchmarks is still to run.
    """
    active = exists().where(
        Task.job_id == Job.id,
        Task.state.in_(("ready", "running")),
        Task.kind.in_(lifecycle.BESIDE),
    )
    row = session.execute(select(Job.state, active).where(Job.id == job_id)).one_or_none()
    if row is None:
        return Pulse([], None, True)
    found = events.since(session, job_id, after, limit)
    state: JobState = row[0]
    return Pulse(found, state, state in JOB_OVER and not row[1] and len(found) < limit)


def tasks(session: Session, job_id: uuid.UUID) -> list[Task]:
    """A job's tasks in the order of their creation."""
    return list(
        session.scalars(
            select(Task).where(Task.job_id == job_id).order_by(Task.created_at, Task.id)
        )
    )
