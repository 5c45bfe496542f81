"""Who is looking: the browser's session cookie, and one transaction per page."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fastapi import Request, Response
from sqlalchemy.orm import Session

from jobs import people
from jobs.problems import Unauthenticated
from jobs.settings import Settings
from jobs.tables import User

COOKIE = "nullspace_session"


@dataclass(frozen=True)
class Visit:
    """A signed-in request within its transaction."""

    session: Session
    user: User
    settings: Settings

    @property
    def writes(self) -> bool:
        """Whether the user's role lets them change anything."""
        return self.user.role != "viewer"


def secret_of(settings: Settings) -> str:
    """The key with which cookies and tokens are digested."""
    return settings.secret_key.get_secret_value()


@contextmanager
def visit(request: Request) -> Iterator[Visit]:
    """A transaction in which the visitor is known. Unauthenticated leads to the sign-in page.

    Ring the doorbell after the block, never inside: a worker cannot see what is not committed.
    """
    settings: Settings = request.app.state.settings
    cookie = request.cookies.get(COOKIE, "")
    with request.app.state.sessions.begin() as session:
        user = people.user_of_session(session, cookie, secret_of(settings)) if cookie else None
        if user is None:
            raise Unauthenticated("Sign in to see this page.")
        yield Visit(session, user, settings)


def give_cookie(response: Response, value: str, settings: Settings) -> None:
    """Set the session cookie: for this site's own pages only, unreadable for scripts."""
    response.set_cookie(
        COOKIE,
        value,
        max_age=int(settings.session_hours * 3600),
        path="/",
        httponly=True,
        samesite="lax",
        secure=settings.public_url.startswith("https://"),
    )


def local_target(wanted: str | None) -> str:
    """`wanted` if it is a page of this service, else the job list: no open redirects."""
    if (
        not wanted
        or not wanted.startswith("/")
        or wanted.startswith(("//", "/\\", "/signin", "/signout"))
        or not wanted.isprintable()
    ):
        return "/"
    return wanted
