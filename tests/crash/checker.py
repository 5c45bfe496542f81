"""What must hold of a job after any storm, read from the tables and the events alone."""

from __future__ import annotations

import uuid
from collections import Counter

from sqlalchemy import select
from sqlalchemy.orm import Session

from jobs import events
from jobs.database import Sessions
from jobs.states import JOB_OVER
from jobs.tables import Artifact, Job, Task, Trial
from tests.service.processes import wait_until


def check(
    sessions: Sessions, job_id: uuid.UUID, state: str = "completed", resumed: int = 0
) -> None:
    """AssertionError naming the first rule that is broken.

    `resumed`: how often somebody resumed the job after it had failed.
    """
    # A task that has done its work still has its lease to give back.
    wait_until(lambda: not _working(sessions, job_id), 20.0, "no task of the job runs")
    with sessions() as session:
        # One snapshot: somebody may be writing between two statements.
        session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
        _rules(session, job_id, state, resumed)


def _working(sessions: Sessions, job_id: uuid.UUID) -> bool:
    with sessions() as session:
        query = select(Task.id).where(Task.job_id == job_id, Task.state == "running")
        return session.scalars(query).first() is not None


def _rules(session: Session, job_id: uuid.UUID, state: str, resumed: int) -> None:
    job = session.get_one(Job, job_id)
    assert job.state == state, (job.state, job.error)
    trials = list(session.scalars(select(Trial).where(Trial.job_id == job_id)))
    numbers = Counter(trial.number for trial in trials if trial.state == "complete")
    if state == "completed":
        assert numbers == Counter(range(job.trials)), "the budget, exactly, each number once"
        assert len(trials) == job.trials, "no slot beside the budget"
    seen = events.since(session, job_id, 0, limit=1_000_000)
    assert [event.seq for event in seen] == list(range(1, len(seen) + 1)), "no gap in the events"
    assert len(seen) == job.event_seq
    complete = Counter(
        event.payload["number"]
        for event in seen
        if event.kind == "trial" and event.payload["state"] == "complete" and _first(event.payload)
    )
    assert complete == numbers, "one event for each complete trial"
    states = [event.payload["state"] for event in seen if event.kind == "job"]
    moves = [state for at, state in enumerate(states) if at == 0 or state != states[at - 1]]
    over = [state for state in moves if state in JOB_OVER]
    assert over == ["failed"] * resumed + [state], f"terminal once: {over}"
    tokens = [
        (event.payload["id"], event.payload["token"])
        for event in seen
        if event.kind == "task" and event.payload.get("token") is not None
    ]
    by_task: dict[str, list[int]] = {}
    for task_id, token in tokens:
        by_task.setdefault(task_id, []).append(token)
    for given in by_task.values():
        assert given == sorted(set(given)), f"lease tokens strictly increase: {given}"
    for task in session.scalars(select(Task).where(Task.job_id == job_id)):
        assert task.state != "running" or state not in JOB_OVER, "nobody works on a finished job"
    for artifact in session.scalars(select(Artifact).where(Artifact.job_id == job_id)):
        assert artifact.state in ("ready", "failed", "cancelled")


def _first(payload: dict[str, object]) -> bool:
    """Whether the event is of the search, not of the later scores on other roles."""
    return "heldout" not in payload and "over_refusal" not in payload
