"""The Celery worker. A message carries a task id and says only: look at the queue.

Settings and their reasons (SERVICE.md has the measurements):
- early acknowledgement: a long task that is acknowledged late is started again by the broker when
  its visibility timeout ends; here the lease in PostgreSQL decides who works on what;
- `worker_disable_prefetch`, one child: no message sits behind a task that runs for a day;
- losing Redis does not cancel the running task, and reconnecting never gives up;
- no result backend, JSON only, no remote control (so no `revoke(terminate=True)`).
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

from celery import Celery, signals

from jobs import workers
from jobs.database import connect, session_factory
from jobs.doorbell import TASK_NAME
from jobs.settings import Settings, settings
from jobs.states import TaskKind
from jobs.tables import Worker
from worker import inventory, launch, lifeline
from worker.lease import is_outage
from worker.reconciler import Reconciler
from worker.settings import WorkerSettings
from worker.station import Station
from worker.supervisor import work
from worker.tasks import TASKS

log = logging.getLogger(__name__)
# at INFO it names the address of every request, and a judge's or a webhook's may hold a secret
logging.getLogger("httpx").setLevel(logging.WARNING)
app = Celery("nullspace")
app.conf.update(
    task_acks_late=False,
    task_ignore_result=True,
    task_serializer="json",
    accept_content=["json"],
    worker_prefetch_multiplier=1,
    worker_disable_prefetch=True,
    worker_concurrency=1,
    worker_pool="prefork",
    worker_proc_alive_timeout=60,
    worker_cancel_long_running_tasks_on_connection_loss=False,
    worker_enable_remote_control=False,
    worker_send_task_events=False,
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
)
_registered: list[Worker] = []  # of the main process; the pool child inherits it by fork
_station: list[Station] = []  # of the pool child


@app.task(name=TASK_NAME)
def ring(task_id: str) -> None:
    """Somebody rang for `task_id`: claim and work until nothing is claimable."""
    if not _station:
        _station.append(Station.open(settings(), WorkerSettings(), _registered[0]))
    with lifeline.listening():
        work(_station[0])


@signals.worker_process_init.connect
def _child_begins(**_: Any) -> None:
    lifeline.hold()
    launch.die_with_parent(signal.SIGTERM)


@signals.worker_process_shutdown.connect
def _child_ends(**_: Any) -> None:
    while _station:
        _station.pop().close()


@signals.worker_shutting_down.connect
def _ending(**_: Any) -> None:
    lifeline.pull()


def accepted(configured: Settings) -> list[TaskKind]:
    """The kinds of tasks that this worker takes, which are also its queues. ValueError."""
    kinds = [kind.strip() for kind in configured.accepts.split(",") if kind.strip()]
    unknown = sorted(set(kinds) - set(TASKS))
    if unknown or not kinds:
        raise ValueError(
            f"NULLSPACE_ACCEPTS: {', '.join(unknown) or 'nothing'} is not among {', '.join(TASKS)}"
        )
    return [kind for kind in TASKS if kind in kinds]


def register(configured: Settings) -> Worker:
    """Tell the database of this worker; waits for it as long as it takes."""
    database = connect(configured.database_url)
    host = socket.gethostname()
    waited = 0.2
    while True:
        try:
            with session_factory(database).begin() as session:
                worker = workers.register(
                    session,
                    name=f"{host}-{os.getpid()}",
                    host=host,
                    pid=os.getpid(),
                    accepts=accepted(configured),
                    device=inventory.device(configured.gpu),
                    versions=inventory.versions(),
                )
            database.dispose()
            return worker
        except Exception as error:
            if not is_outage(error):
                raise
            log.warning("waiting for the database: %s", str(error).strip().splitlines()[0])
        time.sleep(waited)
        waited = min(2 * waited, 5.0)


def main() -> int:
    """Run a worker until SIGTERM or SIGINT. `python -m worker`, `nullspace worker`."""
    configured = settings()
    app.conf.update(broker_url=configured.redis_url)
    kinds = accepted(configured)
    _registered.append(register(configured))
    lifeline.lay()
    reconciler = Reconciler(configured, _registered[0].id)
    signals.worker_ready.connect(lambda **_: reconciler.start(), weak=False)
    serve: Callable[[list[str]], object] = app.worker_main
    try:
        serve(
            [
                "worker",
                "--pool=prefork",
                "--concurrency=1",
                f"--queues={','.join(kinds)}",
                f"--hostname=worker-{os.getpid()}@%h",
                "--loglevel=INFO",
                "--without-gossip",
                "--without-mingle",
                "--without-heartbeat",
            ]
        )
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    finally:
        reconciler.stop()
    return 0
