"""Harness tasks on a trial: asked for by a person, run beside the job, kept with the figures.

A task's payload says what it has measured ([number, task, limit] each), in the transaction that
keeps the figures. So a restart repeats nothing, and the original is measured once for all trials.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from pydantic import ValidationError
from sqlalchemy import select
from sqlalchemy.orm import Session

from jobs import audit, control, events, lifecycle, queue, results, trials
from jobs.problems import Conflict, Invalid, NotFound, TooMany
from jobs.spec.job import JobSpec
from jobs.spec.scores import Role, Value
from jobs.states import TASK_OVER
from jobs.tables import Job, Task, User

MOST_WAITING = 20
ROLE: Role = "heldout"  # whose further scores hold a trial's figures
Measured = tuple[int, str, int | None]  # trial (or ORIGINAL, MODEL), task, samples at most


def request(
    session: Session,
    user: User,
    job: Job,
    number: int,
    tasks: Sequence[str],
    limit: int | None = None,
) -> Task:
    """Ask for harness tasks on a complete trial, and on the original where they are not known.

    The same again gives the task that is still to run. Invalid names the field; Conflict when the
    trial has no scores yet; TooMany when 20 of the job wait.
    """
    control.require_editable(user, job)
    wanted = _checked(tasks, limit)
    locked = lifecycle.lock(session, job.id)
    if trials.get(session, job.id, number).state != "complete":
        raise Conflict(f"Trial {number} is not complete yet.")
    waiting = [task for task in of_job(session, job.id) if task.state not in TASK_OVER]
    for task in waiting:
        known = (task.payload["number"], task.payload["tasks"], task.payload["limit"])
        if known == (number, wanted, limit):
            return task
    if len(waiting) >= MOST_WAITING:
        raise TooMany(f"{len(waiting)} benchmarks of this job wait. Wait for them, or stop some.")
    payload = {"number": number, "tasks": wanted, "limit": limit, **lifecycle.needs(locked)}
    task = Task(job_id=job.id, kind="benchmark", payload=payload)
    session.add(task)
    session.flush()
    session.refresh(task)
    told = {"id": str(task.id), "task": "benchmark", "state": "ready", "number": number}
    events.append(session, job.id, "task", told)
    audit.record(session, user.id, "benchmark.request", job.id, number=number, tasks=wanted)
    return task


def _checked(tasks: Sequence[str], limit: int | None) -> list[str]:
    """The names, once each, by the rules of a job's specification."""
    if not tasks:
        raise Invalid("Name at least one harness task.", field="tasks")
    values = {"kind": "benchmark", "model": "any", "tasks": list(tasks), "task_limit": limit}
    try:
        return JobSpec.model_validate(values).tasks
    except ValidationError as error:
        fault = error.errors()[0]
        field = "limit" if fault["loc"][:1] == ("task_limit",) else "tasks"
        raise Invalid(str(fault["msg"]).removeprefix("Value error, "), field=field) from None


def of_job(session: Session, job_id: uuid.UUID, number: int | None = None) -> list[Task]:
    """The job's benchmarks (of one trial), oldest first."""
    query = select(Task).where(Task.job_id == job_id, Task.kind == "benchmark")
    if number is not None:
        query = query.where(Task.payload["number"].as_integer() == number)
    return list(session.scalars(query.order_by(Task.created_at, Task.id)))


def stop(session: Session, user: User, job: Job, task_id: uuid.UUID) -> Task:
    """Call a benchmark off; what it has measured stays. NotFound; one that is over is left so."""
    control.require_editable(user, job)
    lifecycle.lock(session, job.id)
    for task in lifecycle.tasks_of(session, job, "benchmark"):
        if task.id != task_id:
            continue
        if task.state == "ready":
            lifecycle.move(session, task, "cancelled")
        elif task.state == "running":
            task.payload = {**task.payload, "desired": "cancel"}
        audit.record(session, user.id, "benchmark.stop", job.id, task=str(task_id))
        session.flush()
        session.refresh(task)
        return task
    raise NotFound("The job has no such benchmark.")


def measured(session: Session, job_id: uuid.UUID) -> set[Measured]:
    """What the job's tasks have measured so far."""
    payloads = session.scalars(
        select(Task.payload).where(Task.job_id == job_id, Task.kind.in_(("evaluate", "benchmark")))
    )
    return {
        (int(number), str(name), limit)
        for payload in payloads
        for number, name, limit in payload.get("measured", [])
    }


def store(
    session: Session, task: Task, token: int, what: Measured, found: dict[str, Value]
) -> None:
    """Keep the figures (`<task>.<metric>`) of a harness task, and that it was measured. Fenced."""
    held = queue.fence(session, task.id, token)
    number = what[0]
    if JobSpec.model_validate(session.get_one(Job, held.job_id).spec).kind == "abliterate":
        named = {f"harness.{name}": value for name, value in found.items()}
        trials.store_values(session, task, token, number, ROLE, named)
    else:
        results.store_figures(session, task, token, number, found)
    held = queue.fence(session, task.id, token)
    known = [*held.payload.get("measured", []), list(what)]
    held.payload = {**held.payload, "measured": known}
    held.crashes = 0  # progress: engine deaths are counted from here again
    session.flush()
