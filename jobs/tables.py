"""The tables. PostgreSQL is the queue and the truth; its clock is the only clock.

A column that only a lease holder may write is marked [fenced].
"""

from __future__ import annotations

import datetime as dt
import math
import uuid
from typing import Any, ClassVar

from sqlalchemy import (
    BigInteger,
    DateTime,
    ForeignKey,
    Index,
    Sequence,
    String,
    TypeDecorator,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from jobs.states import (
    ArtifactKind,
    ArtifactState,
    Desired,
    JobState,
    TaskKind,
    TaskState,
    TrialState,
)

lease_tokens = Sequence("lease_tokens")


class Json(TypeDecorator[Any]):
    """JSONB that takes any text: what PostgreSQL cannot hold becomes U+FFFD.

    Models, logs and error messages may hold NUL characters and lone surrogates, and one of them
    must not keep a score from being written, nor may a number that JSON has no word for: NaN and
    the infinities become null. Python's None is SQL's NULL.
    """

    impl = JSONB(none_as_null=True)
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        """What is sent for `value`."""
        return _storable(value)


def _storable(value: Any) -> Any:
    if isinstance(value, str):
        plain = value.replace("\x00", "\ufffd")
        # "surrogatepass" and back: pairs become their character, lone halves are replaced
        return plain.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {_storable(key): _storable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_storable(item) for item in value]
    return value


class Base(DeclarativeBase):
    """All tables."""

    type_annotation_map: ClassVar[dict[Any, Any]] = {
        dict[str, Any]: Json(),
        list[str]: ARRAY(String),
        list[Any]: Json(),
        dt.datetime: DateTime(timezone=True),
        int: BigInteger,
        JobState: String,
        Desired: String,
        TaskKind: String,
        TaskState: String,
        TrialState: String,
        ArtifactKind: String,
        ArtifactState: String,
    }


Base.metadata.naming_convention = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}


def _id() -> Mapped[uuid.UUID]:
    return mapped_column(primary_key=True, default=uuid.uuid4)


def _now() -> Mapped[dt.datetime]:
    return mapped_column(server_default=func.now())


class User(Base):
    """A person. `role`: viewer, member or admin."""

    __tablename__ = "users"
    id: Mapped[uuid.UUID] = _id()
    email: Mapped[str] = mapped_column(unique=True)
    name: Mapped[str] = mapped_column(default="")
    role: Mapped[str] = mapped_column(default="member")
    password_hash: Mapped[str | None]
    weight: Mapped[float] = mapped_column(default=1.0)
    disabled: Mapped[bool] = mapped_column(default=False)
    created_at: Mapped[dt.datetime] = _now()


class Token(Base):
    """An API token: shown once, kept as an HMAC. `prefix` is what a person recognises it by."""

    __tablename__ = "tokens"
    id: Mapped[uuid.UUID] = _id()
    user_id: Mapped[uuid.UUID] = mapped_column(
        ForeignKey("users.id", ondelete="CASCADE"), index=True
    )
    name: Mapped[str] = mapped_column(default="")
    prefix: Mapped[str]
    digest: Mapped[str] = mapped_column(unique=True)
    scopes: Mapped[list[str]] = mapped_column(default=list)
    created_at: Mapped[dt.datetime] = _now()
    expires_at: Mapped[dt.datetime | None]
    last_used_at: Mapped[dt.datetime | None]
    revoked_at: Mapped[dt.datetime | None]


class WebSession(Base):
    """A browser that signed in. The cookie's HMAC is the key."""

    __tablename__ = "web_sessions"
    digest: Mapped[str] = mapped_column(primary_key=True)
    user_id: Mapped[uuid.UUID] = mapped_column(
        ForeignKey("users.id", ondelete="CASCADE"), index=True
    )
    created_at: Mapped[dt.datetime] = _now()
    expires_at: Mapped[dt.datetime]


class SignInAttempt(Base):
    """Failed sign-ins, for the rate limit."""

    __tablename__ = "sign_in_attempts"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    email: Mapped[str] = mapped_column(index=True)
    address: Mapped[str] = mapped_column(default="")
    at: Mapped[dt.datetime] = _now()


class PromptSet(Base):
    """A named list of prompts. `prompts`: [{"prompt": str, "split": str | null}, ...]."""

    __tablename__ = "prompt_sets"
    id: Mapped[uuid.UUID] = _id()
    name: Mapped[str] = mapped_column(unique=True)
    owner_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("users.id", ondelete="SET NULL"))
    note: Mapped[str] = mapped_column(default="")
    prompts: Mapped[list[Any]]
    count: Mapped[int]
    sha256: Mapped[str]
    created_at: Mapped[dt.datetime] = _now()


