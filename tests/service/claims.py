"""What a worker does to the queue, each in a transaction of its own."""

from __future__ import annotations

from typing import Any

from jobs import queue, trials
from jobs.database import Sessions
from jobs.settings import Settings
from jobs.tables import Job, Worker
from tests.service.builders import CANDIDATE, scored


def claim(sessions: Sessions, worker: Worker, settings: Settings) -> queue.Claim | None:
    """What the policy gives this worker, if anything."""
    with sessions.begin() as session:
        return queue.claim(session, worker, settings)


def must_claim(sessions: Sessions, worker: Worker, settings: Settings) -> queue.Claim:
    """The same where there must be something."""
    found = claim(sessions, worker, settings)
    assert found is not None
    return found


def release(sessions: Sessions, claim: queue.Claim, state: str, error: Any = None) -> Job:
    """End this run of the task; its job then."""
    with sessions.begin() as session:
        queue.release(session, claim.task.id, claim.token, state=state, error=error)  # type: ignore[arg-type]
    return reload(sessions, claim.job)


def reload(sessions: Sessions, job: Job) -> Job:
    """The job as it is now."""
    with sessions.begin() as session:
        return session.get_one(Job, job.id)


def fill(sessions: Sessions, claim: queue.Claim, count: int = 100) -> None:
    """Score every slot that is free, at most `count`."""
    with sessions.begin() as session:
        while count and (slots := trials.reserve(session, claim.task, claim.token, count)):
            for slot in slots:
                trials.begin(
                    session, claim.task, claim.token, slot.number, CANDIDATE, {}, "sampler", None
                )
                trials.complete(session, claim.task, claim.token, slot.number, scored())
            count -= len(slots)
