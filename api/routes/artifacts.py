"""Artifacts: ask for files made from a trial, and download them, resumably."""

from __future__ import annotations

import datetime as dt
import uuid
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, Field
from sqlalchemy.orm import Session

from api.auth import Caller, Reader, Writer
from api.bodies import Body
from api.problems import errors
from api.ranges import send_file
from api.routes.jobs import MISSING, NOT_YOURS
from api.routes.trials import NO_TRIAL, Number
from jobs import artifacts, control, queue
from jobs.problems import Conflict, NotFound
from jobs.states import ArtifactKind, ArtifactState
from jobs.tables import Artifact, ArtifactFile

router = APIRouter(tags=["artifacts"])
NO_ARTIFACT = "No such artifact, or one of another member's private job."
NOT_READY = "The artifact is not ready (yet); its state says why."
RANGES: dict[int | str, dict[str, Any]] = {
    206: {"description": "The bytes asked for with Range."},
    304: {"description": "The client has this file already (If-None-Match)."},
    416: {"description": "Range begins behind the end; Content-Range holds the size."},
}


class ArtifactRequest(Body):
    """What to make of a trial."""

    kind: ArtifactKind = "merged"
    rank: int | None = Field(None, ge=1, le=1024, description="of adapter and lora; default 8")


class FileView(BaseModel):
    """One file of an artifact."""

    name: str
    size: int = Field(description="bytes")
    sha256: str
    url: str


class ArtifactView(BaseModel):
    """Files made from a trial; `files` is filled once `state` is ready."""

    id: uuid.UUID
    job_id: uuid.UUID
    trial: int
    kind: ArtifactKind
    rank: int | None
    state: ArtifactState
    size: int | None = Field(description="bytes of all files")
    measured: dict[str, Any] | None = Field(description="scores of the files as loaded from disk")
    truncation_error: float | None
    error: dict[str, Any] | None
    created_at: dt.datetime
    finished_at: dt.datetime | None
    files: list[FileView] = []


def view(row: Artifact, files: list[ArtifactFile]) -> ArtifactView:
    """A row of the table `artifacts` as the API shows it."""
    return ArtifactView(
        id=row.id,
        job_id=row.job_id,
        trial=row.trial_number,
        kind=row.kind,
        rank=row.rank,
        state=row.state,
        size=row.size,
        measured=row.measured,
        truncation_error=row.truncation_error,
        error=row.error,
        created_at=row.created_at,
        finished_at=row.finished_at,
        files=[
            FileView(
                name=file.name,
                size=file.size,
                sha256=file.sha256,
                url=f"/api/v1/artifacts/{row.id}/files/{quote(file.name)}",
            )
            for file in files
        ],
    )


@router.post(
    "/jobs/{job_id}/trials/{number}/artifacts",
    status_code=202,
    responses=errors(
        {403: NOT_YOURS, 404: NO_TRIAL, 409: "The trial is not complete.", 422: "Kind or rank."}
    ),
)
def request_artifact(
    who: Writer,
    job_id: uuid.UUID,
    number: Number,
    response: Response,
    wanted: ArtifactRequest | None = None,
) -> ArtifactView:
    """Have files made from a trial. The same again gives the artifact that exists."""
    asked = wanted or ArtifactRequest.model_validate({})
    with who.begin() as session:
        job = control.editable(session, who.user, job_id)
        row = artifacts.request(session, who.user, job, number, asked.kind, asked.rank)
        tasks = queue.claimable_of(session, job_id)
        found = view(row, artifacts.files(session, row.id))
    who.doorbell.ring(tasks)
    who.doorbell.nudge(job_id)
    response.headers["Location"] = f"/api/v1/artifacts/{found.id}"
    return found


@router.get("/jobs/{job_id}/artifacts", responses=errors({404: MISSING}))
def list_artifacts(who: Reader, job_id: uuid.UUID) -> list[ArtifactView]:
    """The job's artifacts, newest first."""
    with who.begin() as session:
        control.visible(session, who.user, job_id)
        rows = artifacts.list_for_job(session, job_id)
        return [view(row, artifacts.files(session, row.id)) for row in rows]


@router.get("/artifacts/{artifact_id}", responses=errors({404: NO_ARTIFACT}))
def show_artifact(who: Reader, artifact_id: uuid.UUID) -> ArtifactView:
    """An artifact: state, measured scores, files with their sha256."""
    with who.begin() as session:
        row = artifacts.get(session, who.user, artifact_id)
        return view(row, artifacts.files(session, artifact_id))


def _ready_files(session: Session, who: Caller, artifact_id: uuid.UUID) -> list[ArtifactFile]:
    row = artifacts.get(session, who.user, artifact_id)
    if row.state != "ready":
        raise Conflict(f"The artifact is {row.state}; its files can be had when it is ready.")
    return artifacts.files(session, artifact_id)


@router.get(
    "/artifacts/{artifact_id}/SHA256SUMS",
    response_class=PlainTextResponse,
    responses=errors({404: NO_ARTIFACT, 409: NOT_READY}),
)
def show_checksums(who: Reader, artifact_id: uuid.UUID) -> PlainTextResponse:
    """Checksums of all files, for `sha256sum -c SHA256SUMS` in the download's folder."""
    with who.begin() as session:
        rows = _ready_files(session, who, artifact_id)
    # the folder has its own SHA256SUMS; a list that is kept under that name cannot hold its own sum
    listed = [row for row in rows if row.name != "SHA256SUMS"]
    return PlainTextResponse("".join(f"{row.sha256}  {row.name}\n" for row in listed))


@router.head("/artifacts/{artifact_id}/files/{name:path}", include_in_schema=False)
@router.get(
    "/artifacts/{artifact_id}/files/{name:path}",
    response_class=Response,
    responses={
        200: {
            "description": "The file; ETag is its sha256.",
            "content": {"application/octet-stream": {"schema": {"type": "string"}}},
        },
        **RANGES,
        **errors({404: NO_ARTIFACT + " Or no such file in it.", 409: NOT_READY}),
    },
)
def download_file(who: Reader, artifact_id: uuid.UUID, name: str, request: Request) -> Response:
    """One file. Range, If-Range and If-None-Match are honoured, so downloads can be resumed."""
    with who.begin() as session:
        rows = _ready_files(session, who, artifact_id)
    row = next((row for row in rows if row.name == name), None)
    if row is None:
        raise NotFound("The artifact has no such file. GET the artifact to see their names.")
    path = artifacts.path(who.settings, artifact_id, row.name)
    if not path.is_file() or path.stat().st_size != row.size:
        raise NotFound("The file is gone from the server's disk. Ask for the artifact again.")
    return send_file(request, path, path.name, row.sha256)
