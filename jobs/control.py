"""What people do to a job once it is there."""

from __future__ import annotations

import uuid

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from jobs import audit, events, lifecycle, submit, trials
from jobs.problems import Conflict, Forbidden, Invalid, NotFound
from jobs.settings import Settings
from jobs.spec.job import JobSpec
from jobs.states import Desired
from jobs.tables import Job, Trial, User


def visible(session: Session, user: User, job_id: uuid.UUID) -> Job:
    """The job, if `user` may see it. Another's private job is NotFound, like one that is not."""
    job = session.get(Job, job_id, populate_existing=True)
    if job is None or not may_see(user, job):
        raise NotFound("There is no such job.")
    return job


def editable(session: Session, user: User, job_id: uuid.UUID) -> Job:
    """The job, if `user` may change it: its owner or an admin. Else Forbidden (or NotFound)."""
    job = visible(session, user, job_id)
    require_editable(user, job)
    return job


def may_see(user: User, job: Job) -> bool:
    """Whether `user` may look at the job."""
    return not job.private or job.owner_id == user.id or user.role == "admin"


def may_edit(user: User, job: Job) -> bool:
    """Whether `user` may change the job."""
    return user.role == "admin" or (job.owner_id == user.id and user.role != "viewer")


def require_editable(user: User, job: Job) -> None:
    """NotFound or Forbidden unless `user` may change the job."""
    if not may_see(user, job):
        raise NotFound("There is no such job.")
    if not may_edit(user, job):
        raise Forbidden("Only the job's owner or an administrator may change it.")


def _want(session: Session, job: Job, desired: Desired) -> None:
    if job.desired_state != desired:
        job.desired_state = desired
        events.append(session, job.id, "job", {"state": job.state, "desired_state": desired})


def pause(session: Session, user: User, job: Job) -> Job:
    """Stop after the running trial; at once where nobody runs. Conflict when the job is over."""
    require_editable(user, job)
    job = lifecycle.lock(session, job.id)
    if job.state == "paused" or (job.desired_state == "pause" and job.state == "running"):
        return job
    if job.state not in ("queued", "running") or job.desired_state == "cancel":
        raise Conflict(f"A job that is {_shown(job)} cannot be paused.")
    _want(session, job, "pause")
    lifecycle.settle(session, job)
    audit.record(session, user.id, "job.pause", job.id)
    return job


def resume(session: Session, user: User, job: Job, settings: Settings | None = None) -> Job:
    """Let a paused or failed job go on. With `settings`, the quota holds as for a submit."""
    require_editable(user, job)
    if settings is not None:
        owner = session.get_one(User, job.owner_id)
        submit.lock_user(session, owner)
    job = lifecycle.lock(session, job.id)
    if job.state == "queued" or (job.state == "running" and job.desired_state == "run"):
        return job
    if job.state == "completed":
        raise Conflict("The job is completed. Give it more trials to go on.")
    if job.state == "cancelled" or job.desired_state == "cancel":
        raise Conflict(f"A job that is {_shown(job)} cannot be resumed; submit it again.")
    if settings is not None and job.state in ("paused", "failed"):
        submit.require_quota(session, owner, settings)
    job.error = None
    _want(session, job, "run")
    for task in lifecycle.tasks_of(session, job, *lifecycle.DRIVING):
        if task.state == "failed":
            task.crashes, task.error = 0, None
            lifecycle.move(session, task, "ready")
    lifecycle.want_searchers(session, job)  # it may have been given more trials meanwhile
    lifecycle.settle(session, job)
    audit.record(session, user.id, "job.resume", job.id)
    return job


def cancel(session: Session, user: User, job: Job) -> Job:
    """Stop for good, at once where nobody runs. Exports, chats and benchmarks stop too."""
    require_editable(user, job)
    job = lifecycle.lock(session, job.id)
    if job.state == "cancelled" or job.desired_state == "cancel":
        return job
    if job.state == "completed":
        raise Conflict("The job is completed; there is nothing to cancel.")
    _want(session, job, "cancel")
    for task in lifecycle.tasks_of(session, job, *lifecycle.BESIDE):
        if task.state == "ready":
            lifecycle.move(session, task, "cancelled")
            lifecycle.fail_artifact(session, task, None)
        elif task.state == "running":
            task.payload = {**task.payload, "desired": "cancel"}
    lifecycle.settle(session, job)
    audit.record(session, user.id, "job.cancel", job.id)
    return job


