"""A job's state, derived from its tasks and from what its owner wants.

`settle` is the only place that writes `jobs.state`. It is called under the lock of the job's row
whenever a task or `desired_state` changed, so two workers cannot derive from different pasts.

| tasks (search and evaluate)       | desired run | desired pause | desired cancel |
| --------------------------------- | ----------- | ------------- | -------------- |
| one is running                    | running     | running       | running        |
| none running, one failed          | failed      | failed        | cancelled      |
| none running, all over            | completed   | completed     | cancelled      |
| none running, some to be done     | queued      | paused        | cancelled      |

Exports, chats and benchmarks of a trial do not move a job: they run beside it, on paused and
finished jobs as well. A job that searches nothing (evaluate, benchmark) has one evaluate task.
"""

from __future__ import annotations

import uuid
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from jobs import events, webhooks
from jobs.problems import Conflict, NotFound
from jobs.states import JOB_MOVES, JOB_OVER, TASK_MOVES, TASK_OVER, JobState, TaskKind, TaskState
from jobs.tables import Artifact, Job, Task, Trial

DRIVING: tuple[TaskKind, ...] = ("search", "evaluate")
BESIDE: tuple[TaskKind, ...] = ("export", "chat", "benchmark")


def lock(session: Session, job_id: uuid.UUID) -> Job:
    """The job's row, locked until the transaction ends, read afresh. NotFound when gone."""
    job = session.scalars(
        select(Job)
        .where(Job.id == job_id)
        .with_for_update(key_share=True)
        .execution_options(populate_existing=True)
    ).one_or_none()
    if job is None:
        raise NotFound(f"There is no job {job_id}.")
    return job


def tasks_of(session: Session, job: Job, *kinds: TaskKind) -> list[Task]:
    """The job's tasks of `kinds` (all kinds when none is named), locked and read afresh."""
    query = select(Task).where(Task.job_id == job.id).order_by(Task.created_at, Task.id)
    if kinds:
        query = query.where(Task.kind.in_(kinds))
    return list(
        session.scalars(
            query.with_for_update(key_share=True).execution_options(populate_existing=True)
        )
    )


def move(session: Session, task: Task, state: TaskState) -> None:
    """Give a task another state, checked against TASK_MOVES; leaving `running` ends its lease."""
    if task.state == state:
        return
    if state not in TASK_MOVES[task.state]:
        raise Conflict(f"A task that is {task.state} cannot become {state}.")
    if task.state == "running":
        task.lease_token = None
        task.lease_owner = None
        task.lease_expires_at = None
        task.finished_at = func.now()
    elif state in TASK_OVER and task.finished_at is None:
        task.finished_at = func.now()
    task.state = state
    payload: dict[str, Any] = {"id": str(task.id), "task": task.kind, "state": state}
    if task.error:
        payload["error"] = task.error
    session.flush()
    events.append(session, task.job_id, "task", payload)


def derive(job: Job, tasks: list[Task]) -> JobState:
    """The state that the job must have by the table above (pure)."""
    driving = [task for task in tasks if task.kind in DRIVING]
    states = {task.state for task in driving}
    if "running" in states:
        return "running"
    if job.desired_state == "cancel":
        return "cancelled"
    if "failed" in states:
        return "failed"
    if driving and states <= TASK_OVER:
        return "completed"
    return "paused" if job.desired_state == "pause" else "queued"


def settle(session: Session, job: Job) -> JobState:
    """Bring the job's row up to its tasks. The caller holds the job's lock."""
    session.flush()
    tasks = tasks_of(session, job, *DRIVING)
    if job.state == "cancelled":
        return job.state
    park(session, job, tasks)
    state = derive(job, tasks)
    if state == job.state:
        return state
    if state not in JOB_MOVES[job.state]:
        raise Conflict(f"A job that is {job.state} cannot become {state}.")
    job.state = state
    if state == "running" and job.started_at is None:
        job.started_at = func.now()
    job.finished_at = func.now() if state in JOB_OVER else None
    if state == "completed":
        # a pause asked for during the last seconds has nothing left to stop
        job.desired_state = "run"
        job.error = None
    session.flush()
    session.refresh(job, ["started_at", "finished_at"])
    payload: dict[str, Any] = {"state": state, "desired_state": job.desired_state}
    if job.error:
        payload["error"] = job.error
    events.append(session, job.id, "job", payload)
    if state in JOB_OVER or state == "paused":
        webhooks.enqueue(session, job, f"job.{state}")
    return state


def park(session: Session, job: Job, tasks: list[Task]) -> None:
    """Take what nobody runs out of the queue when the job is not to run, or put it back in."""
    target: dict[str, TaskState] = {"run": "ready", "pause": "paused", "cancel": "cancelled"}
    wanted = target[job.desired_state]
    for task in tasks:
        idle = task.state in ("ready", "paused")
        if (idle and task.state != wanted) or (task.state == "failed" and wanted == "cancelled"):
            move(session, task, wanted)


def want_searchers(session: Session, job: Job) -> None:
    """Give the job as many open search tasks as it may use: min(parallelism, slots left)."""
    session.flush()
    left = job.trials - completed(session, job.id)
    open_tasks = [t for t in tasks_of(session, job, "search") if t.state not in TASK_OVER]
    for _ in range(min(job.parallelism, left) - len(open_tasks)):
        session.add(Task(job_id=job.id, kind="search", state=idle_state(job), payload=needs(job)))
    if left > 0:
        for task in tasks_of(session, job, "evaluate"):
            # its front would be out of date before it began
            if task.state in ("ready", "paused"):
                move(session, task, "cancelled")
    session.flush()


def want_evaluation(session: Session, job: Job, original: str | None = None) -> None:
    """Create the evaluate task of this generation once, when every slot is complete.

    Searchers that nobody claimed yet are called off: a worker would load the model for nothing.
    A job that searches nothing has no slots; `original` is the commit of what it compares with.
    """
    if completed(session, job.id) < job.trials:
        return
    for task in tasks_of(session, job, "search"):
        if task.state in ("ready", "paused"):
            move(session, task, "cancelled")
    for task in tasks_of(session, job, "evaluate"):
        same = task.payload.get("generation") == job.trials
        if same and task.state != "cancelled":
            return
    payload = {"generation": job.trials, "original": original, **needs(job)}
    session.add(Task(job_id=job.id, kind="evaluate", state=idle_state(job), payload=payload))
    session.flush()


def needs(job: Job) -> dict[str, Any]:
    """What a worker must have for this job's tasks: {"min_bytes": int} once it is known."""
    prepared = job.prepared or {}
    weights = prepared.get("weight_bytes")
    return {"min_bytes": int(weights)} if isinstance(weights, int) and weights > 0 else {}


def idle_state(job: Job) -> TaskState:
    """The state of a new task of this job."""
    return "paused" if job.desired_state == "pause" else "ready"


def completed(session: Session, job_id: uuid.UUID) -> int:
    """Complete trials of a job."""
    return session.execute(
        select(func.count()).where(Trial.job_id == job_id, Trial.state == "complete")
    ).scalar_one()


def fail_artifact(session: Session, task: Task, error: dict[str, Any] | None) -> None:
    """Close the artifact of an export task that ended without files."""
    session.execute(
        update(Artifact)
        .where(Artifact.task_id == task.id, Artifact.state.in_(("queued", "running")))
        .values(
            state="cancelled" if task.state == "cancelled" else "failed",
            error=error,
            finished_at=func.now(),
        )
    )
