"""Leases: who may work on which task, and the policy that decides what is next.

Lock order, everywhere in jobs/: **the job's row first, then its tasks' rows**. Every fenced write
ends in an event, and an event locks the job's row; taking that lock first means that a worker, a
person and the reconciler can never wait for one another in a circle. `claim` takes both at once
and skips what is locked; `renew` locks a task alone and waits for nothing after it.

The clock is PostgreSQL's; this process's clock is never compared with a lease.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any, cast

from sqlalchemy import ColumnElement, func, select, text
from sqlalchemy.orm import Session

from jobs import events, lifecycle
from jobs.problems import LeaseLost
from jobs.settings import Settings
from jobs.states import Desired, TaskKind, TaskState
from jobs.tables import Job, Task, Worker

# Reasons that a person can mend: the job waits for them instead of failing.
MENDABLE = frozenset(
    {
        "disk_full",
        "out_of_memory",
        "hub_unreachable",
        "gated_model",
        "missing_library",
    }
)
HALF_LIFE_SECONDS = 86_400.0


@dataclass(frozen=True)
class Claim:
    """A task that this worker may now run, until the lease ends."""

    task: Task
    job: Job
    token: int
    expires_in: float


# An owner's worker-seconds, each second counted half as much per day of age:
# the integral of 2^(-(now - t)/h) dt over every task's run, h the half-life.
USAGE = """
usage AS (
    SELECT j.owner_id, sum(:half / ln(2.0) * (
        power(2.0, -extract(epoch FROM now() - coalesce(t.finished_at, now()))::float8 / :half)
      - power(2.0, -extract(epoch FROM now() - t.started_at)::float8 / :half))) AS seconds
    FROM tasks t JOIN jobs j ON j.id = t.job_id
    WHERE t.started_at IS NOT NULL
      AND coalesce(t.finished_at, now()) > now() - interval '14 days'
    GROUP BY j.owner_id
)"""
BESIDE = ", ".join(f"'{kind}'" for kind in lifecycle.BESIDE)
FREE = "(t.state = 'ready' OR (t.state = 'running' AND t.lease_expires_at <= now()))"
WANTED = f"""(t.kind IN ({BESIDE})
        OR (j.desired_state = 'run' AND j.state IN ('queued', 'running')))"""
ORDER = """j.priority DESC,
    coalesce(usage.seconds, 0) / greatest(u.weight, 0.001),
    j.created_at, j.id, t.created_at, t.id"""
SOURCE = """tasks t
    JOIN jobs j ON j.id = t.job_id
    JOIN users u ON u.id = j.owner_id
    LEFT JOIN usage ON usage.owner_id = j.owner_id"""
FITS = f"""{FREE} AND {WANTED}
      AND t.kind = ANY(:accepts)
      AND (CAST(:memory AS bigint) IS NULL
           OR coalesce((t.payload->>'min_bytes')::bigint, 0) <= :memory)
      AND (CAST(:device AS text) IS DISTINCT FROM 'cpu'
           OR j.spec->>'device' IS DISTINCT FROM 'cuda')
      AND (t.kind <> 'search' OR j.parallelism > (
          SELECT count(*) FROM tasks o WHERE o.job_id = j.id AND o.kind = 'search'
             AND o.id <> t.id AND o.state = 'running' AND o.lease_expires_at > now()))"""
CLAIM = text(f"""
WITH {USAGE}, next AS (
    SELECT t.id, t.state AS was
    FROM {SOURCE}
    WHERE {FITS}
    ORDER BY {ORDER}
    LIMIT 1
    FOR NO KEY UPDATE OF j, t SKIP LOCKED
)
UPDATE tasks SET state = 'running', lease_token = nextval('lease_tokens'), lease_owner = :worker,
    lease_expires_at = now() + make_interval(secs => :lease), attempts = tasks.attempts + 1,
    started_at = now(), finished_at = NULL, error = NULL
