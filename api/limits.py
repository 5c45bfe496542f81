"""A limit on request bodies, counted while they stream in: a lying Content-Length is no way out."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.problems import document, respond

FORM_BYTES = 1_048_576  # JSON and ordinary forms
MULTIPART_OVERHEAD = 65_536  # boundaries and part headers around an upload


def limit_for(path: str, content_type: str, upload_bytes: int) -> int:
    """Bytes that a request's body may have: uploads `upload_bytes`, all else 1 MiB."""
    if content_type.startswith("multipart/form-data"):
        return upload_bytes + MULTIPART_OVERHEAD
    if path == "/api/v1/prompt-sets":
        return max(FORM_BYTES, upload_bytes)
    return FORM_BYTES


class BodyLimit:
    """ASGI middleware: 413 for a body over its limit, before it is held in memory."""

    def __init__(self, app: ASGIApp, upload_bytes: int) -> None:
        self.app = app
        self.upload_bytes = upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        limit = limit_for(scope["path"], headers.get("content-type", ""), self.upload_bytes)
        words = f"The body is larger than the {limit:,} bytes that are accepted here. Shorten it."
        declared = headers.get("content-length", "")
        if declared.isdigit() and int(declared) > limit:
            request = Request(scope)
            found = document(request, 413, "Content Too Large", words)
            await respond(request, found, {"Connection": "close"})(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                if seen > limit:
                    # an HTTPException, because FastAPI turns every other error here into 400
                    raise HTTPException(413, words, {"Connection": "close"})
            return message

        await self.app(scope, counted, send)
