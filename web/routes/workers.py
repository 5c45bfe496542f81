"""The workers that called in."""

from __future__ import annotations

import datetime as dt

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from jobs import queue, workers
from web.render import page
from web.session import visit

router = APIRouter()


@router.get("/workers")
def show_workers(request: Request) -> HTMLResponse:
    """Device, state and versions of every worker of the last day."""
    with visit(request) as here:
        rows = workers.list_workers(here.session)
        alive = {worker.id for worker in queue.live_workers(here.session, here.settings)}
    return page(
        request,
        "workers.html",
        here.user,
        workers=rows,
        alive=alive,
        now=dt.datetime.now(dt.timezone.utc),
    )
