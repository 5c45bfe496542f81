"""How jobs are shown: one view for the API, the pages and the command line."""

from __future__ import annotations

import base64
import binascii
import datetime as dt
import uuid
from statistics import median
from typing import Any

from pydantic import BaseModel, Field
from sqlalchemy import func, or_, select, tuple_
from sqlalchemy.orm import Session

from jobs import queue, results, trials
from jobs.problems import Invalid
from jobs.settings import Settings
from jobs.settings import settings as process_settings
from jobs.spec.job import Kind
from jobs.spec.scores import Role, Scores, Value
from jobs.states import Desired, JobState
from jobs.tables import Job, Trial, User


class TrialCounts(BaseModel):
    """Trials by state, and how many there will be."""

    complete: int
    running: int
    failed: int
    budget: int


class RoleScores(BaseModel):
    """Scores on the prompts of one role. KLs are in nats; null for over-refusal prompts."""

    refusals: int
    total: int
    interval: tuple[float, float] = Field(description="Wilson 95 % interval of the refusal rate")
    kl_first: float | None
    kl_multi: float | None
    mean_tokens: float
    values: dict[str, Value] = Field({}, description="further scores, by name")

    @classmethod
    def of(cls, scores: Scores | dict[str, Any] | None) -> RoleScores | None:
        """The view of scores, or of a stored `Scores` document."""
        if scores is None:
            return None
        known = Scores.model_validate(scores)
        return cls(interval=known.interval, **known.model_dump(exclude={"role"}))


class BestTrial(BaseModel):
    """The trial with the fewest refusals, and among those the least KL."""

    number: int
    refusals: int
    total: int
    kl_first: float
    kl_multi: float | None = None
    heldout: dict[str, Any] | None = None


class ResultView(BaseModel):
    """What a job that searches nothing found, by side; harness figures are `<task>.<metric>`."""

    original: dict[Role, RoleScores]
    model: dict[Role, RoleScores]
    benchmark: dict[trials.Side, dict[str, Value]]
    commit: str | None = Field(description="of the model, where it was loaded beside an original")
    warnings: list[str]

    @classmethod
    def of(cls, job: Job) -> ResultView | None:
        """None while nothing is known, and for jobs that search."""
        if job.result is None:
            return None
        found = results.of(job).model_dump()
        for side in results.NUMBERS:
            found[side] = {role: RoleScores.of(scores) for role, scores in found[side].items()}
        return cls.model_validate(found)


class JobView(BaseModel):
    """A job as people see it. `owner` is an e-mail address; `waiting` says why it does not run."""

    id: uuid.UUID
    kind: Kind
    name: str
    model: str
    owner: str
    state: JobState
    desired_state: Desired
    spec: dict[str, Any]
    priority: int
    parallelism: int
    waiting: str | None
    position: int | None
    progress: dict[str, Any]
    trials: TrialCounts
    eta_seconds: float | None
    baseline: dict[str, Any] | None
    best: BestTrial | None
    front_size: int
    prepared: dict[str, Any] | None
    result: ResultView | None = Field(None, description="of jobs of kind evaluate and benchmark")
    error: dict[str, Any] | None
    created_at: dt.datetime
    started_at: dt.datetime | None
    finished_at: dt.datetime | None
    private: bool
    commit: str | None
    event_seq: int


def list_jobs(
    session: Session,
    user: User,
    *,
    state: JobState | None = None,
    kind: Kind | None = None,
    mine: bool = False,
    q: str | None = None,
    limit: int = 50,
    cursor: str | None = None,
) -> tuple[list[Job], str | None]:
    """Jobs that `user` may see, newest first, and the cursor of the next page.

    `q` is looked for in names and models. Invalid(field="cursor") for one that was not ours.
    """
    query = select(Job).order_by(Job.created_at.desc(), Job.id.desc())
    if user.role != "admin":
        query = query.where(or_(Job.private.is_(False), Job.owner_id == user.id))
    if mine:
        query = query.where(Job.owner_id == user.id)
    if state is not None:
        query = query.where(Job.state == state)
    if kind is not None:
        query = query.where(func.coalesce(Job.spec["kind"].astext, "abliterate") == kind)
    if q:
        plain = q.replace("\x00", "")
        query = query.where(
            or_(
                Job.name.icontains(plain, autoescape=True),
                Job.model.icontains(plain, autoescape=True),
            )
        )
    if cursor is not None:
        query = query.where(tuple_(Job.created_at, Job.id) < _position(cursor))
    limit = max(1, min(limit, 200))
    found = list(session.scalars(query.limit(limit + 1)))
    more = len(found) > limit
    found = found[:limit]
    return found, _cursor(found[-1]) if more else None


