"""Trying a model: a few prompts answered by a trial's edit, or by the original."""

from __future__ import annotations

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from jobs import audit, control, events, lifecycle, trials
from jobs.problems import Conflict, Invalid, TooMany
from jobs.tables import Job, Task, User

MOST_WAITING = 20


def request(
    session: Session,
    user: User,
    job: Job,
    prompt: str,
    *,
    number: int | None = None,
    max_new_tokens: int = 200,
) -> Task:
    """Ask for an answer; it comes as an event of kind `chat`. `number` None: the original model.

    Conflict for a trial that is not complete or a cancelled job; TooMany when 20 chats of the job
    are still to be answered.
    """
    control.require_editable(user, job)
    if not prompt.strip() or "\x00" in prompt or len(prompt) > 20_000:
        raise Invalid("A prompt has 1 to 20000 characters and no NUL.", field="prompt")
    locked = lifecycle.lock(session, job.id)
    if locked.state == "cancelled":
        raise Conflict("The job is cancelled; submit it again to try its model.")
    if number is not None and trials.get(session, job.id, number).state != "complete":
        raise Conflict(f"Trial {number} is not complete yet.")
    waiting = session.execute(
        select(func.count()).where(
            Task.job_id == job.id, Task.kind == "chat", Task.state.in_(("ready", "running"))
        )
    ).scalar_one()
    if waiting >= MOST_WAITING:
        raise TooMany(f"{waiting} chats of this job wait for an answer. Wait for them.")
    payload = {
        "prompts": [prompt],
        "number": number,
        "max_new_tokens": max_new_tokens,
        **lifecycle.needs(locked),
    }
    task = Task(job_id=job.id, kind="chat", payload=payload)
    session.add(task)
    session.flush()
    events.append(session, job.id, "task", {"id": str(task.id), "task": "chat", "state": "ready"})
    audit.record(session, user.id, "chat.request", job.id, number=number)
    return task
