"""Who is calling: a Bearer token or the browser's session cookie, and what it may do.

| dependency | scope                | role          | for                                   |
|------------|----------------------|---------------|---------------------------------------|
| `Reader`   | read                 | any           | looking                               |
| `Holder`   | all that the role has| any           | one's own tokens: none can make more  |
|            |                      |               | of itself than it is                  |
| `Writer`   | write                | member, admin | jobs, prompt sets, webhooks           |
| `Admin`    | admin                | admin         | people                                |

A token's `write` includes `read`, `admin` includes both. A cookie, like a token without scopes,
may do all that the user's role allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import APIKeyCookie, HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy.orm import Session

from jobs import people
from jobs.database import Sessions
from jobs.doorbell import Doorbell
from jobs.problems import Forbidden, Unauthenticated
from jobs.settings import Settings
from jobs.tables import User

COOKIE = "nullspace_session"
INCLUDES = {"read": ("read",), "write": ("read", "write"), "admin": people.SCOPES}

bearer = HTTPBearer(
    auto_error=False, scheme_name="token", description="An API token, `ns_` and 43 characters."
)
cookie = APIKeyCookie(
    name=COOKIE, auto_error=False, scheme_name="session", description="A browser that signed in."
)


@dataclass(frozen=True)
class Caller:
    """An authenticated request: its user, its scopes and the parts that routes need."""

    user: User
    scopes: frozenset[str]
    settings: Settings
    sessions: Sessions
    doorbell: Doorbell

    @contextmanager
    def begin(self) -> Iterator[Session]:
        """A transaction in which `user` is attached. Ring and nudge only after it."""
        with self.sessions.begin() as session:
            session.add(self.user)
            yield session


def caller(
    request: Request,
    token: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
    session_cookie: Annotated[str | None, Depends(cookie)],
) -> Caller:
    """The request's caller. Raises Unauthenticated, in words that say which way it failed."""
    state = request.app.state
    settings: Settings = state.settings
    secret = settings.secret_key.get_secret_value()
    with state.sessions.begin() as session:
        if token is not None:
            user, row = people.authenticate(session, token.credentials, secret)
            scopes = frozenset(
                each for scope in people.scopes_of(user, row) for each in INCLUDES[scope]
            )
        else:
            known = session_cookie or ""
            found = people.user_of_session(session, known, secret) if known else None
            if found is None:
                raise Unauthenticated(
                    "Send `Authorization: Bearer <token>`. `nullspace token create` or the page "
                    "Tokens makes one."
                )
            user, scopes = found, frozenset(people.scopes_of(found, None))
    return Caller(user, scopes, settings, state.sessions, state.doorbell)


Signed = Annotated[Caller, Depends(caller)]


def _requires(scope: str) -> Callable[[Caller], Caller]:
    def check(who: Signed) -> Caller:
        if scope in who.scopes:
            return who
        if scope in people.SCOPES_OF_ROLE.get(who.user.role, ()):
            raise Forbidden(f"This token lacks the scope `{scope}`. Make one that has it.")
        needed = "admin" if scope == "admin" else "member or admin"
        raise Forbidden(
            f"This needs the role {needed}; yours is {who.user.role}. An admin can change it."
        )

    return check


def _whole(who: Signed) -> Caller:
    """A caller whose token is as strong as its user."""
    if who.scopes != frozenset(people.SCOPES_OF_ROLE.get(who.user.role, ())):
        raise Forbidden(
            "Tokens are managed with a token of all your scopes, or in the browser: a weaker "
            "token must not make itself stronger."
        )
    return who


Reader = Annotated[Caller, Depends(_requires("read"))]
Writer = Annotated[Caller, Depends(_requires("write"))]
Admin = Annotated[Caller, Depends(_requires("admin"))]
Holder = Annotated[Caller, Depends(_whole)]
