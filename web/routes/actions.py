"""What a person does to a job: pause, resume, cancel, more trials."""

from __future__ import annotations

import uuid
from collections.abc import Callable

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, RedirectResponse
from sqlalchemy.orm import Session
from starlette.responses import Response

from jobs import control, queue
from jobs.problems import Invalid, Problem, Unauthenticated
from jobs.tables import Job, User
from web.forms import Fields, text_of
from web.render import page
from web.routes.job import job_page
from web.session import visit

router = APIRouter()
Act = Callable[[Session, User, Job], object]


def change(request: Request, job_id: uuid.UUID, act: Act) -> None:
    """Do `act` to the job in a transaction of its own, then ring and nudge."""
    with visit(request) as here:
        act(here.session, here.user, control.editable(here.session, here.user, job_id))
        tasks = queue.claimable_of(here.session, job_id)
    request.app.state.doorbell.ring(tasks)
    request.app.state.doorbell.nudge(job_id)


def changed(request: Request, job_id: uuid.UUID, act: Act, done: str) -> Response:
    """`change`, then the job's page: with a notice, or with what was wrong."""
    try:
        change(request, job_id, act)
    except Unauthenticated:
        raise
    except Problem as problem:
        if problem.status == 404:
            raise
        return job_page(request, job_id, problem=problem)
    return RedirectResponse(f"/jobs/{job_id}?done={done}", status_code=303)


@router.post("/jobs/{job_id}/pause")
def pause(request: Request, job_id: uuid.UUID) -> Response:
    """Pause the job."""
    return changed(request, job_id, control.pause, "paused")


@router.post("/jobs/{job_id}/resume")
def resume(request: Request, job_id: uuid.UUID) -> Response:
    """Let a paused or failed job go on, within its owner's quota."""
    settings = request.app.state.settings
    return changed(
        request,
        job_id,
        lambda session, user, job: control.resume(session, user, job, settings),
        "resumed",
    )


@router.get("/jobs/{job_id}/cancel")
def confirm_cancel(request: Request, job_id: uuid.UUID) -> HTMLResponse:
    """Ask before a job is ended for good."""
    with visit(request) as here:
        job = control.editable(here.session, here.user, job_id)
    return page(request, "cancel.html", here.user, job=job)


@router.post("/jobs/{job_id}/cancel")
def cancel(request: Request, job_id: uuid.UUID) -> Response:
    """End the job."""
    return changed(request, job_id, control.cancel, "cancelled")


@router.post("/jobs/{job_id}/trials")
def set_trials(request: Request, job_id: uuid.UUID, fields: Fields) -> Response:
    """Another budget of trials. A completed job goes on when it grows."""
    wanted = text_of(fields, "trials").strip()
    settings = request.app.state.settings

    def amend(session: Session, user: User, job: Job) -> None:
        if not (wanted.isascii() and wanted.isdigit() and len(wanted) < 9):
            raise Invalid("Write the number of trials in digits.", field="trials")
        control.amend(session, user, job, trials=int(wanted), settings=settings)

    return changed(request, job_id, amend, "more")
