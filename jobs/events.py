"""A job's events: numbered from 1 without gaps; the source of every live view."""

from __future__ import annotations

import uuid
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session
from sqlalchemy.orm.attributes import set_committed_value

from jobs.tables import Event, Job


def append(session: Session, job_id: uuid.UUID, kind: str, payload: dict[str, Any]) -> int:
    """Add an event and return its number.

    The counter is a column of the job's row: the row lock that its UPDATE takes makes writers of
    one job wait for one another, so numbers appear in commit order and a rollback leaves no gap.
    """
    seq = session.execute(
        update(Job)
        .where(Job.id == job_id)
        .values(event_seq=Job.event_seq + 1)
        .returning(Job.event_seq)
        .execution_options(synchronize_session=False)
    ).scalar_one()
    known = session.identity_map.get(session.identity_key(Job, job_id))
    if known is not None:
        set_committed_value(known, "event_seq", seq)
    session.add(Event(job_id=job_id, seq=seq, kind=kind, payload=payload))
    session.flush()
    return seq


def since(session: Session, job_id: uuid.UUID, seq: int, limit: int = 500) -> list[Event]:
    """Events numbered above `seq`, oldest first, at most `limit`."""
    rows = session.scalars(
        select(Event)
        .where(Event.job_id == job_id, Event.seq > seq)
        .order_by(Event.seq)
        .limit(limit)
    )
    return list(rows)
