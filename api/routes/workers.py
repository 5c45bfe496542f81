"""Workers: which machines run jobs now."""

from __future__ import annotations

import datetime as dt
import uuid
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from api.auth import Reader
from jobs import queue, workers

router = APIRouter(tags=["workers"])


class WorkerView(BaseModel):
    """A worker process that was seen within the last day."""

    model_config = ConfigDict(from_attributes=True)

    id: uuid.UUID
    name: str
    host: str
    pid: int
    accepts: list[str] = Field(description="kinds of tasks")
    device: dict[str, Any] = Field(description="kind (cuda, cpu), name, memory_bytes")
    versions: dict[str, Any]
    live: bool = Field(False, description="heard of within three leases and not stopped")
    started_at: dt.datetime
    last_seen_at: dt.datetime
    stopped_at: dt.datetime | None


@router.get("/workers")
def list_workers(who: Reader) -> list[WorkerView]:
    """Workers seen within a day, the running ones first."""
    with who.begin() as session:
        live = {row.id for row in queue.live_workers(session, who.settings)}
        found = [WorkerView.model_validate(row) for row in workers.list_workers(session)]
    for each in found:
        each.live = each.id in live
    return found
