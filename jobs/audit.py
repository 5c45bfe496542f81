"""Who changed what, written in the transaction of the change."""

from __future__ import annotations

import uuid
from typing import Any

from sqlalchemy.orm import Session

from jobs.tables import Audit


def record(
    session: Session, user_id: uuid.UUID | None, action: str, subject: object, **detail: Any
) -> None:
    """Note that `user_id` did `action` (e.g. "job.pause") to `subject` (an id, kept as text)."""
    session.add(Audit(user_id=user_id, action=action, subject=str(subject), detail=detail))
