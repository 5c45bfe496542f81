"""Downloads that can be resumed: Range, If-Range, If-None-Match, ETag (RFC 9110, 13 and 14)."""

from __future__ import annotations

import re
from pathlib import Path

from fastapi import Request
from starlette.responses import FileResponse, Response
from starlette.types import Receive, Scope, Send

ONE_RANGE = re.compile(rb"bytes=([0-9]+-[0-9]*|-[0-9]+)")


class Download(FileResponse):
    """A file whose ETag is its sha256. One byte range is honoured, every other Range ignored.

    Starlette answers 400 to other units and to reversed ranges, where RFC 9110 14.2 has the field
    ignored; several ranges in one request would be legal, but no resuming client asks for them.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        headers = [pair for pair in scope["headers"] if pair[0] != b"range" or _usable(pair[1])]
        await super().__call__({**scope, "headers": headers}, receive, send)


def _usable(value: bytes) -> bool:
    if not ONE_RANGE.fullmatch(value) or len(value) > 60:
        return False
    first, last = value.removeprefix(b"bytes=").split(b"-")
    return not (first and last) or int(first) <= int(last)


def send_file(request: Request, path: Path, name: str, sha256: str) -> Response:
    """The file at `path` for download as `name`; 304 where the client has it already."""
    etag = f'"{sha256}"'
    headers = {"ETag": etag, "Cache-Control": "private, no-cache"}
    if not_modified(request, etag):
        return Response(status_code=304, headers=headers)
    return Download(
        path,
        headers=headers,
        media_type="application/octet-stream",
        filename=name,
        stat_result=path.stat(),
    )


def not_modified(request: Request, etag: str) -> bool:
    """Whether If-None-Match names `etag` (weak comparison) or `*`."""
    wanted = request.headers.get("if-none-match", "")
    return any(each.strip().removeprefix("W/") in (etag, "*") for each in wanted.split(","))
