"""user and token: accounts, for operators, and API tokens.

Where DATABASE_URL and NULLSPACE_SECRET_KEY are set (inside the containers) they work on the
database, so the first token needs no token. Elsewhere they ask the server, with one's own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nullspace.client import ClientError, Json
from nullspace.commands.options import AsJson, Token, Url, client_of
from nullspace.terminal import dump, say, show, table, when

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

users = typer.Typer(no_args_is_help=True, help="Accounts (operators).")
tokens = typer.Typer(no_args_is_help=True, help="API tokens.")
Email = Annotated[str, typer.Argument(help="E-mail address.")]
Role = Annotated[str, typer.Option("--role", help="viewer, member or admin.")]
FromStdin = Annotated[
    bool, typer.Option("--password-stdin", help="Read the password from stdin, not from argv.")
]


def at_database() -> bool:
    """Whether this machine may go to the database itself."""
    return bool(os.environ.get("DATABASE_URL") and os.environ.get("NULLSPACE_SECRET_KEY"))


@contextmanager
def _session() -> Iterator[tuple[Session, str]]:
    """A transaction, and the key that tokens are signed with. jobs' problems become errors."""
    from jobs.database import connect, session_factory
    from jobs.problems import Problem
    from jobs.settings import settings

    engine = connect(settings().database_url, pool_size=1)
    try:
        with session_factory(engine).begin() as session:
            yield session, settings().secret_key.get_secret_value()
    except Problem as error:
        field = f"{error.field}: " if error.field else ""
        raise ClientError(f"{field}{error.detail}") from error
    finally:
        engine.dispose()


def _password(from_stdin: bool) -> str | None:
    if not from_stdin:
        return None
    return sys.stdin.readline().rstrip("\n")


@users.command("add")
def add_user(
    email: Email,
    role: Role = "member",
    name: Annotated[str, typer.Option("--name")] = "",
    password_stdin: FromStdin = False,
    as_json: AsJson = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Make an account. Without a password the person signs in with a token only."""
    password = _password(password_stdin)
    if at_database():
        from jobs import people

        with _session() as (session, _):
            row = people.create_user(session, email, name=name, role=role, password=password)
            found: Json = {"id": str(row.id), "email": row.email, "role": row.role}
    else:
        body = {"email": email, "name": name, "role": role} | (
            {"password": password} if password else {}
        )
        with client_of(url, token) as client:
            found = client.request("POST", "/users", json=body)
    if as_json:
        dump(found)
    else:
        say(f"{found['email']} is a {found['role']} now")


@users.command("list")
def list_users(as_json: AsJson = False, url: Url = None, token: Token = None) -> None:
    """List accounts."""
    if at_database():
        from jobs import people

        with _session() as (session, _):
            found: list[Json] = [
                {"id": str(row.id), "email": row.email, "name": row.name, "role": row.role,
                 "disabled": row.disabled, "created_at": row.created_at.isoformat()}
                for row in people.list_users(session)
            ]  # fmt: skip
    else:
        with client_of(url, token) as client:
            found = client.request("GET", "/users")
    if as_json:
        dump(found)
        return
    rows = [
        (
            row["email"],
            row["role"],
            row["name"],
            "disabled" if row["disabled"] else "",
            when(row["created_at"]),
        )
        for row in found
    ]
    table(("e-mail", "role", "name", "", "created"), rows)


@users.command("password")
def set_password(email: Email, url: Url = None, token: Token = None) -> None:
    """Set a password, read from stdin; ends the account's browser sessions."""
    password = _password(True) or ""
    if at_database():
        from jobs import people

        with _session() as (session, _):
            people.set_password(session, people.user_by_email(session, email), password)
    else:
        with client_of(url, token) as client:
            client.request("PATCH", f"/users/{_id_of(client, email)}", json={"password": password})
    say(f"the password of {email} is set")


@users.command("disable")
def disable_user(
    email: Email,
    undo: Annotated[bool, typer.Option("--undo", help="Enable it again.")] = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Disable an account: its tokens and sessions stop working, its jobs stay."""
    if at_database():
        from jobs import people

        with _session() as (session, _):
            people.user_by_email(session, email).disabled = not undo
    else:
        with client_of(url, token) as client:
            client.request("PATCH", f"/users/{_id_of(client, email)}", json={"disabled": not undo})
    say(f"{email} is {'enabled' if undo else 'disabled'}")


def _id_of(client: Any, email: str) -> str:
    for row in client.request("GET", "/users"):
        if row["email"] == email.strip().lower():
            return str(row["id"])
    raise ClientError(f"nobody has the address {email}")


@tokens.command("create")
def create_token(
    name: Annotated[str, typer.Argument(help="What it is for.")] = "",
    email: Annotated[
        str | None, typer.Option("--email", help="For whom (operators, at the database).")
    ] = None,
    scope: Annotated[
        list[str] | None,
        typer.Option("--scope", help="read, write, admin; default: all of the role."),
    ] = None,
    days: Annotated[
        int | None, typer.Option("--days", min=1, help="Life; default: until revoked.")
    ] = None,
    as_json: AsJson = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Make a token; it is printed once."""
    if at_database():
        from jobs import people

        if not email:
            raise ClientError("--email says whose token it is")
        with _session() as (session, key):
            user = people.user_by_email(session, email)
            row, plain = people.issue_token(
                session, user, name=name, scopes=scope or [], days=days, secret=key
            )
            session.flush()
            found: Json = {"id": str(row.id), "name": name, "token": plain}
    else:
        if email:
            raise ClientError("--email works at the database only: here a token is one's own")
        with client_of(url, token) as client:
            found = client.create_token(name, scope or [], days)
    if as_json:
        dump(found)
    else:
        say("keep it: it is not shown again")
        show(found["token"])


@tokens.command("list")
def list_tokens(as_json: AsJson = False, url: Url = None, token: Token = None) -> None:
    """List one's own tokens."""
    with client_of(url, token) as client:
        found = client.tokens()
    if as_json:
        dump(found)
        return
    rows = [
        (
            str(row["id"])[:8], row["prefix"], row["name"], " ".join(row["scopes"]),
            when(row["last_used_at"]), when(row["expires_at"]), when(row["revoked_at"]),
        )
        for row in found
    ]  # fmt: skip
    table(("id", "begins with", "name", "scopes", "last used", "expires", "revoked"), rows)


@tokens.command("revoke")
def revoke_token(
    which: Annotated[str, typer.Argument(metavar="ID", help="Its id, or the first characters.")],
    url: Url = None,
    token: Token = None,
) -> None:
    """Revoke a token: the next request with it is refused."""
    with client_of(url, token) as client:
        found = [row["id"] for row in client.tokens() if str(row["id"]).startswith(which)]
        if len(found) != 1:
            raise ClientError(
                f"{len(found)} of your tokens begin with {which!r}: `nullspace token list`"
            )
        client.revoke_token(found[0])
    say("revoked")


def register(app: typer.Typer) -> None:
    """Add the groups."""
    app.add_typer(users, name="user")
    app.add_typer(tokens, name="token")
