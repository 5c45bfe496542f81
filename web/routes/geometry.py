"""The page on how prompts lie in the residual stream of a job's model."""

from __future__ import annotations

import uuid

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from jobs import analysis, control
from jobs.problems import NotFound
from web.render import page
from web.session import visit
from web.views import geometry as views

router = APIRouter()


@router.get("/jobs/{job_id}/geometry")
def show_geometry(request: Request, job_id: uuid.UUID) -> HTMLResponse:
    """Lines over the layers, a table, a projection of each; or why there is none."""
    with visit(request) as here:
        job = control.visible(here.session, here.user, job_id)
        try:
            found = analysis.geometry(here.session, job)
        except NotFound as missing:
            return page(request, "geometry.html", here.user, job=job, missing=missing.detail)
    return page(
        request,
        "geometry.html",
        here.user,
        job=job,
        missing="",
        charts=views.charts(found),
        rows=views.rows(found),
        planes=views.planes(job_id, found),
        shown=[len(side) for side in found.points[0]],
    )