class Job(Base):
    """What a person submitted. `spec` is a `jobs.spec.job.JobSpec`."""

    __tablename__ = "jobs"
    id: Mapped[uuid.UUID] = _id()
    owner_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id"), index=True)
    name: Mapped[str]
    model: Mapped[str]
    spec: Mapped[dict[str, Any]]
    # Texts of every role as they were at submit (a `PromptTexts`): a later change of a prompt set
    # must not change a running job.
    prompts: Mapped[dict[str, Any]] = mapped_column(deferred=True)
    state: Mapped[JobState] = mapped_column(default="queued", index=True)
    desired_state: Mapped[Desired] = mapped_column(default="run")
    trials: Mapped[int]
    priority: Mapped[int] = mapped_column(default=0)
    parallelism: Mapped[int] = mapped_column(default=1)
    private: Mapped[bool] = mapped_column(default=False)
    commit: Mapped[str | None]
    # {"phase", "done", "total", "text"} of the task that wrote last [fenced]
    progress: Mapped[dict[str, Any]] = mapped_column(default=dict)
    # a `Prepared` without texts: anatomy, baseline scores, sizes [fenced]
    prepared: Mapped[dict[str, Any] | None]
    # a `Geometry`, tens of kilobytes; read it with `jobs.analysis` [fenced]
    geometry: Mapped[dict[str, Any] | None] = mapped_column(deferred=True)
    # trial number -> `jobs.warm.WarmStart`; None until its search is at the first of them [fenced]
    warm_starts: Mapped[dict[str, Any] | None]
    # what a job without a search found out: a `jobs.results.Result` [fenced]
    result: Mapped[dict[str, Any] | None]
    # {"reason", "message", "mend"} of a failed or auto-paused job
    error: Mapped[dict[str, Any] | None]
    idempotency_key: Mapped[str | None]
    event_seq: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[dt.datetime] = _now()
    started_at: Mapped[dt.datetime | None]
    finished_at: Mapped[dt.datetime | None]
    __table_args__ = (UniqueConstraint("owner_id", "idempotency_key"),)


class Task(Base):
    """What a worker can claim. The lease is (token, owner, expiry)."""

    __tablename__ = "tasks"
    id: Mapped[uuid.UUID] = _id()
    job_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), index=True)
    kind: Mapped[TaskKind]
    state: Mapped[TaskState] = mapped_column(default="ready")
    payload: Mapped[dict[str, Any]] = mapped_column(default=dict)
    lease_token: Mapped[int | None]
    lease_owner: Mapped[uuid.UUID | None]
    lease_expires_at: Mapped[dt.datetime | None]
    # claims so far, and engine deaths in a row (reset by a finished trial)
    attempts: Mapped[int] = mapped_column(default=0)
    crashes: Mapped[int] = mapped_column(default=0)
    error: Mapped[dict[str, Any] | None]
    created_at: Mapped[dt.datetime] = _now()
    started_at: Mapped[dt.datetime | None]
    finished_at: Mapped[dt.datetime | None]
    __table_args__ = (Index("ix_tasks_claimable", "state", "lease_expires_at"),)


class Trial(Base):
    """One slot of a job's budget. `number` is 0..trials-1, each complete at most once.

    A slot whose worker died keeps its number and candidate; the next worker scores it again.
    """

    __tablename__ = "trials"
    id: Mapped[uuid.UUID] = _id()
    job_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    number: Mapped[int]
    state: Mapped[TrialState] = mapped_column(default="running")
    method: Mapped[str] = mapped_column(default="mpoa")  # of `jobs.spec.methods`
    # single_pass, selected, plain, warm_start, sampler
    origin: Mapped[str] = mapped_column(default="sampler")
    params: Mapped[dict[str, Any]] = mapped_column(default=dict)  # Optuna's view
    candidate: Mapped[dict[str, Any]]
    optuna_number: Mapped[int | None]
    refusals: Mapped[int | None]
    total: Mapped[int | None]
    # not decoded to the end, since a finished trial dominates it: `total` prompts were answered
    screened: Mapped[bool] = mapped_column(default=False)
    kl_first: Mapped[float | None]
    kl_multi: Mapped[float | None]
    mean_tokens: Mapped[float | None]
    # further scores on the search prompts: name -> `Value`
    values: Mapped[dict[str, Any]] = mapped_column(default=dict)
    heldout: Mapped[dict[str, Any] | None]  # a `Scores`
    over_refusal: Mapped[dict[str, Any] | None]  # a `Scores`
    picked: Mapped[bool] = mapped_column(default=False)
    lease_token: Mapped[int | None]
    seconds: Mapped[float | None]
    created_at: Mapped[dt.datetime] = _now()
    finished_at: Mapped[dt.datetime | None]
    __table_args__ = (UniqueConstraint("job_id", "number"),)


