"""Artifacts: files made from a trial, asked for by a person and written by an export task."""

from __future__ import annotations

import uuid
from pathlib import Path, PurePosixPath
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from jobs import audit, control, events, lifecycle, queue, trials, webhooks
from jobs.problems import Conflict, Invalid, LeaseLost, NotFound
from jobs.settings import Settings
from jobs.spec.protocol import Exported
from jobs.states import ArtifactKind
from jobs.tables import Artifact, ArtifactFile, Job, Task, User

KINDS: tuple[ArtifactKind, ...] = ("merged", "adapter", "lora")
DEFAULT_RANK = 8


def kinds(candidate: dict[str, Any]) -> tuple[ArtifactKind, ...]:
    """What can be made of a candidate, as its JSON: PEFT cannot hold a router's bias."""
    return ("merged",) if candidate.get("router") else KINDS


def request(
    session: Session,
    user: User,
    job: Job,
    number: int,
    kind: ArtifactKind,
    rank: int | None = None,
) -> Artifact:
    """Ask for an artifact of a complete trial; an export task is created.

    The same kind (and rank) again gives the existing one unless that failed or was cancelled.
    Conflict when the trial has no scores yet; Invalid for an unknown kind or a rank out of 1..1024.
    """
    control.require_editable(user, job)
    if kind not in KINDS:
        raise Invalid(f"{kind!r} is none of {', '.join(KINDS)}.", field="kind")
    if rank is not None and not 1 <= rank <= 1024:
        raise Invalid("The rank must be between 1 and 1024.", field="rank")
    locked = lifecycle.lock(session, job.id)
    trial = trials.get(session, job.id, number)
    if trial.state != "complete":
        raise Conflict(f"Trial {number} is not complete, so there is nothing to export yet.")
    if kind not in kinds(trial.candidate):
        raise Invalid(
            f"Trial {number} changes the biases of routers, which no adapter can hold. "
            "Export the merged model.",
            field="kind",
        )
    wanted = None if kind == "merged" else (rank or DEFAULT_RANK)
    existing = session.scalars(
        select(Artifact).where(
            Artifact.job_id == job.id,
            Artifact.trial_number == number,
            Artifact.kind == kind,
            Artifact.rank == wanted if wanted is not None else Artifact.rank.is_(None),
            Artifact.state.in_(("queued", "running", "ready")),
        )
    ).first()
    if existing is not None:
        return existing
    artifact = Artifact(id=uuid.uuid4(), job_id=job.id, trial_number=number, kind=kind, rank=wanted)
    payload: dict[str, Any] = {
        "artifact": str(artifact.id),
        "number": number,
        "kind": kind,
        "rank": wanted,
        **lifecycle.needs(locked),
    }
    task = Task(job_id=job.id, kind="export", payload=payload)
    session.add(task)
    session.flush()
    artifact.task_id = task.id
    session.add(artifact)
    session.flush()
    audit.record(session, user.id, "artifact.request", artifact.id, job=str(job.id), kind=kind)
    events.append(session, job.id, "artifact", summary(artifact))
    session.refresh(artifact)
    return artifact


def get(session: Session, user: User, artifact_id: uuid.UUID) -> Artifact:
    """An artifact of a job that `user` may see. NotFound."""
    artifact = session.get(Artifact, artifact_id, populate_existing=True)
    if artifact is None:
        raise NotFound("There is no such artifact.")
    control.visible(session, user, artifact.job_id)
    return artifact


def list_for_job(session: Session, job_id: uuid.UUID) -> list[Artifact]:
    """A job's artifacts, newest first."""
    return list(
        session.scalars(
            select(Artifact)
            .where(Artifact.job_id == job_id)
            .order_by(Artifact.created_at.desc(), Artifact.id)
        )
    )


def files(session: Session, artifact_id: uuid.UUID) -> list[ArtifactFile]:
    """The files of an artifact, by name."""
    return list(
        session.scalars(
            select(ArtifactFile)
            .where(ArtifactFile.artifact_id == artifact_id)
            .order_by(ArtifactFile.name)
        )
    )


def folder(settings: Settings, artifact_id: uuid.UUID) -> Path:
    """Where an artifact's files lie once it is ready."""
    return settings.artifacts / str(artifact_id)


def path(settings: Settings, artifact_id: uuid.UUID, name: str) -> Path:
    """The file `name` of an artifact. NotFound for a name that leads outside its folder."""
    plain = PurePosixPath(name)
    bad = "\x00" in name or "\\" in name or plain.is_absolute() or ".." in plain.parts
    if bad or not plain.parts:
        raise NotFound("The artifact has no such file.")
    base = folder(settings, artifact_id)
    found = base.joinpath(*plain.parts)
    # a symlink inside the folder must not lead out of it either
    if not found.resolve().is_relative_to(base.resolve()):
        raise NotFound("The artifact has no such file.")
    return found


def mark_running(session: Session, task: Task, token: int, artifact_id: uuid.UUID) -> Artifact:
    """Note that the export began. Fenced."""
    artifact = _held(session, task, token, artifact_id)
    if artifact.state in ("queued", "failed", "cancelled"):
        artifact.state, artifact.error = "running", None
        session.flush()
        events.append(session, artifact.job_id, "artifact", summary(artifact))
    return artifact


def mark_ready(
    session: Session, task: Task, token: int, artifact_id: uuid.UUID, exported: Exported
) -> None:
    """Publish an artifact whose files are in place (written, synced and renamed). Fenced."""
    artifact = _held(session, task, token, artifact_id)
    for known in files(session, artifact.id):
        session.delete(known)
    session.flush()
    for file in exported.files:
        session.add(
            ArtifactFile(
                artifact_id=artifact.id, name=file.name, size=file.size, sha256=file.sha256
            )
        )
    artifact.state = "ready"
    artifact.error = None
    artifact.size = sum(file.size for file in exported.files)
    artifact.measured = {
        role: scores.model_dump(mode="json") for role, scores in exported.measured.items()
    }
    artifact.truncation_error = exported.truncation_error
    artifact.finished_at = func.now()
    session.flush()
    events.append(session, artifact.job_id, "artifact", summary(artifact))
    webhooks.enqueue(session, session.get_one(Job, artifact.job_id), "artifact.ready")


def mark_failed(
    session: Session, task: Task, token: int, artifact_id: uuid.UUID, error: dict[str, Any]
) -> None:
    """Note why an artifact could not be made: {"reason", "message", "mend"}. Fenced."""
    artifact = _held(session, task, token, artifact_id)
    artifact.state, artifact.error = "failed", error
    artifact.finished_at = func.now()
    session.flush()
    events.append(session, artifact.job_id, "artifact", summary(artifact))


def _held(session: Session, task: Task, token: int, artifact_id: uuid.UUID) -> Artifact:
    held = queue.fence(session, task.id, token)
    artifact = session.get(Artifact, artifact_id, populate_existing=True)
    if artifact is None or artifact.task_id != held.id:
        raise LeaseLost(f"task {held.id} does not make artifact {artifact_id}")
    return artifact


def summary(artifact: Artifact) -> dict[str, Any]:
    """An artifact as events show it."""
    return {
        "id": str(artifact.id),
        "number": artifact.trial_number,
        "kind": artifact.kind,
        "rank": artifact.rank,
        "state": artifact.state,
        "size": artifact.size,
        "error": artifact.error,
    }
