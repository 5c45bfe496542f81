"""Workers that called in."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from jobs.tables import Worker


def register(
    session: Session,
    *,
    name: str,
    host: str,
    pid: int,
    accepts: Sequence[str],
    device: dict[str, Any],
    versions: dict[str, Any],
) -> Worker:
    """A new worker. `device`: {"kind": "cuda"|"cpu", "name", "memory_bytes"}."""
    worker = Worker(
        name=name, host=host, pid=pid, accepts=list(accepts), device=device, versions=versions
    )
    session.add(worker)
    session.flush()
    session.refresh(worker)
    return worker


def seen(session: Session, worker_id: uuid.UUID) -> None:
    """Note that the worker is alive."""
    session.execute(update(Worker).where(Worker.id == worker_id).values(last_seen_at=func.now()))


def stop(session: Session, worker_id: uuid.UUID) -> None:
    """Note that the worker ended in good order."""
    session.execute(update(Worker).where(Worker.id == worker_id).values(stopped_at=func.now()))


def list_workers(session: Session, hours: float = 24.0) -> list[Worker]:
    """Workers seen within `hours`, running ones first, then the newest first."""
    since = func.now() - func.make_interval(0, 0, 0, 0, 0, 0, hours * 3600)
    return list(
        session.scalars(
            select(Worker)
            .where(Worker.last_seen_at > since)
            .order_by(Worker.stopped_at.isnot(None), Worker.started_at.desc())
        )
    )
