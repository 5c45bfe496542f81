"""People: who am I, tokens, accounts."""

from __future__ import annotations

import datetime as dt
import uuid
from typing import Annotated, Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, Field

from api.auth import Admin, Holder, Reader
from api.bodies import Body
from api.problems import errors
from jobs import audit, people
from jobs.problems import Conflict, NotFound
from jobs.tables import User

router = APIRouter(tags=["people"])
Role = Literal["viewer", "member", "admin"]
Scope = Literal["read", "write", "admin"]
Password = Annotated[str, Field(min_length=10, max_length=1000)]
WEAK = "A token with fewer scopes than its user has."
ADMINS = "Not an admin, or a token without the scope `admin`."


class Person(BaseModel):
    """An account."""

    model_config = ConfigDict(from_attributes=True)

    id: uuid.UUID
    email: str
    name: str
    role: Role
    weight: float = Field(description="share of the GPUs relative to others' (1)")
    disabled: bool
    created_at: dt.datetime


class Me(Person):
    """One's own account and what this request may do."""

    scopes: list[Scope]


class NewPerson(Body):
    """An account to make. Without a password the person needs a token of an admin's making."""

    email: str = Field(max_length=320)
    name: str = Field("", max_length=120)
    role: Role = "member"
    password: Password | None = None


class PersonChange(Body):
    """What can be changed of an account. Fields left out stay as they are."""

    name: Annotated[str, Field(max_length=120)] | None = None
    role: Role | None = None
    weight: Annotated[float, Field(ge=0.01, le=1000)] | None = None
    disabled: bool | None = None
    password: Password | None = None


class NewToken(Body):
    """A token to make. Without scopes it may do all that the role allows."""

    name: str = Field("", max_length=120)
    scopes: list[Scope] = Field(default_factory=list, max_length=3)
    days: int | None = Field(None, ge=1, le=3650, description="life; null: until revoked")


class TokenView(BaseModel):
    """A token as it is kept: never itself."""

    model_config = ConfigDict(from_attributes=True)

    id: uuid.UUID
    name: str
    prefix: str = Field(description="its first characters, to recognise it by")
    scopes: list[Scope]
    created_at: dt.datetime
    expires_at: dt.datetime | None
    last_used_at: dt.datetime | None
    revoked_at: dt.datetime | None


class IssuedToken(TokenView):
    """A new token. `token` is shown this once."""

    token: str


@router.get("/me")
def show_me(who: Reader) -> Me:
    """One's own account and scopes."""
    return Me(
        **Person.model_validate(who.user).model_dump(),
        scopes=[scope for scope in people.SCOPES if scope in who.scopes],
    )


@router.get("/tokens")
def list_tokens(who: Reader) -> list[TokenView]:
    """One's own tokens, newest first."""
    with who.begin() as session:
        return [TokenView.model_validate(row) for row in people.list_tokens(session, who.user)]


@router.post("/tokens", status_code=201, responses=errors({403: WEAK, 422: "A field is wrong."}))
def create_token(who: Holder, new: NewToken) -> IssuedToken:
    """Make a token. It is shown in this answer and never again."""
    with who.begin() as session:
        row, plain = people.issue_token(
            session,
            who.user,
            name=new.name,
            scopes=list(new.scopes),
            days=new.days,
            secret=who.settings.secret_key.get_secret_value(),
        )
        session.refresh(row)
        return IssuedToken(**TokenView.model_validate(row).model_dump(), token=plain)


@router.delete(
    "/tokens/{token_id}",
    status_code=204,
    responses=errors({403: WEAK, 404: "No such token of yours."}),
)
def revoke_token(who: Holder, token_id: uuid.UUID) -> None:
    """Revoke one of one's own tokens; the next request with it gets 401."""
    with who.begin() as session:
        people.revoke_token(session, who.user, token_id)


@router.get("/users", responses=errors({403: ADMINS}))
def list_users(who: Admin) -> list[Person]:
    """All accounts."""
    with who.begin() as session:
        return [Person.model_validate(row) for row in people.list_users(session)]


@router.post(
    "/users",
    status_code=201,
    responses=errors({403: ADMINS, 409: "The address has an account.", 422: "A field is wrong."}),
)
def create_user(who: Admin, new: NewPerson, response: Response) -> Person:
    """Make an account."""
    with who.begin() as session:
        row = people.create_user(
            session, new.email, name=new.name, role=new.role, password=new.password
        )
        session.refresh(row)
        audit.record(session, who.user.id, "user.invite", row.id)
        found = Person.model_validate(row)
    response.headers["Location"] = f"/api/v1/users/{found.id}"
    return found


@router.patch(
    "/users/{user_id}",
    responses=errors(
        {
            403: ADMINS,
            404: "No such account.",
            409: "The change would shut you out.",
            422: "A field is wrong.",
        }
    ),
)
def change_user(who: Admin, user_id: uuid.UUID, change: PersonChange) -> Person:
    """Change an account's name, role, share or password, or disable it."""
    with who.begin() as session:
        row = session.get(User, user_id)
        if row is None:
            raise NotFound("There is no such account.")
        demoted = change.role not in (None, "admin") or change.disabled
        if row.id == who.user.id and demoted:
            raise Conflict("You cannot disable or demote yourself; another admin can.")
        wanted = change.model_dump(exclude_none=True, exclude={"password"})
        for name, value in wanted.items():
            setattr(row, name, value)
        if change.password is not None:
            people.set_password(session, row, change.password)
        changed = sorted(wanted) + (["password"] if change.password else [])
        audit.record(session, who.user.id, "user.change", row.id, fields=changed)
        session.flush()
        session.refresh(row)
        return Person.model_validate(row)
