"""Claim a task, run it, give it back; again, until nothing is claimable.

| what happened                  | the task is released as                    | the engine     |
| ------------------------------ | ------------------------------------------ | -------------- |
| it ended                       | done                                       | stays warm     |
| its owner paused it            | paused                                     | stopped, 30 s  |
| its owner cancelled it         | cancelled                                  | stopped, 30 s  |
| this worker was told to end    | ready: another worker may have it at once  | killed         |
| the lease was lost             | not at all: it is somebody else's by now   | killed         |
| the engine died                | ready; failed, if it also died last time   | is dead        |
| the engine gave a typed error  | failed with it (jobs may pause instead)    | stopped        |

Slots that were begun and not finished need no word: their lease is over, so the next searcher is
handed them with their candidates.
"""

from __future__ import annotations

import logging
import time
import traceback
from typing import Any

from sqlalchemy.orm import Session

from jobs import queue
from jobs.queue import Claim
from jobs.states import TaskState
from worker import lifeline
from worker.lease import Lease, is_outage
from worker.problems import Cause, EngineDied, EngineError, Interrupted
from worker.run import Run
from worker.station import Station
from worker.task_log import TaskLog
from worker.tasks import TASKS

log = logging.getLogger(__name__)
DEATHS_ALLOWED = 1  # engine deaths in a row without a finished trial in between
ERROR_STOP_SECONDS = 5.0
LINGER_LOOK_SECONDS = 0.5
AFTER: dict[Cause, TaskState] = {"pause": "paused", "cancel": "cancelled", "shutdown": "ready"}


def work(station: Station) -> int:
    """Run tasks until nothing is claimable or this worker is to end. How many were run."""
    done, idle_after = 0, 0.0
    try:
        while not lifeline.ending():
            asked_at = time.monotonic()
            try:
                with station.sessions.begin() as session:
                    claim = queue.claim(session, station.worker, station.settings)
            except Exception as error:
                if not is_outage(error):
                    raise
                log.warning("the database is away; the reconciler rings when it is back")
                break
            if claim is not None:
                supervise(station, claim, asked_at)
                done += 1
                idle_after = time.monotonic() + station.own.linger_seconds
            elif station.engine is None or time.monotonic() > idle_after:
                break
            else:
                # the next task is often of the same job: an export, a chat, the evaluation
                lifeline.wait(LINGER_LOOK_SECONDS)
    finally:
        station.stop_engine()
    return done


def supervise(station: Station, claim: Claim, asked_at: float) -> None:
    """Run one claimed task to its release."""
    task, job = claim.task, claim.job
    log.info("job %s: %s task %s, lease %d", job.id, task.kind, task.id, claim.token)
    task_log = TaskLog(station.settings.logs / f"{task.id}.log")
    task_log.line("info", f"{task.kind} begins on {station.worker.name}, attempt {task.attempts}")
    lease = Lease(
        station.sessions,
        claim,
        station.settings,
        asked_at,
        lifeline.ending,
        on_lost=station.strike_engine,
    )
    station.doorbell.nudge(job.id)
    try:
        with lease:
            try:
                _run_and_release(station, claim, lease, task_log)
            except Interrupted:
                # only a lost lease gets here: nothing may be written any more
                station.stop_engine(0)
                task_log.line("warning", "the lease is lost; another worker goes on")
    finally:
        if station.engine is not None:
            station.engine.log = None
        task_log.close()
    _ring(station, claim)


def _run_and_release(station: Station, claim: Claim, lease: Lease, task_log: TaskLog) -> None:
    error: dict[str, Any] | None = None
    state: TaskState = "done"
    try:
        TASKS[claim.task.kind](Run(station, claim, lease, task_log))
    except Interrupted as interrupted:
        if interrupted.cause == "lost":
            raise
        station.stop_engine(0)
        state = AFTER[interrupted.cause]
    except EngineDied as death:
        station.stop_engine(0)
        error = death.facts()
        task_log.line("error", f"{death.message}\n{death.detail}")
        deaths = lease.write(lambda session: _count_death(session, claim))
        state = "ready" if deaths <= DEATHS_ALLOWED else "failed"
    except EngineError as refusal:
        station.stop_engine(ERROR_STOP_SECONDS)
        error, state = refusal.facts(), "failed"
        task_log.line("error", f"{refusal.reason}: {refusal.message}\n{refusal.detail}")
    except Exception as fault:
        station.stop_engine(0)
        log.exception("task %s", claim.task.id)
        error, state = _fault(fault), "failed"
        task_log.line("error", traceback.format_exc())
    task_log.line("info", f"released: {state}")
    lease.write(lambda session: _release(session, claim, state, error))
    lease.released()


def _release(
    session: Session, claim: Claim, state: TaskState, error: dict[str, Any] | None
) -> None:
    queue.release(session, claim.task.id, claim.token, state=state, error=error)


def _count_death(session: Session, claim: Claim) -> int:
    task = queue.fence(session, claim.task.id, claim.token)
    task.crashes += 1
    return task.crashes


def _fault(fault: Exception) -> dict[str, Any]:
    return {
        "reason": "engine_failed",
        "message": f"the worker failed: {type(fault).__name__}",
        "mend": "This is a fault of the software; the task's log has the details.",
    }


def _ring(station: Station, claim: Claim) -> None:
    """Tell other workers of what this one made claimable."""
    try:
        with station.sessions.begin() as session:
            ready = queue.claimable_of(session, claim.job.id)
    except Exception as error:
        if not is_outage(error):
            raise
        return
    station.doorbell.ring(ready)
    station.doorbell.nudge(claim.job.id)
