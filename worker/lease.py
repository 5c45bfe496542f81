"""A worker's hold on one task: the heartbeat, and writes that outlast a database restart.

The database's clock decides about the lease. This process only knows a lower bound: the lease lasts
at least `lease_seconds` from the moment *before* the last successful beat was sent. Past that bound
the lease counts as lost, whatever the reason (database gone, process stopped by SIGSTOP).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from jobs import queue
from jobs.database import Sessions
from jobs.problems import LeaseLost
from jobs.queue import Claim
from jobs.settings import Settings
from jobs.states import Desired
from worker.problems import Interrupted

log = logging.getLogger(__name__)
T = TypeVar("T")
OUTAGE = (OperationalError, InterfaceError, PoolTimeout, StorageInternalError)
FIRST_WAIT, LONGEST_WAIT = 0.1, 2.0


def is_outage(error: Exception) -> bool:
    """Whether trying again later may help: the server is away, restarting, or broke a deadlock."""
    return isinstance(error, OUTAGE) or (
        isinstance(error, DBAPIError) and error.connection_invalidated
    )


class Lease:
    """Renewed by a thread until it ends.

    with Lease(sessions, claim, settings, asked_at, ending, on_lost=engine.strike) as lease:
        lease.check()              # raises Interrupted: lost, pause, cancel or shutdown
        lease.write(act)           # act(session) in a transaction; waits out an outage
    """

    def __init__(
        self,
        sessions: Sessions,
        claim: Claim,
        settings: Settings,
        asked_at: float,
        ending: Callable[[], bool],
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        """`asked_at`: time.monotonic() before the claim was sent."""
        self.task_id, self.token = claim.task.id, claim.token
        self._sessions, self._settings = sessions, settings
        self._ending, self._on_lost = ending, on_lost
        self._deadline = asked_at + claim.expires_in
        self._desired: Desired = "run"
        self._lost = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Lease:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def lost(self) -> bool:
        """Whether nothing may be written any more."""
        return self._lost or time.monotonic() > self._deadline

    def check(self) -> None:
        """Raise Interrupted if the task should not go on."""
        if self.lost:
            raise Interrupted("lost")
        if self._ending():
            raise Interrupted("shutdown")
        if self._desired != "run":
            raise Interrupted(self._desired)

    def write(self, act: Callable[[Session], T], on_outage: Callable[[], None] | None = None) -> T:
        """`act(session)` in one transaction, again and again while the database is away.

        `act` must be fenced or harmless when repeated: a commit may have succeeded although its
        answer was lost. Raises Interrupted("lost") once the lease is over. `on_outage` is called
        at the first failure.
        """

        def transaction() -> T:
            with self._sessions.begin() as session:
                return act(session)

        return self.patiently(transaction, on_outage)

    def patiently(self, act: Callable[[], T], on_outage: Callable[[], None] | None = None) -> T:
        """`write` for what brings its own connection."""
        wait = FIRST_WAIT
        while True:
            if self.lost:
                raise Interrupted("lost")
            try:
                return act()
            except LeaseLost as error:
                self._lose(str(error))
                raise Interrupted("lost") from error
            except Exception as error:
                if not is_outage(error):
                    raise
                log.warning("the database is away, waiting: %s", _first_line(error))
                if on_outage is not None:
                    on_outage()
                    on_outage = None
            self._over.wait(wait)
            wait = min(2 * wait, LONGEST_WAIT)

    def attempt(self, act: Callable[[Session], object]) -> bool:
        """`write` once, for what may be missed (progress). False when the database is away."""
        try:
            with self._sessions.begin() as session:
                act(session)
            return True
        except LeaseLost as error:
            self._lose(str(error))
            raise Interrupted("lost") from error
        except Exception as error:
            if not is_outage(error):
                raise
            return False

    def _beat(self) -> None:
        while not self._over.wait(self._settings.beat_seconds):
            asked_at = time.monotonic()
            try:
                with self._sessions.begin() as session:
                    self._desired = queue.renew(session, self.task_id, self.token, self._settings)
                self._deadline = asked_at + self._settings.lease_seconds
            except LeaseLost as error:
                if not self._over.is_set():  # released by the main thread meanwhile
                    self._lose(str(error))
                return
            except Exception as error:
                # whatever it is, the lease is only as long as the last beat that succeeded
                log.warning("heartbeat failed: %s", _first_line(error))
            if self.lost:
                self._lose("no beat got through in time")
                return

    def released(self) -> None:
        """The task was given back: no more beats."""
        self._over.set()

    def _lose(self, why: str) -> None:
        if not self._lost:
            self._lost = True
            log.warning("lease %s on task %s lost: %s", self.token, self.task_id, why)
            self._on_lost()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
