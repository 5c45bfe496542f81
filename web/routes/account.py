"""One's own account: the password."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse
from sqlalchemy.orm import Session
from starlette.datastructures import FormData
from starlette.responses import Response

from jobs import people
from jobs.problems import Invalid, Problem, Unauthenticated
from jobs.settings import Settings
from jobs.tables import User
from web.forms import Fields, text_of
from web.render import page
from web.session import give_cookie, secret_of, visit

router = APIRouter()


@router.get("/account")
def show_account(request: Request) -> HTMLResponse:
    """Who is signed in, and the form for a new password."""
    with visit(request) as here:
        pass
    return page(request, "account.html", here.user, problem=None, done=False)


@router.post("/account/password")
def set_password(request: Request, fields: Fields) -> Response:
    """Another password. It ends every other browser's session."""
    settings: Settings = request.app.state.settings
    address = request.client.host if request.client else ""
    failure: Problem | None = None
    with visit(request) as here:
        try:
            _change(here.session, here.user, fields, address)
            cookie = people.open_session(
                here.session, here.user, hours=settings.session_hours, secret=secret_of(settings)
            )
        except Problem as problem:
            # Left by the normal way: a wrong password counts against the rate limit.
            failure = problem
    if failure is not None:
        return page(
            request, "account.html", here.user, status=failure.status, problem=failure, done=False
        )
    response = page(request, "account.html", here.user, problem=None, done=True)
    give_cookie(response, cookie, settings)
    return response


def _change(session: Session, user: User, fields: FormData, address: str) -> None:
    new, again = text_of(fields, "password"), text_of(fields, "again")
    if new != again:
        raise Invalid("The two new passwords are not the same.", field="again")
    if user.password_hash is not None:
        try:
            people.verify_password(session, user.email, text_of(fields, "current"), address)
        except Unauthenticated:
            raise Invalid("This is not your current password.", field="current") from None
    people.set_password(session, user, new)
