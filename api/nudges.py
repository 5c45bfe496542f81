"""One Redis subscription per process, shared by all event streams.

Doorbell.nudge publishes on `job:<id>` when a job has new events. A nudge only shortens the wait:
streams look at the table every `poll_seconds` anyway, so a lost one, or no Redis at all, costs
two seconds and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import defaultdict
from collections.abc import Iterator

import anyio
from redis.asyncio import Redis
from redis.exceptions import RedisError

log = logging.getLogger(__name__)
CHANNEL = "job:"
RECONNECT_SECONDS = 2.0


class Nudges:
    """Wakes the streams of a job. All methods belong to the event loop's thread."""

    def __init__(self, redis_url: str) -> None:
        self.redis_url = redis_url
        self._waiting: defaultdict[str, set[asyncio.Event]] = defaultdict(set)

    @contextlib.contextmanager
    def of(self, job_id: str) -> Iterator[asyncio.Event]:
        """An event that is set at every nudge of the job; the caller clears it."""
        event = asyncio.Event()
        self._waiting[job_id].add(event)
        try:
            yield event
        finally:
            self._waiting[job_id].discard(event)
            if not self._waiting[job_id]:
                del self._waiting[job_id]

    def wake(self, job_id: str) -> None:
        """Wake all streams of the job."""
        for event in self._waiting.get(job_id, ()):
            event.set()

    async def listen(self) -> None:
        """Listen for ever, across restarts of Redis. Cancel to stop."""
        while True:
            try:
                await self._subscribe()
            except (RedisError, OSError) as error:
                log.warning("no nudges from Redis, polling instead: %s", error)
            await anyio.sleep(RECONNECT_SECONDS)

    async def _subscribe(self) -> None:
        async with (
            Redis.from_url(self.redis_url, socket_connect_timeout=2) as redis,
            redis.pubsub() as subscription,
        ):
            await subscription.psubscribe(CHANNEL + "*")
            async for message in subscription.listen():
                if message["type"] == "pmessage":
                    self.wake(message["channel"].decode().removeprefix(CHANNEL))
