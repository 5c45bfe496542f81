"""Signing in and out."""

from __future__ import annotations

import logging

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, RedirectResponse
from starlette.responses import Response

from jobs import people
from jobs.problems import Problem
from jobs.settings import Settings
from web.forms import Fields, text_of
from web.render import page
from web.session import COOKIE, give_cookie, local_target, secret_of

router = APIRouter()
log = logging.getLogger(__name__)


@router.get("/signin")
def show_signin(request: Request, next: str = "/", out: bool = False) -> HTMLResponse:
    """The sign-in page."""
    return _page(request, next=local_target(next), out=out)


def _page(
    request: Request,
    *,
    next: str,
    email: str = "",
    problem: Problem | None = None,
    token: bool = False,
    out: bool = False,
) -> HTMLResponse:
    return page(
        request,
        "signin.html",
        None,
        status=problem.status if problem else 200,
        next=next,
        email=email,
        problem=problem,
        token=token,
        out=out,
    )


@router.post("/signin")
def signin(request: Request, fields: Fields) -> Response:
    """Check password or token, and open a session."""
    settings: Settings = request.app.state.settings
    secret = secret_of(settings)
    target = local_target(text_of(fields, "next"))
    email, pasted = text_of(fields, "email").strip(), text_of(fields, "token").strip()
    by_token = "token" in fields
    failure: Problem | None = None
    with request.app.state.sessions.begin() as session:
        try:
            if by_token:
                user, _ = people.authenticate(session, pasted, secret)
            else:
                address = request.client.host if request.client else ""
                password = text_of(fields, "password")
                user = people.verify_password(session, email, password, address)
            cookie = people.open_session(session, user, hours=settings.session_hours, secret=secret)
        except Problem as problem:
            # Left by the normal way: the failed attempt is counted only if it is committed.
            failure = problem
    if failure is not None:
        log.info("sign-in refused: %s", failure.title)
        return _page(request, next=target, email=email, problem=failure, token=by_token)
    response = RedirectResponse(target, status_code=303)
    give_cookie(response, cookie, settings)
    return response


@router.post("/signout")
def signout(request: Request) -> Response:
    """End this browser's session."""
    cookie = request.cookies.get(COOKIE)
    if cookie:
        with request.app.state.sessions.begin() as session:
            people.close_session(session, cookie, secret_of(request.app.state.settings))
    response = RedirectResponse("/signin?out=1", status_code=303)
    response.delete_cookie(COOKIE, path="/")
    return response


@router.get("/signout")
def confirm_signout(request: Request) -> HTMLResponse:
    """A page with the button: a link alone must not sign anybody out."""
    return page(request, "signout.html", None)
