"""The heartbeat and patient writes, on a real database."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from jobs import control, queue, trials, workers
from jobs.database import Sessions
from jobs.queue import Claim
from jobs.settings import Settings
from jobs.spec.candidate import single_pass
from jobs.spec.protocol import AnatomyReport, Prepared, Scored
from jobs.spec.scores import Scores
from jobs.tables import Job, Task, User, Worker
from tests.service.processes import make_model, make_owner, submit_job, wait_until
from worker import export, search, spool
from worker.lease import Lease
from worker.problems import Interrupted
from worker.run import Run
from worker.settings import WorkerSettings
from worker.station import Station
from worker.task_log import TaskLog

PREPARED = Prepared(
    anatomy=AnatomyReport(architecture="Fake", layers=8, hidden=8, writers=[], coverage=1.0),
    device="cpu", device_name="none", dtype="float32", quantization="none", weight_bytes=1,
    source_bytes=1, batch_size=1, baseline={}, baseline_outcomes={},
)  # fmt: skip


@pytest.fixture
def quick(make_settings: Callable[..., Settings], tmp_path: Path) -> Settings:
    make_model(tmp_path / "models")
    return make_settings(models=tmp_path / "models", lease_seconds=1.0, beat_seconds=0.2)


@pytest.fixture
def claim(sessions: Sessions, quick: Settings) -> Claim:
    submit_job(sessions, quick, make_owner(sessions), ring=False, trials=3)
    with sessions.begin() as session:
        worker = workers.register(
            session, name="w", host="h", pid=1, accepts=["search"], device={}, versions={}
        )
        claimed = queue.claim(session, worker, quick)
    assert claimed is not None
    return claimed


def test_beats_keep_the_lease(sessions: Sessions, quick: Settings, claim: Claim) -> None:
    lost: list[bool] = []
    with Lease(
        sessions, claim, quick, time.monotonic(), lambda: False, lambda: lost.append(True)
    ) as lease:
        began = time.monotonic()
        wait_until(lambda: time.monotonic() > began + 2 * quick.lease_seconds, 5)
        lease.check()
        with sessions() as session:
            assert queue.fence(session, claim.task.id, claim.token)
    assert lost == []


def test_a_pause_is_noticed(sessions: Sessions, quick: Settings, claim: Claim) -> None:
    with Lease(sessions, claim, quick, time.monotonic(), lambda: False) as lease:
        lease.check()
        with sessions.begin() as session:
            job = session.get_one(Job, claim.job.id)
            control.pause(session, session.get_one(User, job.owner_id), job)

        def interrupted() -> str:
            try:
                lease.check()
            except Interrupted as caught:
                return caught.cause
            return ""

        assert wait_until(interrupted, 5) == "pause"


def test_shutdown_comes_before_pause(sessions: Sessions, quick: Settings, claim: Claim) -> None:
    lease = Lease(sessions, claim, quick, time.monotonic(), lambda: True)
    with pytest.raises(Interrupted, match="shutdown"):
        lease.check()


def test_somebody_else_has_the_task(sessions: Sessions, quick: Settings, claim: Claim) -> None:
    lost: list[bool] = []
    with Lease(
        sessions, claim, quick, time.monotonic(), lambda: False, lambda: lost.append(True)
    ) as lease:
        with sessions.begin() as session:
            session.get_one(Task, claim.task.id).lease_token = claim.token + 1
        wait_until(lambda: lost, 5, "the engine is struck")
        with pytest.raises(Interrupted, match="lost"):
            lease.write(lambda session: None)


def test_a_lease_that_may_have_lapsed_counts_as_lost(
    sessions: Sessions, quick: Settings, claim: Claim
) -> None:
    """Without asking the database: that is what a process that was stopped finds first."""
    asked_at = time.monotonic() - quick.lease_seconds - 0.01
    lease = Lease(sessions, claim, quick, asked_at, lambda: False)
    with pytest.raises(Interrupted, match="lost"):
        lease.check()
    with pytest.raises(Interrupted, match="lost"):
        lease.write(lambda session: None)


def test_a_write_whose_connection_breaks_is_made_again(
    sessions: Sessions, quick: Settings, claim: Claim
) -> None:
    outages: list[bool] = []
    tries: list[int] = []

    def act(session: Session) -> int:
        tries.append(1)
        if len(tries) < 3:
            session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
        return 7

    with Lease(sessions, claim, quick, time.monotonic(), lambda: False) as lease:
        assert lease.write(act, on_outage=lambda: outages.append(True)) == 7
    assert (len(tries), outages) == (3, [True])


def test_a_faulty_write_is_not_repeated(sessions: Sessions, quick: Settings, claim: Claim) -> None:
    with (
        Lease(sessions, claim, quick, time.monotonic(), lambda: False) as lease,
        pytest.raises(ZeroDivisionError),
    ):
        lease.write(lambda session: 1 / 0)


def test_spooled_scores_are_of_exactly_one_candidate(tmp_path: Path, claim: Claim) -> None:
    scored = Scored(
        scores=Scores(role="search", refusals=1, total=4, kl_first=1e-300, kl_multi=0.1),
        outcomes=[],
    )
    mine, other = single_pass(8), single_pass(12)
    spool.keep(tmp_path, claim.job.id, 3, spool.Spooled(candidate=mine, scored=scored))
    assert spool.take(tmp_path, claim.job.id, 3, mine) == scored
    assert spool.take(tmp_path, claim.job.id, 3, other) is None
    assert spool.take(tmp_path, claim.job.id, 4, mine) is None
    spool.drop(tmp_path, claim.job.id, 3)
    assert spool.take(tmp_path, claim.job.id, 3, mine) is None
    assert list(tmp_path.glob("*.json")) == []


def test_what_a_run_says_follows_an_amended_budget(
    sessions: Sessions, quick: Settings, claim: Claim, tmp_path: Path
) -> None:
    """More trials are given while the search runs; a card counts those that were scored."""
    quick = quick.model_copy(update={"lease_seconds": 30.0})  # that it lapses is not the subject
    with sessions.begin() as session:
        queue.renew(session, claim.task.id, claim.token, quick)
    log = TaskLog(tmp_path / "task.log")
    station = Station.open(quick, WorkerSettings(), Worker(name="w", accepts=[], device={}))
    with Lease(sessions, claim, quick, time.monotonic(), lambda: False) as lease:
        run = Run(station, claim, lease, log)
        with sessions.begin() as session:
            job = session.get_one(Job, claim.job.id)
            control.amend(session, session.get_one(User, job.owner_id), job, trials=7)
            [slot] = trials.reserve(session, claim.task, claim.token, 1)
            candidate = single_pass(8)
            trials.begin(
                session, claim.task, claim.token, slot.number, candidate, {}, "single_pass", None
            )
            scores = Scores(role="search", refusals=1, total=4, kl_first=0.5, kl_multi=0.5)
            done = Scored(scores=scores, outcomes=[])
            trials.complete(session, claim.task, claim.token, slot.number, done)
        search.report(run)
        with sessions.begin() as session:
            progress = session.get_one(Job, claim.job.id).progress
            assert (progress["done"], progress["total"]) == (1, 7)
            row = trials.get(session, claim.job.id, slot.number)
        assert export.card(run, PREPARED, row)["trials"] == 1
    station.close()
    log.close()
