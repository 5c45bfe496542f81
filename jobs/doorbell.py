"""The doorbell: tells sleeping workers and live pages that something changed.

Nothing in correctness depends on it. Every failure of Redis is logged and swallowed: the
reconciler rings again for every claimable task, and live pages look at the table every few seconds.
Ring after the commit, never before, or a worker looks for a task that it cannot see yet.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from typing import Any

import redis
from celery import Celery

from jobs.states import TaskKind

log = logging.getLogger(__name__)
TASK_NAME = "nullspace.work"
TIMEOUT_SECONDS = 1.0


class Doorbell:
    """Rings over Celery (`ring`), nudges over publish/subscribe (`nudge`, `listen`)."""

    def __init__(self, redis_url: str) -> None:
        self._celery = Celery("nullspace", broker=redis_url, set_as_current=False)
        self._celery.conf.update(
            task_ignore_result=True,
            task_serializer="json",
            accept_content=["json"],
            broker_connection_timeout=TIMEOUT_SECONDS,
            broker_transport_options={
                "socket_connect_timeout": TIMEOUT_SECONDS,
                "socket_timeout": TIMEOUT_SECONDS,
                "max_retries": 0,
            },
            task_publish_retry=False,
        )
        self._redis = redis.Redis.from_url(
            redis_url,
            socket_connect_timeout=TIMEOUT_SECONDS,
            socket_timeout=TIMEOUT_SECONDS,
            decode_responses=True,
        )

    def ring(self, tasks: Iterable[tuple[uuid.UUID, TaskKind]]) -> None:
        """Send one message per task into the queue of its kind. The message is only the id."""
        try:
            for task_id, kind in tasks:
                self._celery.send_task(TASK_NAME, args=[str(task_id)], queue=kind, retry=False)
        except Exception as error:
            # kombu wraps Redis' failures in several unrelated classes
            log.warning("the doorbell is out of order: %s", error)

    def nudge(self, job_id: uuid.UUID) -> None:
        """Tell live pages of this job to look at the table."""
        try:
            self._redis.publish(_channel(job_id), "1")
        except (redis.RedisError, OSError) as error:
            log.warning("live pages were not nudged: %s", error)

    @contextmanager
    def listen(self, job_id: uuid.UUID) -> Generator[Listener, None, None]:
        """Hear the nudges of a job. Without Redis the listener only sleeps."""
        subscription: Any = None
        try:
            subscription = self._redis.pubsub(  # type: ignore[no-untyped-call]
                ignore_subscribe_messages=True
            )
            subscription.subscribe(_channel(job_id))
        except (redis.RedisError, OSError) as error:
            log.warning("no nudges: %s", error)
            subscription = None
        try:
            yield Listener(subscription)
        finally:
            if subscription is not None:
                with suppress(redis.RedisError, OSError):
                    subscription.close()

    def close(self) -> None:
        """Give the connections back."""
        with suppress(Exception):
            self._redis.close()
            self._celery.close()


class Listener:
    """Waits for nudges."""

    def __init__(self, subscription: Any) -> None:
        self._subscription = subscription

    def wait(self, seconds: float) -> bool:
        """Wait at most `seconds`. True when nudged (several nudges may be heard as one)."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if self._subscription is None:
                time.sleep(left)
                return False
            try:
                heard = self._subscription.get_message(timeout=left)
            except (redis.RedisError, OSError) as error:
                log.warning("no more nudges: %s", error)
                self._subscription = None
                continue
            if heard is not None:
                return True
        return False


def _channel(job_id: uuid.UUID) -> str:
    return f"job:{job_id}"