FROM next WHERE tasks.id = next.id
RETURNING tasks.id, tasks.job_id, tasks.kind, tasks.lease_token, next.was
""")
# Waits for the owner of the lock of the best task's job; see claim().
AWAIT = text(f"""
WITH {USAGE}
SELECT j.id FROM {SOURCE} WHERE {FITS} ORDER BY {ORDER} LIMIT 1 FOR NO KEY UPDATE OF j
""")
RUNNING_SEARCHERS = text("""
SELECT count(*) FROM tasks WHERE job_id = :job AND kind = 'search'
   AND state = 'running' AND lease_expires_at > now()
""")


def claim(session: Session, worker: Worker, settings: Settings) -> Claim | None:
    """Lease the next task that this worker fits, or None when there is none.

    The choice and the lease are one statement. It skips rows that somebody holds at this moment,
    so an empty answer may only mean that an event was being written; then the lock is waited for
    (holding nothing else) and the choice is made again. `OF j, t`, in this order: where the job is
    locked, the task must not be left locked behind it (that was a deadlock between two claims).
    A statement sees the past that it started in, so the limit of parallel searchers is checked
    once more under the job's lock.
    """
    values: dict[str, Any] = {
        "half": HALF_LIFE_SECONDS,
        "accepts": list(worker.accepts),
        "memory": worker.device.get("memory_bytes"),
        "device": worker.device.get("kind"),
        "worker": worker.id,
        "lease": settings.lease_seconds,
    }
    session.flush()
    for _ in range(16):
        attempt = session.begin_nested()
        row = session.execute(CLAIM, values).one_or_none()
        if row is None:
            blocked = session.execute(AWAIT, values).one_or_none()
            attempt.rollback()
            if blocked is None:
                return None
            continue
        job = lifecycle.lock(session, row.job_id)
        live = session.execute(RUNNING_SEARCHERS, {"job": job.id}).scalar_one()
        if row.kind == "search" and live > job.parallelism:
            attempt.rollback()
            continue
        attempt.commit()
        return _taken(session, job, row.id, row.was, worker, settings)
    return None


def _taken(
    session: Session, job: Job, task_id: uuid.UUID, was: str, worker: Worker, settings: Settings
) -> Claim:
    task = session.get_one(Task, task_id, populate_existing=True)
    if was == "running":
        events.append(session, job.id, "task", _expired(task))
    events.append(
        session,
        job.id,
        "task",
        {
            "id": str(task.id),
            "task": task.kind,
            "state": "running",
            "worker": worker.name,
            "token": task.lease_token,
            "attempt": task.attempts,
        },
    )
    lifecycle.settle(session, job)
    return Claim(task, job, cast(int, task.lease_token), settings.lease_seconds)


def _expired(task: Task) -> dict[str, Any]:
    return {
        "id": str(task.id),
        "task": task.kind,
        "state": "ready",
        "text": "lease expired: the worker was not heard of in time",
    }


def _held(task_id: uuid.UUID, token: int) -> list[ColumnElement[bool]]:
    """What must hold of a task's row for a write of the holder of `token` to count."""
    return [
        Task.id == task_id,
        Task.lease_token == token,
        Task.state == "running",
        Task.lease_expires_at > func.clock_timestamp(),
    ]


def fence(session: Session, task_id: uuid.UUID, token: int) -> Task:
    """Lock the job's and the task's row for a write of the holder of `token`. Else LeaseLost.

    Called first in the transaction of every write that only the lease's holder may do.
    """
    job_id = session.scalars(select(Task.job_id).where(Task.id == task_id)).one_or_none()
    if job_id is None:
        raise LeaseLost(f"task {task_id} is gone")
    lifecycle.lock(session, job_id)
    task = session.scalars(
        select(Task)
        .where(*_held(task_id, token))
        .with_for_update(key_share=True)
        .execution_options(populate_existing=True)
    ).one_or_none()
    if task is None:
        raise LeaseLost(f"the lease {token} on task {task_id} is over")
    return task


