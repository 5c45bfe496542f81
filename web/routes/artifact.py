"""The page of one artifact: its files, how to fetch and how to load them."""

from __future__ import annotations

import uuid

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from jobs import artifacts
from jobs.tables import Job
from web.render import page
from web.session import visit
from web.views import artifacts as views
from web.views import scores

router = APIRouter()


@router.get("/artifacts/{artifact_id}")
def show_artifact(request: Request, artifact_id: uuid.UUID, still: bool = False) -> HTMLResponse:
    """Files with digests, scores after export, commands."""
    with visit(request) as here:
        row = artifacts.get(here.session, here.user, artifact_id)
        job = here.session.get_one(Job, row.job_id)
        files = artifacts.files(here.session, artifact_id)
    item = views.view(row)
    baseline = (job.prepared or {}).get("baseline") or {}
    return page(
        request,
        "artifact.html",
        here.user,
        artifact=item,
        job=job,
        files=files,
        still=still,
        original={role: scores.score(baseline.get(role)) for role in item.measured},
        labels=scores.ROLES,
        explained=views.EXPLAINED[item.kind],
        download=views.download(here.settings.public_url.rstrip("/"), item.id, files),
        usage=views.usage(item.kind, f"nullspace-{item.id[:8]}", job.model),
        live=item.state in ("queued", "running"),
    )
