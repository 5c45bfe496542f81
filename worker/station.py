"""What one pool child works with: database, doorbell, Optuna's storage, the warm engine."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from optuna.storages import RDBStorage
from sqlalchemy import Engine

from jobs.database import Sessions, bounded, connect, session_factory
from jobs.doorbell import Doorbell
from jobs.settings import Settings
from jobs.spec.protocol import Prepare, Prepared
from jobs.tables import Worker
from worker.engine_process import EngineProcess
from worker.settings import WorkerSettings
from worker.study import open_storage
from worker.task_log import TaskLog

log = logging.getLogger(__name__)
IDLE_STOP_SECONDS = 5.0  # an engine that does nothing has nothing to finish


@dataclass
class Station:
    """Made after the fork: connections must not be shared between processes."""

    settings: Settings
    own: WorkerSettings
    worker: Worker
    database: Engine
    sessions: Sessions
    doorbell: Doorbell
    engine: EngineProcess | None = None
    prepared: tuple[list[Prepare], Prepared] | None = None
    _storage: RDBStorage | None = field(default=None, repr=False)

    @classmethod
    def open(cls, settings: Settings, own: WorkerSettings, worker: Worker) -> Station:
        """A station for `worker`, which is registered already. Connects lazily."""
        database = connect(bounded(settings.database_url, settings.lease_seconds))
        doorbell = Doorbell(settings.redis_url)
        return cls(settings, own, worker, database, session_factory(database), doorbell)

    @property
    def storage(self) -> RDBStorage:
        """Optuna's storage, opened at first use."""
        if self._storage is None:
            self._storage = open_storage(self.settings.database_url, self.settings.lease_seconds)
        return self._storage

    def engine_for(self, request: Prepare, task_log: TaskLog) -> tuple[EngineProcess, bool]:
        """An engine, and whether it is prepared for `request` already."""
        engine = self.engine
        if engine is not None:
            if self.is_ready(request):
                engine.log = task_log
                return engine, True
            self.stop_engine()  # another model: its memory must be free before the next loads
        self.prepared = None
        self.engine = EngineProcess(self.own.engine_command, task_log, gpu=self.settings.gpu)
        log.info("engine started, process %d", self.engine.pid)
        return self.engine, False

    def is_ready(self, request: Prepare) -> bool:
        """Whether the engine that runs is prepared for `request`."""
        usable = self.engine is not None and self.engine.usable
        return usable and self.prepared is not None and request in self.prepared[0]

    def note_prepared(self, request: Prepare, prepared: Prepared) -> None:
        """Remember what the engine is prepared for; the resolved commit is the same request."""
        same = [request, request.model_copy(update={"revision": prepared.commit})]
        self.prepared = (same, prepared)

    def stop_engine(self, seconds: float = IDLE_STOP_SECONDS) -> None:
        """End the engine, if there is one."""
        if self.engine is not None:
            self.engine.end(seconds)
        self.engine = None
        self.prepared = None

    def strike_engine(self) -> None:
        """Kill the engine from the heartbeat's thread: the lease is lost."""
        engine = self.engine
        if engine is not None:
            engine.strike()

    def close(self) -> None:
        """End the engine and give the connections back."""
        self.stop_engine()
        self.doorbell.close()
        self.database.dispose()
