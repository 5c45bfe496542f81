"""The live view: a job's events as Server-Sent Events, replayed from the table.

`id:` is the event's number in the job. A reconnecting EventSource sends it as Last-Event-ID and
misses nothing. Between looks at the table no database session is held; a nudge over Redis makes
the next look early. A stream ends after ten minutes (the client reconnects), when its client does
not read for thirty seconds, or with an `end` event once the job is over and all was sent.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Any

import anyio
from fastapi import APIRouter, Header, Query, Request
from fastapi.sse import format_sse_event
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from api.auth import Reader
from api.nudges import Nudges
from api.problems import errors
from api.routes.jobs import MISSING
from jobs import control, live
from jobs.database import Sessions
from jobs.problems import Problem
from jobs.tables import Event

router = APIRouter(tags=["jobs"])
log = logging.getLogger(__name__)
LIFETIME_SECONDS = 600.0
HEARTBEAT_SECONDS = 15.0
SEND_SECONDS = 30.0
RETRY_MILLISECONDS = 1000
ITEM = {
    "type": "object",
    "required": ["data"],
    "properties": {
        "id": {"type": "string"},
        "event": {"type": "string"},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
}


class Busy(Problem):
    """This process has as many streams as it may."""

    status = 503
    title = "Service unavailable"


@dataclass
class Streams:
    """How many streams this process serves, and may serve."""

    limit: int = 256
    open: int = 0


class EventStream(StreamingResponse):
    """A stream that is counted, and cut off when its client does not read."""

    media_type = "text/event-stream"

    def __init__(self, content: AsyncIterator[bytes], streams: Streams) -> None:
        super().__init__(content, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.streams = streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one client, until it goes or the stream ends."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.streams.open -= 1

    async def stream_response(self, send: Send) -> None:
        """Send piece by piece; a client that takes longer than SEND_SECONDS for one is dropped."""

        async def limited(message: Any) -> None:
            with anyio.fail_after(SEND_SECONDS):
                await send(message)

        try:
            await super().stream_response(limited)
        except TimeoutError:
            log.info("a client that did not read its events was dropped")


def frame(event: Event) -> bytes:
    """One event on the wire."""
    at: dt.datetime = event.at
    data = {"seq": event.seq, "kind": event.kind, "at": at.isoformat(), "payload": event.payload}
    return format_sse_event(data_str=json.dumps(data), event=event.kind, id=str(event.seq))


async def follow(
    sessions: Sessions, nudges: Nudges, job_id: uuid.UUID, after: int, poll_seconds: float
) -> AsyncIterator[bytes]:
    """The wire form of the job's events numbered above `after`, until there can be no more."""
    end = time.monotonic() + LIFETIME_SECONDS
    spoken = time.monotonic()
    yield format_sse_event(retry=RETRY_MILLISECONDS)
    with nudges.of(str(job_id)) as nudged:
        while time.monotonic() < end:
            nudged.clear()  # before looking: a nudge while we look must not be lost
            try:
                found = await anyio.to_thread.run_sync(_look, sessions, job_id, after)
            except (OperationalError, InterfaceError, PoolTimeout):
                found = None  # the database will be back; the client keeps its place
            if found is not None and found.events:
                yield b"".join(map(frame, found.events))
                after, spoken = found.events[-1].seq, time.monotonic()
                if not found.over:
                    continue
            if found is not None and found.over:
                last = json.dumps({"state": found.state, "seq": after})
                yield format_sse_event(data_str=last, event="end")
                return
            if time.monotonic() - spoken >= HEARTBEAT_SECONDS:
                yield format_sse_event(comment="still here")
                spoken = time.monotonic()
            try:
                await asyncio.wait_for(nudged.wait(), poll_seconds)
            except asyncio.TimeoutError:
                continue


def _look(sessions: Sessions, job_id: uuid.UUID, after: int) -> live.Pulse:
    with sessions.begin() as session:
        return live.pulse(session, job_id, after)


@router.get(
    "/jobs/{job_id}/events",
    response_class=Response,
    responses={
        200: {
            "description": "`event:` is the kind, `data:` JSON of seq, kind, at and payload.",
            "content": {"text/event-stream": {"itemSchema": ITEM}},
        },
        **errors({404: MISSING, 503: "Too many streams in this process; try again shortly."}),
    },
)
async def stream_events(
    who: Reader,
    request: Request,
    job_id: uuid.UUID,
    after: Annotated[int, Query(ge=0, lt=2**53, description="number of the last known event")] = 0,
    last_event_id: Annotated[
        str | None, Header(description="the same, sent by a reconnecting EventSource")
    ] = None,
) -> EventStream:
    """The job's events from the beginning, or after a number, as Server-Sent Events."""
    await anyio.to_thread.run_sync(_require_visible, who, job_id)
    if last_event_id is not None and re.fullmatch(r"[0-9]{1,15}", last_event_id):
        after = int(last_event_id)
    state = request.app.state
    streams: Streams = state.streams
    if streams.open >= streams.limit:
        raise Busy("Too many live views are open on this server. Try again in a few seconds.")
    streams.open += 1
    content = follow(state.sessions, state.nudges, job_id, after, who.settings.poll_seconds)
    return EventStream(content, streams)


def _require_visible(who: Reader, job_id: uuid.UUID) -> None:
    with who.begin() as session:
        control.visible(session, who.user, job_id)