def _cursor(job: Job) -> str:
    plain = f"{job.created_at.isoformat()} {job.id}"
    return base64.urlsafe_b64encode(plain.encode()).decode().rstrip("=")


def _position(cursor: str) -> tuple[dt.datetime, uuid.UUID]:
    try:
        plain = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode()
        at, _, job_id = plain.partition(" ")
        return dt.datetime.fromisoformat(at), uuid.UUID(job_id)
    except (ValueError, binascii.Error):
        raise Invalid("This cursor was not given out here.", field="cursor") from None


def summary(session: Session, job: Job, settings: Settings | None = None) -> JobView:
    """The view of one job."""
    counts = trials.counts(session, job.id)
    front = trials.front(session, job.id)
    best = min(front, key=_fewest, default=None)
    owner = session.get_one(User, job.owner_id)
    prepared = dict(job.prepared) if job.prepared else None
    baseline = prepared.pop("baseline", None) if prepared else None
    if prepared and isinstance(prepared.get("anatomy"), dict):
        # hundreds of writers are for the job's page, not for every list
        anatomy = dict(prepared["anatomy"])
        anatomy["writers"] = len(anatomy.get("writers", []))
        prepared["anatomy"] = anatomy
    return JobView(
        id=job.id,
        kind=job.spec.get("kind", "abliterate"),
        name=job.name,
        model=job.model,
        owner=owner.email,
        state=job.state,
        desired_state=job.desired_state,
        spec=job.spec,
        priority=job.priority,
        parallelism=job.parallelism,
        waiting=queue.waiting_reason(session, job, settings or process_settings()),
        position=queue.position(session, job),
        progress=job.progress,
        trials=TrialCounts(**counts, budget=job.trials),
        eta_seconds=eta_seconds(session, job, job.trials - counts["complete"]),
        baseline=baseline,
        best=None if best is None else _best(best),
        front_size=len(front),
        prepared=prepared,
        result=ResultView.of(job),
        error=job.error,
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
        private=job.private,
        commit=job.commit,
        event_seq=job.event_seq,
    )


def _fewest(row: Trial) -> tuple[float, float, int]:
    refusals = float("inf") if row.refusals is None else row.refusals
    return refusals, row.kl_first or 0.0, row.number


def _best(row: Trial) -> BestTrial:
    return BestTrial(
        number=row.number,
        refusals=row.refusals or 0,
        total=row.total or 0,
        kl_first=row.kl_first or 0.0,
        kl_multi=row.kl_multi,
        heldout=row.heldout,
    )


def eta_seconds(session: Session, job: Job, left: int) -> float | None:
    """Seconds until the search of a running job is done; None before three trials are known.

    The median of the last 20 trials' own seconds times the trials left, over the searchers.
    """
    if job.state != "running" or left <= 0:
        return None
    recent = session.scalars(
        select(Trial.seconds)
        .where(Trial.job_id == job.id, Trial.state == "complete", Trial.seconds.is_not(None))
        .order_by(Trial.finished_at.desc())
        .limit(20)
    ).all()
    if len(recent) < 3:
        return None
    searchers: int = session.execute(queue.RUNNING_SEARCHERS, {"job": job.id}).scalar_one()
    return median(float(seconds or 0.0) for seconds in recent) * left / max(1, searchers)


def count_by_state(session: Session) -> dict[str, int]:
    """How many jobs there are in each state."""
    rows = session.execute(select(Job.state, func.count()).group_by(Job.state))
    return {state: int(count) for state, count in rows}