RENEW = text(f"""
UPDATE tasks SET lease_expires_at = now() + make_interval(secs => :lease)
FROM jobs
WHERE tasks.id = :task AND tasks.lease_token = :token AND tasks.state = 'running'
  AND tasks.lease_expires_at > now() AND jobs.id = tasks.job_id
RETURNING CASE WHEN tasks.kind IN ({BESIDE}) THEN coalesce(tasks.payload->>'desired', 'run')
               ELSE jobs.desired_state END
""")


def renew(session: Session, task_id: uuid.UUID, token: int, settings: Settings) -> Desired:
    """Heartbeat: lengthen the lease. What is wanted of this task now; LeaseLost when it is over."""
    values = {"task": task_id, "token": token, "lease": settings.lease_seconds}
    desired = session.execute(RENEW, values).scalar_one_or_none()
    if desired is None:
        raise LeaseLost(f"the lease {token} on task {task_id} is over")
    return cast(Desired, desired)


def release(
    session: Session,
    task_id: uuid.UUID,
    token: int,
    *,
    state: TaskState,
    error: dict[str, Any] | None = None,
) -> None:
    """Give the lease back and say how the task ended; the job's state follows. Fenced.

    ready      to be claimed again (a worker shuts down, an engine died once)
    paused     carried out for desired_state "pause"; ready again if it was resumed meanwhile
    done       finished; a search with slots left and nobody else at it goes back to ready
    failed     `error` {"reason", "message", "mend"}: reasons in MENDABLE pause the job instead
    cancelled  carried out for desired_state "cancel"
    """
    task = fence(session, task_id, token)
    job = session.get_one(Job, task.job_id)
    task.error = error
    if task.kind not in lifecycle.DRIVING:
        lifecycle.move(session, task, "cancelled" if state == "paused" else state)
        if task.kind == "export" and task.state in ("failed", "cancelled"):
            lifecycle.fail_artifact(session, task, error)
        return
    if state == "failed" and error is not None and error.get("reason") in MENDABLE:
        state = "paused"
        job.desired_state = "pause" if job.desired_state == "run" else job.desired_state
        job.error = error
    elif state == "failed":
        job.desired_state = "pause" if job.desired_state == "run" else job.desired_state
        job.error = error
    elif state == "done" and task.kind == "search" and _abandons(session, job, task):
        state = "ready"
    lifecycle.move(session, task, state)
    if state == "done" and task.kind == "search":
        lifecycle.want_evaluation(session, job)
    lifecycle.settle(session, job)


def _abandons(session: Session, job: Job, task: Task) -> bool:
    """Whether slots would be left with no search task to fill them."""
    if lifecycle.completed(session, job.id) >= job.trials:
        return False
    others = lifecycle.tasks_of(session, job, "search")
    return all(o.id == task.id or o.state not in ("ready", "running", "paused") for o in others)


def claimable(session: Session) -> list[tuple[uuid.UUID, TaskKind]]:
    """Tasks that some worker could claim now, best first: what the reconciler rings for."""
    rows = session.execute(
        text(
            f"WITH {USAGE} SELECT t.id, t.kind FROM {SOURCE} WHERE {FREE} AND {WANTED}"
            f" ORDER BY {ORDER}"
        ),
        {"half": HALF_LIFE_SECONDS},
    )
    return [(row.id, row.kind) for row in rows]


def claimable_of(session: Session, job_id: uuid.UUID) -> list[tuple[uuid.UUID, TaskKind]]:
    """The ready tasks of one job: what to ring for after a commit that changed it."""
    rows = session.execute(
        select(Task.id, Task.kind)
        .where(Task.job_id == job_id, Task.state == "ready")
        .order_by(Task.created_at, Task.id)
    )
    return [(row.id, row.kind) for row in rows]


