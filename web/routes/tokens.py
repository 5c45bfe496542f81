"""API tokens: list, make (shown once), revoke."""

from __future__ import annotations

import datetime as dt
import uuid
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, RedirectResponse
from starlette.responses import Response

from jobs import people
from jobs.problems import Invalid, Problem
from web.forms import Fields, text_of
from web.render import page
from web.session import Visit, secret_of, visit

router = APIRouter()


@router.get("/tokens")
def show_tokens(request: Request) -> HTMLResponse:
    """One's own tokens."""
    with visit(request) as here:
        context = _context(here)
    return page(request, "tokens.html", here.user, **context)


def _context(here: Visit, **more: Any) -> dict[str, Any]:
    context: dict[str, Any] = {
        "tokens": people.list_tokens(here.session, here.user),
        "scopes": people.SCOPES_OF_ROLE[here.user.role],
        "base_url": here.settings.public_url.rstrip("/"),
        "now": dt.datetime.now(dt.timezone.utc),
        "made": None,
        "problem": None,
        "values": {"name": "", "days": "90", "scopes": []},
    }
    return context | more


@router.post("/tokens")
def make_token(request: Request, fields: Fields) -> Response:
    """A new token. The answer to this form is the only page that ever shows it."""
    scopes = [value for value in fields.getlist("scopes") if isinstance(value, str)]
    name, days = text_of(fields, "name").strip(), text_of(fields, "days").strip()
    made: str | None = None
    failure: Problem | None = None
    with visit(request) as here:
        try:
            _, made = people.issue_token(
                here.session,
                here.user,
                name=name,
                scopes=scopes,
                days=_days(days),
                secret=secret_of(here.settings),
            )
        except Problem as problem:
            failure = problem
        context = _context(here, made=made, problem=failure)
        if failure is not None:
            context["values"] = {"name": name, "days": days, "scopes": scopes}
    return page(
        request, "tokens.html", here.user, status=failure.status if failure else 200, **context
    )


def _days(text: str) -> int | None:
    if text == "":
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 6):
        raise Invalid("A token lives 1 to 3650 days; leave this empty for no end.", field="days")
    return int(text)


@router.post("/tokens/{token_id}/revoke")
def revoke_token(request: Request, token_id: uuid.UUID) -> Response:
    """End one of one's own tokens."""
    with visit(request) as here:
        people.revoke_token(here.session, here.user, token_id)
    return RedirectResponse("/tokens", status_code=303)
