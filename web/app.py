"""Adds the pages to the service's application."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from web import errors, pages
from web.render import STATIC


class Assets(StaticFiles):
    """Static files; their addresses hold a digest, so browsers need not ask again."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """The file, cacheable for ever where the address names its digest."""
        response = await super().get_response(path, scope)
        digest = b"v=" in scope.get("query_string", b"")
        response.headers["Cache-Control"] = (
            "public, max-age=31536000, immutable" if digest else "public, max-age=300"
        )
        return response


def add_pages(app: FastAPI) -> None:
    """Mount pages, static files and HTML error pages.

    `app.state` must hold `settings`, `sessions` and `doorbell`. Errors become pages through
    `app.state.problem_page`, which the application's error handlers call for browsers.
    """
    app.mount("/static", Assets(directory=STATIC), name="static")
    app.include_router(pages.router)
    app.state.problem_page = errors.problem_page
