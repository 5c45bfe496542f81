"""Jobs: submit, list, look, pause, resume, cancel, change."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Header, Query, Response
from pydantic import BaseModel, Field, field_validator
from sqlalchemy.orm import Session

from api.auth import Caller, Reader, Writer
from api.bodies import Body
from api.problems import errors
from jobs import control, listing, queue, submit
from jobs.listing import JobView
from jobs.problems import Conflict, Invalid
from jobs.spec.job import JobSpec, Kind
from jobs.states import JobState
from jobs.tables import Job, User

router = APIRouter(tags=["jobs"])
MISSING = "No such job, or another member's private one."
NOT_YOURS = "Another member's job (only its owner and admins may change it), or a viewer's token."


class JobPage(BaseModel):
    """Jobs, newest first."""

    items: list[JobView]
    next: str | None = Field(None, description="`cursor` of the next page; null on the last")


class JobChange(Body):
    """What can be changed of a job. Fields left out stay as they are."""

    trials: Annotated[int, Field(ge=1, le=10_000)] | None = None
    priority: Annotated[int, Field(ge=-10, le=10)] | None = None
    parallelism: Annotated[int, Field(ge=1, le=64)] | None = None
    name: Annotated[str, Field(min_length=1, max_length=120)] | None = None

    @field_validator("name")
    @classmethod
    def _no_nul(cls, value: str | None) -> str | None:
        if value is not None and "\x00" in value:
            raise ValueError("must not hold NUL characters")
        return value


@router.post(
    "/jobs",
    status_code=201,
    responses={
        200: {"model": JobView, "description": "This Idempotency-Key was used: the job it made."},
        **errors(
            {
                403: "A viewer, or a token without the scope `write`.",
                409: "This Idempotency-Key was used for a different job.",
                422: "A field is wrong; each is named with its mend. So is an unknown model.",
                429: "Too many queued or running jobs of this member.",
                507: "The disk is nearly full; nothing was accepted.",
            }
        ),
    },
)
def submit_job(
    who: Writer,
    spec: JobSpec,
    response: Response,
    idempotency_key: Annotated[
        str | None,
        Header(
            min_length=1,
            max_length=200,
            pattern=r"^[\x21-\x7e]+$",
            description="A name of your choice, best a UUID: sent again, no second job is made.",
        ),
    ] = None,
) -> JobView:
    """Submit a job. Sent twice with the same Idempotency-Key, it is made once.

    `kind`: `abliterate` searches for edits; `evaluate` scores a model as it is, or against
    `original`; `benchmark` runs `tasks` on it. Fields that a kind has no use for are refused.
    """
    with who.begin() as session:
        job, created = submit.submit(
            session, who.user, spec, who.settings, idempotency_key=idempotency_key
        )
        if not created and JobSpec.model_validate(job.spec) != spec:
            raise Conflict(
                "This Idempotency-Key was used for a different job. Use a new key.",
                field="Idempotency-Key",
            )
        tasks = queue.claimable_of(session, job.id)
        view = listing.summary(session, job, who.settings)
    who.doorbell.ring(tasks)
    response.headers["Location"] = f"/api/v1/jobs/{view.id}"
    if not created:
        response.status_code = 200
    return view


@router.get("/jobs", responses=errors({422: "A filter or the cursor is wrong."}))
def list_jobs(
    who: Reader,
    state: Annotated[JobState | None, Query(description="only jobs in this state")] = None,
    kind: Annotated[Kind | None, Query(description="only jobs of this kind")] = None,
    mine: Annotated[bool, Query(description="only one's own")] = False,
    q: Annotated[str | None, Query(max_length=200, description="part of name or model")] = None,
    cursor: Annotated[str | None, Query(max_length=500, description="`next` of a page")] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> JobPage:
    """Jobs that the caller may see, newest first."""
    with who.begin() as session:
        found, following = listing.list_jobs(
            session, who.user, state=state, kind=kind, mine=mine, q=q, limit=limit, cursor=cursor
        )
        return JobPage(
            items=[listing.summary(session, job, who.settings) for job in found], next=following
        )


@router.get("/jobs/{job_id}", responses=errors({404: MISSING}))
def show_job(who: Reader, job_id: uuid.UUID) -> JobView:
    """A job: state, why it waits and its place in the queue, progress, ETA, best trial."""
    with who.begin() as session:
        return listing.summary(session, control.visible(session, who.user, job_id), who.settings)


CHANGES = errors(
    {403: NOT_YOURS, 404: MISSING, 409: "The job is in a state in which this is not possible."}
)


@router.post("/jobs/{job_id}/pause", responses=CHANGES)
def pause_job(who: Writer, job_id: uuid.UUID) -> JobView:
    """Pause: running trials are finished or given up, the GPU is free within 30 seconds."""
    return _changed(who, job_id, control.pause)


@router.post(
    "/jobs/{job_id}/resume",
    responses={**CHANGES, **errors({429: "Too many queued or running jobs of this member."})},
)
def resume_job(who: Writer, job_id: uuid.UUID) -> JobView:
    """Go on with a paused or failed job. Nothing that was scored is scored again."""

    def resume(session: Session, user: User, job: Job) -> Job:
        return control.resume(session, user, job, who.settings)

    return _changed(who, job_id, resume)


@router.post("/jobs/{job_id}/cancel", responses=CHANGES)
def cancel_job(who: Writer, job_id: uuid.UUID) -> JobView:
    """End a job for good. Its finished trials and artifacts stay."""
    return _changed(who, job_id, control.cancel)


@router.patch(
    "/jobs/{job_id}",
    responses=errors(
        {
            403: NOT_YOURS,
            404: MISSING,
            409: "The job is in a state in which this is not possible.",
            422: "A field is wrong, or none was sent.",
        }
    ),
)
def change_job(who: Writer, job_id: uuid.UUID, change: JobChange) -> JobView:
    """More trials, another priority, more or fewer workers, another name."""
    wanted = change.model_dump(exclude_none=True)
    if not wanted:
        raise Invalid(
            "Nothing to change. Send one of trials, priority, parallelism, name.", field="body"
        )

    def amend(session: Session, user: User, job: Job) -> Job:
        return control.amend(session, user, job, **wanted, settings=who.settings)

    return _changed(who, job_id, amend)


def _changed(who: Caller, job_id: uuid.UUID, act: Callable[[Session, User, Job], Job]) -> JobView:
    with who.begin() as session:
        job = act(session, who.user, control.editable(session, who.user, job_id))
        tasks = queue.claimable_of(session, job_id)
        view = listing.summary(session, job, who.settings)
    who.doorbell.ring(tasks)
    who.doorbell.nudge(job_id)
    return view
