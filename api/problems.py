"""RFC 9457 problem documents: every error of the API has the same shape and names the mend."""

from __future__ import annotations

import http
import logging
import uuid
from collections.abc import Callable
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from sqlalchemy.exc import DataError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.validation import explain
from jobs.problems import Problem

log = logging.getLogger(__name__)
MEDIA_TYPE = "application/problem+json"
RETRY_SECONDS = 5
EXTRA_HEADERS = {
    401: {"WWW-Authenticate": "Bearer"},
    429: {"Retry-After": "60"},
    503: {"Retry-After": str(RETRY_SECONDS)},
}


class FieldError(BaseModel):
    """One fault of the request."""

    field: str = Field(description="dotted path of the field; header and query names as sent")
    detail: str = Field(description="what is wrong")
    mend: str = ""  # what to send instead


class ProblemDocument(BaseModel):
    """An error, as RFC 9457 has it, with the faulty fields and an id to find it in the log."""

    type: str = Field(description="`urn:nullspace:problem:<kind>`, stable per kind of error")
    title: str
    status: int
    detail: str
    instance: str = Field("", description="path of the request")
    errors: list[FieldError] = []
    id: str | None = None  # with status 500: the id of the entry in the log


def document(
    request: Request, status: int, title: str, detail: str, errors: list[FieldError] | None = None
) -> ProblemDocument:
    """The document of one error of `request`."""
    kind = title.lower().replace(" ", "-")
    return ProblemDocument(
        type=f"urn:nullspace:problem:{kind}",
        title=title,
        status=status,
        detail=detail,
        instance=request.url.path,
        errors=errors or [],
    )


def respond(
    request: Request, problem: ProblemDocument, headers: dict[str, str] | None = None
) -> Response:
    """`problem` as JSON, or as a page where a person's browser asked and the web room is there.

    `app.state.problem_page(request, problem) -> Response` is set by whoever mounts the pages.
    """
    page = getattr(request.app.state, "problem_page", None)
    wants_page = "text/html" in request.headers.get("accept", "")
    if page is not None and wants_page and not request.url.path.startswith("/api/"):
        response = cast(Response, page(request, problem))
        response.headers.update(headers or {})
        return response
    body = problem.model_dump(mode="json", exclude_none=True)
    return JSONResponse(body, problem.status, headers=headers, media_type=MEDIA_TYPE)


def errors(descriptions: dict[int, str]) -> dict[int | str, dict[str, Any]]:
    """The `responses=` of a route: what each error status means there."""
    schema = {"$ref": "#/components/schemas/ProblemDocument"}
    return {
        status: {"description": text, "content": {MEDIA_TYPE: {"schema": schema}}}
        for status, text in descriptions.items()
    }


def _problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    fields = [FieldError(field=error.field, detail=error.detail)] if error.field else []
    headers = EXTRA_HEADERS.get(error.status, {})
    found = document(request, error.status, error.title, error.detail, fields)
    return respond(request, found, headers)


def _validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    fields = [FieldError(**fault) for fault in explain(request, error)]
    detail = "; ".join(f"{f.field}: {f.detail}" for f in fields[:5])
    return respond(request, document(request, 422, "Invalid input", detail, fields))


def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    title = http.HTTPStatus(error.status_code).phrase
    detail = str(error.detail)
    headers = dict(error.headers or {})
    if error.status_code == 404 and detail == title:
        detail = f"Nothing at {request.url.path}. The addresses are in /api/v1/openapi.json."
    elif error.status_code == 405 and detail == title:
        headers["Allow"] = _methods(request)
        detail = f"{request.method} is not possible here; allowed: {headers['Allow']}."
    return respond(request, document(request, error.status_code, title, detail), headers)


def _methods(request: Request) -> str:
    """What the address allows. Starlette names only the methods of the first route that fits."""
    return ", ".join(
        method
        for method in ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")
        if any(
            route.matches({**request.scope, "method": method})[0] is Match.FULL
            for route in request.app.routes
        )
    )


def _away(request: Request, error: Exception) -> Response:
    log.warning("database unavailable: %s", str(error).splitlines()[0])
    detail = "The database is not reachable. Nothing was changed unless you were told so; retry."
    found = document(request, 503, "Service unavailable", detail)
    return respond(request, found, EXTRA_HEADERS[503])


def _unstorable(request: Request, error: Exception) -> Response:
    assert isinstance(error, DataError)
    log.info("refused by the database: %s", str(error.orig).splitlines()[0])
    detail = (
        "A value cannot be stored: text must not hold NUL (U+0000) or unpaired surrogates, and "
        "numbers must fit 64 bits. Remove or shorten it."
    )
    return respond(request, document(request, 422, "Invalid input", detail))


HANDLERS: dict[type[Exception], Callable[[Request, Exception], Response]] = {
    Problem: _problem,
    RequestValidationError: _validation,
    HTTPException: _http,
    OperationalError: _away,
    InterfaceError: _away,
    PoolTimeout: _away,
    DataError: _unstorable,
}


def install(app: FastAPI) -> None:
    """Let every error of `app` become a problem document."""
    for kind, handler in HANDLERS.items():
        app.add_exception_handler(kind, handler)


class LastResort:
    """ASGI middleware: an unforeseen error becomes a 500 with an id and no traceback.

    Starlette's own handler sits outside all other middleware, so its answer would lack the
    security headers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception:
            identity = uuid.uuid4().hex[:12]
            log.exception("error %s at %s %s", identity, scope["method"], scope["path"])
            if started:  # too late for another answer: the server cuts the connection
                raise
            request = Request(scope)
            detail = f"An error of the server. Tell its operator the id {identity}."
            found = document(request, 500, "Internal Server Error", detail)
            found.id = identity
            await respond(request, found)(scope, receive, send)
