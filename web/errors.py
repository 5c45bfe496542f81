"""Error pages in the style of the others, and the way to the sign-in page."""

from __future__ import annotations

import logging
from typing import Protocol
from urllib.parse import quote

from fastapi import Request
from fastapi.responses import RedirectResponse
from sqlalchemy.exc import SQLAlchemyError
from starlette.responses import Response

from jobs import people
from jobs.tables import User
from web.render import page
from web.session import COOKIE, secret_of

log = logging.getLogger(__name__)

HEADINGS = {
    400: "That request cannot be read",
    403: "You may not do this",
    404: "There is nothing here",
    405: "This page cannot be used that way",
    409: "Not in this state",
    413: "That is too large",
    422: "Something in that request is wrong",
    429: "Too many at once",
    500: "Something broke on our side",
    503: "The service is catching its breath",
    507: "The server's disk is full",
}


class Fault(Protocol):
    """What an error page needs: the problem document of the application has it."""

    status: int
    title: str
    detail: str


def problem_page(request: Request, problem: Fault) -> Response:
    """The page of one error; who is not signed in is led to the sign-in page."""
    if problem.status == 401:
        target = "/"
        if request.method == "GET":
            target = request.url.path
            if request.url.query:
                target += "?" + request.url.query
        return RedirectResponse(f"/signin?next={quote(target, safe='/')}", status_code=303)
    detail = problem.detail
    if problem.status == 404 and detail.startswith("Nothing at "):
        # The application's words for an unknown address speak to programs.
        detail = "No page has this address. It may be mistyped, or what it showed may be gone."
    return page(
        request,
        "error.html",
        _visitor(request) if problem.status < 500 else None,
        status=problem.status,
        code=problem.status,
        heading=HEADINGS.get(problem.status, problem.title),
        detail=detail,
        retry=problem.status in (429, 503),
        signed_in=bool(request.cookies.get(COOKIE)),
    )


def _visitor(request: Request) -> User | None:
    cookie = request.cookies.get(COOKIE)
    if not cookie:
        return None
    try:
        with request.app.state.sessions.begin() as session:
            return people.user_of_session(session, cookie, secret_of(request.app.state.settings))
    except SQLAlchemyError as error:
        # The page about an error must come out even while the database is away.
        log.warning("no visitor for an error page: %s", str(error).splitlines()[0])
        return None