def reap(session: Session) -> list[uuid.UUID]:
    """End leases that ran out and carry out what was wanted of them. The tasks' ids.

    Ready again where the job is to run, paused or cancelled where that was asked for.
    """
    expired = session.execute(
        select(Task.id, Task.job_id)
        .where(Task.state == "running", Task.lease_expires_at <= func.now())
        .order_by(Task.job_id, Task.id)
    ).all()
    done: list[uuid.UUID] = []
    for task_id, job_id in expired:
        job = lifecycle.lock(session, job_id)
        task = session.scalars(
            select(Task)
            .where(Task.id == task_id, Task.state == "running", Task.lease_expires_at <= func.now())
            .with_for_update(key_share=True)
            .execution_options(populate_existing=True)
        ).one_or_none()
        if task is None:
            continue  # renewed or claimed while we waited for the job's lock
        events.append(session, job.id, "task", _expired(task))
        driving = task.kind in lifecycle.DRIVING
        cancelled = task.payload.get("desired") == "cancel" and not driving
        lifecycle.move(session, task, "cancelled" if cancelled else "ready")
        if cancelled and task.kind == "export":
            lifecycle.fail_artifact(session, task, None)
        if driving:
            lifecycle.settle(session, job)
        done.append(task_id)
    return done


def live_workers(session: Session, settings: Settings) -> list[Worker]:
    """Workers that called in within three leases and did not stop."""
    seconds = 3 * settings.lease_seconds
    return list(
        session.scalars(
            select(Worker).where(
                Worker.stopped_at.is_(None),
                Worker.last_seen_at > func.now() - func.make_interval(0, 0, 0, 0, 0, 0, seconds),
            )
        )
    )


def position(session: Session, job: Job) -> int | None:
    """How many jobs are ahead of this queued job by the policy of `claim`; None if not queued."""
    if job.state != "queued":
        return None
    rows = session.execute(
        text(
            f"""WITH {USAGE}, line AS (
            SELECT DISTINCT ON (j.id) j.id, row_number() OVER (ORDER BY {ORDER}) AS place
            FROM {SOURCE} WHERE {FREE} AND {WANTED} AND t.kind IN ('search', 'evaluate')
            ORDER BY j.id, place)
            SELECT (SELECT count(*) FROM line WHERE line.place < mine.place)
            FROM line mine WHERE mine.id = :job"""
        ),
        {"half": HALF_LIFE_SECONDS, "job": job.id},
    )
    ahead = rows.scalar_one_or_none()
    return None if ahead is None else int(ahead)


def waiting_reason(session: Session, job: Job, settings: Settings) -> str | None:
    """Why the job does not run, in plain words; None when it runs or is over."""
    if job.state == "running":
        return {"pause": "pausing: the worker finishes its trial", "cancel": "being cancelled"}.get(
            job.desired_state
        )
    if job.state == "paused":
        if job.error:
            mend = job.error.get("mend") or "mend it, then resume the job"
            return f"paused: {job.error.get('message', job.error.get('reason'))} ({mend})"
        return "paused: resume it to go on"
    if job.state != "queued":
        return None
    task = session.scalars(
        select(Task)
        .where(Task.job_id == job.id, Task.state == "ready", Task.kind.in_(lifecycle.DRIVING))
        .order_by(Task.created_at)
        .limit(1)
    ).one_or_none()
    kind = task.kind if task is not None else "search"
    workers = [worker for worker in live_workers(session, settings) if kind in worker.accepts]
    if not workers:
        return f"no worker is running that accepts {kind} tasks"
    if job.spec.get("device") == "cuda":
        workers = [worker for worker in workers if worker.device.get("kind") != "cpu"]
        if not workers:
            return "the job asks for a GPU and no worker with one is running"
    needed = int(task.payload.get("min_bytes", 0)) if task is not None else 0
    sizes = [worker.device.get("memory_bytes") for worker in workers]
    known = [size for size in sizes if size is not None]
    if len(known) == len(sizes) and needed > max(known):
        return (
            f"needs {needed / 1e9:.1f} GB of memory and the largest running worker has "
            f"{max(known) / 1e9:.1f} GB"
        )
    ahead = position(session, job)
    if ahead:
        return f"{ahead} job{'s' if ahead > 1 else ''} ahead in the queue"
    return "next in the queue: waiting for a free worker"
