"""The figures that operators watch, each one query at the moment of asking."""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from jobs import lifecycle, queue
from jobs.settings import Settings
from jobs.tables import Artifact, Event, Job, Task, Trial


class Waiting(NamedTuple):
    """Tasks of one kind that could be claimed, and the age of the oldest in seconds."""

    kind: str
    depth: int
    oldest_seconds: float


def waiting(session: Session) -> list[Waiting]:
    """The queue by kind of task. Tasks of paused jobs do not wait."""
    rows = session.execute(
        select(
            Task.kind,
            func.count(),
            func.extract("epoch", func.now() - func.min(Task.created_at)),
        )
        .join(Job, Job.id == Task.job_id)
        .where(Task.state == "ready")
        .where(Task.kind.in_(lifecycle.BESIDE) | (Job.desired_state == "run"))
        .group_by(Task.kind)
    )
    return [Waiting(kind, int(count), float(age)) for kind, count, age in rows]


def running_tasks(session: Session) -> dict[str, int]:
    """Tasks under a lease, by kind."""
    rows = session.execute(
        select(Task.kind, func.count()).where(Task.state == "running").group_by(Task.kind)
    )
    return {kind: int(count) for kind, count in rows}


def trials_complete(session: Session) -> int:
    """Trials scored since the beginning."""
    query = select(func.count()).select_from(Trial).where(Trial.state == "complete")
    return int(session.execute(query).scalar_one())


def lease_expiries(session: Session) -> int:
    """Leases that lapsed because a worker was not heard of, since the beginning."""
    query = (
        select(func.count())
        .select_from(Event)
        .where(Event.kind == "task", Event.payload["text"].astext.startswith("lease expired"))
    )
    return int(session.execute(query).scalar_one())


def artifact_bytes(session: Session) -> int:
    """Bytes of all ready artifacts."""
    query = select(func.coalesce(func.sum(Artifact.size), 0)).where(Artifact.state == "ready")
    return int(session.execute(query).scalar_one() or 0)


def workers_live(session: Session, settings: Settings) -> dict[tuple[str, str], int]:
    """Workers that called in lately, by (kind of device, its name)."""
    found: dict[tuple[str, str], int] = {}
    for worker in queue.live_workers(session, settings):
        key = (str(worker.device.get("kind", "")), str(worker.device.get("name", "")))
        found[key] = found.get(key, 0) + 1
    return found
