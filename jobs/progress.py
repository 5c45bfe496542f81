"""How far a task is."""

from __future__ import annotations

from sqlalchemy.orm import Session

from jobs import events, queue
from jobs.tables import Job, Task


def report(
    session: Session, task: Task, token: int, phase: str, done: float, total: float, text: str = ""
) -> None:
    """Set the job's progress and tell the live views. Fenced; the caller throttles."""
    held = queue.fence(session, task.id, token)
    progress = {"phase": phase, "done": done, "total": total, "text": text}
    if held.kind in ("search", "evaluate"):
        session.get_one(Job, held.job_id).progress = progress
    events.append(
        session, held.job_id, "progress", {**progress, "task": held.kind, "id": str(held.id)}
    )