class TrialResponses(Base):
    """What the edited model said, per role: a list of `Outcome` in the order of the prompts.

    The original's are kept under the trial number -1, those of the model that a job of kind
    evaluate scores under -2.
    """

    __tablename__ = "trial_responses"
    job_id: Mapped[uuid.UUID] = mapped_column(
        ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True
    )
    number: Mapped[int] = mapped_column(primary_key=True)
    role: Mapped[str] = mapped_column(primary_key=True)
    outcomes: Mapped[list[Any]]


class Event(Base):
    """What happened to a job, numbered from 1 without gaps. The source of the live view."""

    __tablename__ = "events"
    job_id: Mapped[uuid.UUID] = mapped_column(
        ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True
    )
    seq: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]  # job, task, trial, progress, artifact, log
    payload: Mapped[dict[str, Any]]
    at: Mapped[dt.datetime] = _now()


class Artifact(Base):
    """Files made from a trial. They lie under `<data>/artifacts/<id>/` once the row is `ready`."""

    __tablename__ = "artifacts"
    id: Mapped[uuid.UUID] = _id()
    job_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), index=True)
    task_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("tasks.id", ondelete="SET NULL"))
    trial_number: Mapped[int]
    kind: Mapped[ArtifactKind]
    rank: Mapped[int | None]
    state: Mapped[ArtifactState] = mapped_column(default="queued")
    size: Mapped[int | None]
    measured: Mapped[dict[str, Any] | None]
    truncation_error: Mapped[float | None]
    error: Mapped[dict[str, Any] | None]
    created_at: Mapped[dt.datetime] = _now()
    finished_at: Mapped[dt.datetime | None]


class ArtifactFile(Base):
    """One file of a ready artifact."""

    __tablename__ = "artifact_files"
    artifact_id: Mapped[uuid.UUID] = mapped_column(
        ForeignKey("artifacts.id", ondelete="CASCADE"), primary_key=True
    )
    name: Mapped[str] = mapped_column(primary_key=True)
    size: Mapped[int]
    sha256: Mapped[str]


class Worker(Base):
    """A worker process that called in. `device`: {"kind", "name", "memory_bytes"}."""

    __tablename__ = "workers"
    id: Mapped[uuid.UUID] = _id()
    name: Mapped[str]
    host: Mapped[str]
    pid: Mapped[int]
    accepts: Mapped[list[str]]
    device: Mapped[dict[str, Any]] = mapped_column(default=dict)
    versions: Mapped[dict[str, Any]] = mapped_column(default=dict)
    started_at: Mapped[dt.datetime] = _now()
    last_seen_at: Mapped[dt.datetime] = _now()
    stopped_at: Mapped[dt.datetime | None]


class Webhook(Base):
    """An address that is told of a user's jobs. `secret` signs (standard-webhooks)."""

    __tablename__ = "webhooks"
    id: Mapped[uuid.UUID] = _id()
    owner_id: Mapped[uuid.UUID] = mapped_column(
        ForeignKey("users.id", ondelete="CASCADE"), index=True
    )
    url: Mapped[str]
    secret: Mapped[str]
    kinds: Mapped[list[str]] = mapped_column(default=list)
    disabled: Mapped[bool] = mapped_column(default=False)
    created_at: Mapped[dt.datetime] = _now()


class WebhookDelivery(Base):
    """One message to one webhook, and how it went."""

    __tablename__ = "webhook_deliveries"
    id: Mapped[uuid.UUID] = _id()
    webhook_id: Mapped[uuid.UUID] = mapped_column(
        ForeignKey("webhooks.id", ondelete="CASCADE"), index=True
    )
    body: Mapped[dict[str, Any]]
    attempts: Mapped[int] = mapped_column(default=0)
    next_at: Mapped[dt.datetime | None] = mapped_column(server_default=func.now(), index=True)
    status: Mapped[int | None]
    error: Mapped[str] = mapped_column(default="")
    delivered_at: Mapped[dt.datetime | None]
    created_at: Mapped[dt.datetime] = _now()


class Audit(Base):
    """Who changed what; written in the transaction of the change."""

    __tablename__ = "audit"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    user_id: Mapped[uuid.UUID | None]
    action: Mapped[str]
    subject: Mapped[str]
    detail: Mapped[dict[str, Any]] = mapped_column(default=dict, server_default=text("'{}'::jsonb"))
    at: Mapped[dt.datetime] = _now()