def amend(
    session: Session,
    user: User,
    job: Job,
    *,
    trials: int | None = None,
    priority: int | None = None,
    parallelism: int | None = None,
    name: str | None = None,
    settings: Settings | None = None,
) -> Job:
    """Change a job's budget, priority, parallelism or name. More trials restart a completed job.

    Invalid names the field. Trials cannot go below the slots already given out. With `settings`,
    the operator's limits hold as for a submit.
    """
    require_editable(user, job)
    if settings is not None:
        owner = session.get_one(User, job.owner_id)
        submit.lock_user(session, owner)
    job = lifecycle.lock(session, job.id)
    changes = {
        field: value
        for field, value in {
            "trials": trials,
            "priority": priority,
            "parallelism": parallelism,
            "name": name,
        }.items()
        if value is not None
    }
    if not changes:
        return job
    if job.state == "cancelled" or job.desired_state == "cancel":
        raise Conflict(f"A job that is {_shown(job)} cannot be changed.")
    _check(session, job, trials, priority, parallelism, name)
    if settings is not None and trials is not None:
        submit.require_trials(trials, settings)
        if job.state == "completed":
            submit.require_quota(session, owner, settings)
    for field, value in changes.items():
        setattr(job, field, value)
    events.append(session, job.id, "job", {"state": job.state, "changed": changes})
    if job.state != "failed":
        lifecycle.want_searchers(session, job)
        lifecycle.settle(session, job)
    audit.record(session, user.id, "job.amend", job.id, **changes)
    session.flush()
    return job


def _check(
    session: Session,
    job: Job,
    wanted: int | None,
    priority: int | None,
    parallelism: int | None,
    name: str | None,
) -> None:
    spec = JobSpec.model_validate(job.spec)
    if spec.kind != "abliterate" and (wanted is not None or parallelism is not None):
        field = "parallelism" if wanted is None else "trials"
        raise Conflict(
            f"A job of kind {spec.kind} searches nothing: it has no {field} to change.", field=field
        )
    methods = spec.methods
    fixed = not submit.searches(methods)
    if wanted is not None:
        given = session.execute(
            select(func.coalesce(func.max(Trial.number), -1)).where(Trial.job_id == job.id)
        ).scalar_one()
        if fixed and wanted != len(methods):
            raise Invalid(
                f"Single passes have one trial each: {len(methods)} here.", field="trials"
            )
        if 1 <= wanted < len(methods):
            raise Invalid(f"Each of the {len(methods)} methods needs a trial.", field="trials")
        if not 1 <= wanted <= 10_000:
            raise Invalid("Between 1 and 10000 trials are possible.", field="trials")
        if wanted <= given:
            raise Invalid(f"{given + 1} trials have already been started.", field="trials")
    if priority is not None and not -10 <= priority <= 10:
        raise Invalid("A priority lies between -10 and 10.", field="priority")
    if parallelism is not None and not 1 <= parallelism <= 64:
        raise Invalid("Between 1 and 64 workers are possible.", field="parallelism")
    if parallelism is not None and fixed and parallelism != 1:
        raise Invalid("Single passes run on one worker.", field="parallelism")
    if name is not None and ("\x00" in name or len(name) > 120 or not name.strip()):
        raise Invalid("A name has 1 to 120 characters.", field="name")


def pick(session: Session, user: User, job: Job, number: int, picked: bool = True) -> Trial:
    """Mark a complete trial as chosen (or not). Picks are kept by retention."""
    require_editable(user, job)
    job = lifecycle.lock(session, job.id)
    trial = trials.get(session, job.id, number)
    if trial.state != "complete":
        raise Conflict(f"Trial {number} is not complete yet.")
    if trial.screened and picked:
        raise Conflict(
            f"Trial {number} was not decoded, since a finished trial is better whatever it "
            "answers. Pick one of the front, or submit the job again with screening off."
        )
    if trial.picked != picked:
        trial.picked = picked
        events.append(session, job.id, "trial", {**trials.summary(trial), "picked": picked})
        audit.record(session, user.id, "trial.pick", job.id, number=number, picked=picked)
    session.flush()
    return trial


def _shown(job: Job) -> str:
    return "being cancelled" if job.desired_state == "cancel" else job.state
