"""Every few seconds: end expired leases, ring for what is claimable, clean up, deliver webhooks.

A thread of the worker's main process. Of all workers one at a time does it (advisory lock), and a
pass that fails, because PostgreSQL or Redis restarts, is simply followed by the next.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections import defaultdict
from contextlib import suppress

import redis
from sqlalchemy import text

from jobs import queue, workers
from jobs.database import bounded, connect, session_factory
from jobs.doorbell import Doorbell
from jobs.settings import Settings
from jobs.states import TaskKind
from worker.files import prune
from worker.webhooks import deliver

log = logging.getLogger(__name__)
LOCK = 0x6E73_7263
MESSAGES = 5  # a pass is not held up by slow receivers for long
PRUNE_SECONDS = 3600.0

# The main process forks a new pool child when the old one dies. Holding this over a pass, and over
# the fork, means that a child never inherits a lock that this thread had taken.
_between_passes = threading.Lock()
os.register_at_fork(
    before=_between_passes.acquire,
    after_in_parent=_between_passes.release,
    after_in_child=_between_passes.release,
)


class Reconciler:
    """`start` and `stop` a thread that calls `reconcile` every `settings.reconcile_seconds`."""

    def __init__(self, settings: Settings, worker_id: uuid.UUID) -> None:
        self._settings, self._worker_id = settings, worker_id
        self._database = connect(
            bounded(settings.database_url, settings.lease_seconds), pool_size=2
        )
        self._sessions = session_factory(self._database)
        self._doorbell = Doorbell(settings.redis_url)
        self._redis = redis.Redis.from_url(
            settings.redis_url, socket_connect_timeout=1, socket_timeout=1
        )
        self._pruned_at = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="reconciler", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Wait for the pass that runs, say goodbye, close the connections. Also before `start`."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(timeout=15)
        with suppress(Exception), self._sessions.begin() as session:
            workers.stop(session, self._worker_id)
        self._doorbell.close()
        self._redis.close()
        self._database.dispose()

    def _loop(self) -> None:
        while not self._over.is_set():
            try:
                with _between_passes:
                    self.reconcile()
            except Exception as error:
                # every kind of failure has the same answer: the next pass
                log.warning("reconciler: %s", str(error).strip().splitlines()[:1])
            self._over.wait(self._settings.reconcile_seconds)

    def reconcile(self) -> bool:
        """One pass. False when another worker is at it."""
        with self._sessions.begin() as session:
            workers.seen(session, self._worker_id)
        with self._database.begin() as holder:
            mine = holder.execute(text("SELECT pg_try_advisory_xact_lock(:key)"), {"key": LOCK})
            if not mine.scalar_one():
                return False
            with self._sessions.begin() as session:
                reaped = queue.reap(session)
            with self._sessions.begin() as session:
                waiting = queue.claimable(session)
            for task_id in reaped:
                log.warning("the lease on task %s expired", task_id)
        self._doorbell.ring(self._unrung(waiting))
        for _ in range(MESSAGES):
            with self._sessions.begin() as session:
                if not deliver(session):
                    break
        if time.monotonic() - self._pruned_at > PRUNE_SECONDS or not self._pruned_at:
            self._pruned_at = time.monotonic()
            prune(self._settings)
        return True

    def _unrung(
        self, waiting: list[tuple[uuid.UUID, TaskKind]]
    ) -> list[tuple[uuid.UUID, TaskKind]]:
        """Those for which no message lies in the queue: any message makes a worker claim anything.

        Without this, tasks that wait for hours behind a long one would gather thousands.
        """
        by_kind: dict[TaskKind, list[tuple[uuid.UUID, TaskKind]]] = defaultdict(list)
        for task in waiting:
            by_kind[task[1]].append(task)
        missing = []
        for kind, tasks in by_kind.items():
            try:
                lying = int(self._redis.llen(kind))
            except (redis.RedisError, OSError):
                lying = 0
            missing += tasks[: max(0, len(tasks) - lying)]
        return missing
