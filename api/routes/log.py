"""The log of a job's task, by offset: follow it by asking again from `next_offset`."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, Field

from api.auth import Reader
from api.plaintext import clean
from api.problems import errors
from jobs import control, live
from jobs.problems import NotFound
from jobs.states import TaskKind, TaskState

router = APIRouter(tags=["jobs"])


class LogTask(BaseModel):
    """A task of the job; each has a log of its own."""

    id: uuid.UUID
    kind: TaskKind
    state: TaskState
    size: int = Field(description="bytes of its log so far")


class LogPage(BaseModel):
    """A piece of a log, without terminal codes. Offsets count the bytes of the file."""

    task: uuid.UUID | None = Field(description="whose log this is; null while no task ran")
    tasks: list[LogTask]
    text: str
    offset: int
    next_offset: int
    size: int


TEXT: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/plain": {"schema": {"type": "string"}}}}
}


@router.get(
    "/jobs/{job_id}/log",
    response_model=LogPage,
    responses={
        **TEXT,
        **errors({404: "No such job, or another's private one, or no such task of it."}),
    },
)
def show_log(
    who: Reader,
    request: Request,
    job_id: uuid.UUID,
    task: Annotated[
        uuid.UUID | None, Query(description="default: the task that wrote last")
    ] = None,
    offset: Annotated[int, Query(ge=0, lt=2**53)] = 0,
    limit: Annotated[int, Query(ge=1, le=1_048_576, description="bytes at most")] = 65_536,
) -> Response | LogPage:
    """A piece of a task's log: JSON, or text with `Accept: text/plain` and X-Next-Offset."""
    with who.begin() as session:
        control.visible(session, who.user, job_id)
        rows = live.tasks(session, job_id)
    paths = {row.id: who.settings.logs / f"{row.id}.log" for row in rows}
    if task is not None and task not in paths:
        raise NotFound("The job has no such task. Leave `task` out to see them all.")
    written = [(path.stat().st_mtime, each) for each, path in paths.items() if path.is_file()]
    chosen = task or (max(written)[1] if written else None)
    text, following, size = read(paths[chosen], offset, limit) if chosen else ("", 0, 0)
    if "text/plain" in request.headers.get("accept", ""):
        headers = {"X-Next-Offset": str(following), "X-Log-Size": str(size)}
        return PlainTextResponse(text, headers=headers)
    return LogPage(
        task=chosen,
        tasks=[
            LogTask(id=row.id, kind=row.kind, state=row.state, size=_size(paths[row.id]))
            for row in rows
        ],
        text=text,
        offset=offset,
        next_offset=following,
        size=size,
    )


def read(path: Path, offset: int, limit: int) -> tuple[str, int, int]:
    """(text, next offset, size) of at most `limit` bytes from `offset`.

    A piece ends at a line's end where it can, and never inside a UTF-8 character, so that pieces
    joined are the log. An offset behind the end gives nothing and stays.
    """
    size = _size(path)
    if offset >= size:
        return "", offset, size
    with path.open("rb") as file:
        file.seek(offset)
        piece = file.read(limit)
    newline = piece.rfind(b"\n")
    if len(piece) == limit and newline >= 0:
        piece = piece[: newline + 1]
    else:
        # where the limit is less than one character, half a one is better than no progress
        piece = _whole_characters(piece) or (piece if len(piece) == limit else b"")
    return clean(piece.decode("utf-8", "replace")), offset + len(piece), size


def _whole_characters(piece: bytes) -> bytes:
    """`piece` without a UTF-8 character that was cut at its end."""
    for back in range(1, min(4, len(piece)) + 1):
        byte = piece[-back]
        if byte < 0x80:
            break
        if byte >= 0xC0:
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return piece[:-back] if back < length else piece
    return piece


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
