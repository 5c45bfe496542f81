"""The list of jobs."""

from __future__ import annotations

from typing import cast
from urllib.parse import urlencode

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from jobs import listing, workers
from jobs.problems import Invalid
from jobs.spec.job import Kind
from jobs.states import JobState
from web.render import page
from web.session import visit
from web.views import jobs as views

router = APIRouter()
PAGE = 25


@router.get("/")
def show_jobs(
    request: Request,
    state: str = "",
    kind: str = "",
    mine: str = "",
    q: str = "",
    cursor: str = "",
) -> HTMLResponse:
    """Jobs, newest first, filtered by state, owner and words."""
    chosen = state if state in views.STATES else ""
    of_kind = kind if kind in views.KINDS else ""
    words = q.strip()[:200]
    with visit(request) as here:
        try:
            found, following = listing.list_jobs(
                here.session,
                here.user,
                state=cast(JobState, chosen) if chosen else None,
                kind=cast(Kind, of_kind) if of_kind else None,
                mine=bool(mine),
                q=words or None,
                limit=PAGE,
                cursor=cursor or None,
            )
        except Invalid:
            # An old bookmark: begin again.
            cursor = ""
            found, following = listing.list_jobs(here.session, here.user, limit=PAGE)
        rows = [views.row(listing.summary(here.session, job, here.settings)) for job in found]
        running = workers.list_workers(here.session)
    filters = {"state": chosen, "kind": of_kind, "mine": "1" if mine else "", "q": words}
    kept = {name: value for name, value in filters.items() if value}
    return page(
        request,
        "jobs.html",
        here.user,
        rows=rows,
        states=views.STATES,
        kinds=views.KINDS,
        filters=filters,
        filtered=bool(kept or cursor),
        next_href=f"/?{urlencode({**kept, 'cursor': following})}" if following else "",
        first_href=f"/?{urlencode(kept)}" if cursor else "",
        writes=here.writes,
        any_worker=any(worker.stopped_at is None for worker in running),
        live=any(views.is_live(row.job) for row in rows),
    )
