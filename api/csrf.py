"""Cross-site request forgery: may this request have been made by another site?

The algorithm is that of Go's net/http.CrossOriginProtection (Go 1.25; Filippo Valsorda,
"Cross-Site Request Forgery", https://words.filippo.io/csrf/). A request passes when

1. its method is safe (GET, HEAD, OPTIONS): these never change anything here;
2. it carries a Bearer token and no cookie: browsers never add a Bearer token by themselves;
3. Sec-Fetch-Site is `same-origin` or `none` (typed address, bookmark). Any other value fails:
   all browsers since 2023 send it, and scripts cannot forge it;
4. there is neither Sec-Fetch-Site nor Origin: not a browser, so there is no ambient cookie jar;
5. Origin's host is the Host header, or Origin is the service's public address (behind a proxy
   that rewrites Host).

Everything else is refused with 403. No tokens in forms, no state.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from api.problems import document, respond

SAFE = frozenset({"GET", "HEAD", "OPTIONS"})


def allowed(method: str, headers: Headers, public_url: str) -> bool:
    """Whether a request passes the five rules above."""
    if method in SAFE:
        return True
    if headers.get("authorization", "").lower().startswith("bearer ") and "cookie" not in headers:
        return True
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site in ("same-origin", "none")
    origin = headers.get("origin")
    if origin is None:
        return True
    public = urlsplit(public_url)
    if origin == f"{public.scheme}://{public.netloc}":
        return True
    return urlsplit(origin).netloc == headers.get("host")


class CrossSiteGuard:
    """ASGI middleware that refuses what `allowed` does not let pass."""

    def __init__(self, app: ASGIApp, public_url: str) -> None:
        self.app = app
        self.public_url = public_url

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or allowed(
            scope["method"], Headers(scope=scope), self.public_url
        ):
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        detail = (
            "This request came from another site. Use the service's own pages, or a Bearer token "
            "without cookies."
        )
        response = respond(request, document(request, 403, "Cross-site request", detail))
        await response(scope, receive, send)
