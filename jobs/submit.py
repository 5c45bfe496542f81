"""Submitting a job."""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from jobs import audit, events, lifecycle, models, prompts
from jobs.problems import Forbidden, Invalid, NoSpace, TooMany
from jobs.settings import Settings
from jobs.spec.job import JobSpec
from jobs.spec.methods import METHODS, MethodName, budget
from jobs.spec.protocol import NOTHING
from jobs.tables import Job, User

_KEY = re.compile(r"[\x20-\x7e]{1,200}")


def submit(
    session: Session,
    user: User,
    spec: JobSpec,
    settings: Settings,
    *,
    idempotency_key: str | None = None,
) -> tuple[Job, bool]:
    """Accept a job and create its search tasks: (job, whether it is new).

    The same `idempotency_key` of the same user again gives the first job. Forbidden for viewers,
    Invalid naming the field, TooMany over the quota, NoSpace below the disk reserve. The model is
    looked up first, before any lock is taken, because the hub may take seconds to answer.
    """
    if user.role == "viewer":
        raise Forbidden("Viewers cannot submit jobs. Ask an administrator for the role member.")
    if idempotency_key is not None and not _KEY.fullmatch(idempotency_key):
        raise Invalid(
            "An Idempotency-Key has 1 to 200 printable ASCII characters.", field="idempotency_key"
        )
    known = _known(session, user, idempotency_key)
    if known is not None:
        return known, False
    require_trials(spec.trials, settings)
    require_judge(spec.judge, settings)
    require_space(settings)
    commit = models.check(spec.model, spec.revision, settings)
    original = check_original(spec, settings)
    texts = NOTHING if spec.kind == "benchmark" else prompts.texts(session, spec.prompts)
    lock_user(session, user)
    known = _known(session, user, idempotency_key)
    if known is not None:
        return known, False
    require_quota(session, user, settings)
    trials = budget(spec.methods, spec.trials) if spec.kind == "abliterate" else 0
    job = Job(
        id=uuid.uuid4(),
        owner_id=user.id,
        name=spec.name or _name(spec),
        model=spec.model,
        spec=spec.model_dump(mode="json"),
        prompts=texts.model_dump(mode="json"),
        state="queued",
        desired_state="run",
        trials=trials,
        priority=spec.priority,
        # a few fixed trials are not worth loading the model a second time
        parallelism=spec.parallelism if searches(spec.methods) else 1,
        private=spec.private,
        commit=commit,
        progress={},
        idempotency_key=idempotency_key,
    )
    session.add(job)
    session.flush()
    session.refresh(job)
    events.append(session, job.id, "job", {"state": "queued", "desired_state": "run"})
    if spec.kind == "abliterate":
        lifecycle.want_searchers(session, job)
    else:
        lifecycle.want_evaluation(session, job, original)
    audit.record(session, user.id, "job.submit", job.id, model=spec.model, trials=trials)
    session.flush()
    return job, True


def check_original(spec: JobSpec, settings: Settings) -> str | None:
    """`models.check` of the model to compare with: its commit. Invalid(field="original")."""
    if spec.original is None:
        return None
    try:
        return models.check(spec.original, None, settings)
    except Invalid as error:
        raise Invalid(error.detail, field="original") from None


def searches(methods: Iterable[MethodName]) -> bool:
    """Whether any of the methods is searched, so that more trials make sense."""
    return any(METHODS[name].kind != "fixed" for name in methods)


def _name(spec: JobSpec) -> str:
    """What a job is called whose owner did not name it."""
    if spec.kind == "benchmark":
        named = spec.tasks[0] if len(spec.tasks) == 1 else f"{len(spec.tasks)} benchmarks"
        return f"{spec.model}, {named}"
    if spec.kind == "evaluate":
        return f"{spec.model} as it is" if spec.original is None else f"{spec.model} compared"
    if len(spec.methods) > 2:
        return f"{spec.model}, {len(spec.methods)} methods"
    return f"{spec.model}, {' and '.join(METHODS[name].title for name in spec.methods)}"


def _known(session: Session, user: User, key: str | None) -> Job | None:
    if key is None:
        return None
    return session.scalars(
        select(Job).where(Job.owner_id == user.id, Job.idempotency_key == key)
    ).one_or_none()


def lock_user(session: Session, user: User) -> None:
    """Make the user's submits wait for one another, so that none counts past another."""
    session.execute(select(User.id).where(User.id == user.id).with_for_update(key_share=True))


def require_trials(trials: int, settings: Settings) -> None:
    """Invalid when a budget is over the operator's limit."""
    if trials > settings.max_trials:
        raise Invalid(f"At most {settings.max_trials} trials are allowed here.", field="trials")


def require_judge(judge: str | None, settings: Settings) -> None:
    """Invalid when a job names a judge that the operator has not set up."""
    if judge is not None and judge not in settings.judges:
        known = ", ".join(sorted(settings.judges)) or "none: the operator sets NULLSPACE_JUDGES"
        raise Invalid(f"There is no judge {judge!r} here; known: {known}.", field="judge")


def require_quota(session: Session, user: User, settings: Settings) -> None:
    """TooMany when the user has as many queued and running jobs as allowed. Holds lock_user."""
    busy = session.execute(
        select(func.count()).where(Job.owner_id == user.id, Job.state.in_(("queued", "running")))
    ).scalar_one()
    if busy >= settings.max_running:
        raise TooMany(
            f"You have {busy} queued or running jobs and may have {settings.max_running}. "
            "Wait for one to end, or pause or cancel one."
        )


def require_space(settings: Settings) -> None:
    """NoSpace when the data folder's disk has less left than the reserve."""
    folder: Path = settings.data
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < settings.disk_reserve_bytes:
        raise NoSpace(
            f"The server's disk has {free / 1e9:.1f} GB left and keeps "
            f"{settings.disk_reserve_bytes / 1e9:.1f} GB in reserve. Delete artifacts or ask the "
            "operator for room."
        )
