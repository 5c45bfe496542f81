"""Templates to answers. Everything printed is escaped; control characters are made visible."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from fastapi import Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from jobs.tables import User
from web.views import formats

HERE = Path(__file__).parent
STATIC = HERE / "static"


class Kept(str):
    """Text that goes out as it is (still escaped): what a person typed, back in its field."""


def _finalize(value: Any) -> Any:
    """Show what would be invisible; applied to every printed expression of every template."""
    if value is None:
        return ""
    if isinstance(value, str) and not isinstance(value, (Markup, Kept)):
        return formats.shown(value)
    return value


@cache
def asset(name: str) -> str:
    """The address of a static file; it changes with the content, so it may be cached for ever."""
    digest = hashlib.sha256((STATIC / name).read_bytes()).hexdigest()[:12]
    return f"/static/{name}?v={digest}"


environment = Environment(
    loader=FileSystemLoader(HERE / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    finalize=_finalize,
    trim_blocks=True,
    lstrip_blocks=True,
)
environment.filters.update(
    duration=formats.duration,
    bytes=formats.size,
    kl=formats.divergence,
    share=formats.share,
    interval=formats.interval,
    number=formats.number,
    ago=formats.ago,
    clock=formats.clock,
    kept=Kept,
)
environment.globals["asset"] = asset


def page(
    request: Request, template: str, user: User | None, *, status: int = 200, **context: Any
) -> HTMLResponse:
    """Render `template` for `user`, who is None on the sign-in page and on some error pages."""
    body = environment.get_template(template).render(user=user, path=request.url.path, **context)
    return HTMLResponse(body, status)
