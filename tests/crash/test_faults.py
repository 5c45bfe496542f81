"""The table "Crash model" of the service: each line is a test, on real servers and processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import redis

from jobs import artifacts, control
from jobs.database import connect, session_factory
from jobs.settings import Settings
from jobs.tables import Artifact, Job
from migrations import upgrade
from nullspace.embedded import start_postgres, start_redis
from tests.crash.conftest import QUICK, Stage, make_stage
from tests.service.processes import live_engines, ring_for, wait_until

pytestmark = pytest.mark.crash
rarely = pytest.mark.slow  # what other tests show too, or take long to show


@pytest.mark.parametrize("lanes", [0, 1, 2])
def test_engine_killed_once(stage: Stage, lanes: int) -> None:
    """Also while candidates join the request that runs."""
    stage.lanes = lanes
    worker = stage.start_worker()
    job_id = stage.submit(trials=8)
    stage.wait_complete(job_id, 3)
    stage.order("die")
    stage.wait_state(job_id, "completed")
    stage.check(job_id)
    [search] = [task for task in stage.tasks(job_id) if task.kind == "search"]
    assert search.attempts == 2
    assert search.crashes == 0, "a finished trial resets the count"
    log = (stage.settings.logs / f"{search.id}.log").read_text()
    assert "the last words" in log and "SIGKILL" in log
    wait_until(lambda: not live_engines(stage.orders), 10, "the engine ends when nothing is left")
    left = worker.tree()
    assert len(left) == 2
    worker.terminate()
    assert worker.wait(15) == 0
    _, alive = psutil.wait_procs(left, timeout=5)
    assert alive == []


def test_engine_that_always_dies_fails_the_job_after_one_retry(stage: Stage) -> None:
    stage.start_worker()
    stage.order("die-always")
    job_id = stage.submit(trials=4)
    stage.wait_state(job_id, "failed")
    job = stage.job(job_id)
    assert job.error is not None and job.error["reason"] == "engine_died"
    assert "SIGKILL" in job.error["message"]
    assert [task.attempts for task in stage.tasks(job_id)] == [2]


def test_worker_killed_with_its_children(stage: Stage) -> None:
    stage.delay = 0.15
    first = stage.start_worker()
    job_id = stage.submit(trials=12)
    stage.wait_complete(job_id, 3)
    assert live_engines(stage.orders)
    first.signal_group(signal.SIGKILL)
    wait_until(lambda: not live_engines(stage.orders), 5, "the engine dies with its worker")
    stage.start_worker()
    stage.wait_state(job_id, "completed")
    stage.check(job_id)


@pytest.mark.parametrize("which", ["main", pytest.param("child", marks=rarely)])
def test_one_process_of_a_worker_killed(stage: Stage, which: str) -> None:
    stage.delay = 0.15
    first = stage.start_worker()
    job_id = stage.submit(trials=12)
    stage.wait_complete(job_id, 3)
    main, child, *_ = first.tree()
    assert child.ppid() == main.pid
    victim = main if which == "main" else child
    victim.kill()
    wait_until(lambda: not live_engines(stage.orders), 5, "the engine dies")
    if which == "main":
        wait_until(lambda: not child.is_running(), 5, "the pool child follows")
        handed_back = [task.state for task in stage.tasks(job_id)]
        assert handed_back == ["ready"], "the child handed its lease back"
        stage.start_worker()
    stage.wait_state(job_id, "completed")
    stage.check(job_id)


def test_worker_stopped_past_its_lease(stage: Stage) -> None:
    stage.delay = 0.15
    first = stage.start_worker()
    job_id = stage.submit(trials=14)
    stage.wait_complete(job_id, 3)
    first.signal_group(signal.SIGSTOP)
    stage.start_worker()
    wait_until(lambda: stage.tasks(job_id)[0].attempts == 2, 15, "another worker claims")
    stage.wait_complete(job_id, 6)
    first.signal_group(signal.SIGCONT)
    wait_until(lambda: len(live_engines(stage.orders)) == 1, 10, "the late engine is killed")
    stage.wait_state(job_id, "completed")
    stage.check(job_id)
    [search] = [task for task in stage.tasks(job_id) if task.kind == "search"]
    assert "lease is lost" in (stage.settings.logs / f"{search.id}.log").read_text()


def test_flushall(stage: Stage) -> None:
    stage.delay = 0.1
    stage.start_worker()
    running = stage.submit(trials=10)
    stage.wait_complete(running, 2)
    waiting = stage.submit(trials=3)
    with redis.Redis.from_url(stage.settings.redis_url) as client:
        client.flushdb()
    stage.wait_state(running, "completed")
    stage.wait_state(waiting, "completed")
    stage.check(running)
    stage.check(waiting)


@rarely
def test_nobody_rang(stage: Stage) -> None:
    stage.start_worker()
    job_id = stage.submit(trials=3, ring=False)
    stage.wait_state(job_id, "completed")
    stage.check(job_id)


def test_redis_restarts(
    make_settings: Callable[..., Settings], stage: Stage, tmp_path: Path
) -> None:
    cache = start_redis(tmp_path / "own-redis", durable=False)
    try:
        stage.settings = make_settings(models=tmp_path / "models", REDIS_URL=cache.url, **QUICK)
        stage.delay = 0.1
        stage.start_worker()
        running = stage.submit(trials=12)
        stage.wait_complete(running, 2)
        waiting = stage.submit(trials=3)
        cache.restart()
        stage.wait_state(running, "completed")
        stage.wait_state(waiting, "completed")
        stage.check(running)
        stage.check(waiting)
    finally:
        cache.stop()


@pytest.mark.parametrize("away", [0.0, pytest.param(3.5, marks=rarely)])
def test_postgresql_restarts(
    make_settings: Callable[..., Settings], tmp_path: Path, redis_url: str, away: float
) -> None:
    """For a moment, and for longer than a lease."""
    server = start_postgres(tmp_path / "own-postgres", port=0)
    try:
        upgrade(server.tcp_url)
        settings = make_settings(models=tmp_path / "models", DATABASE_URL=server.tcp_url, **QUICK)
        engine = connect(server.tcp_url)
        with make_stage(settings, session_factory(engine), tmp_path) as stage:
            stage.delay = 0.1
            stage.start_worker()
            job_id = stage.submit(trials=12)
            stage.wait_complete(job_id, 3)
            if away:
                server.stop()
                gone = time.monotonic()
                if away > settings.lease_seconds:
                    wait_until(lambda: not live_engines(stage.orders), 15, "the lease lapses")
                wait_until(lambda: time.monotonic() > gone + away, away + 1)
                server.start()
            else:
                server.restart()
            stage.wait_state(job_id, "completed")
            stage.check(job_id)
        engine.dispose()
    finally:
        server.stop()


def test_sigterm_hands_the_task_back_at_once(stage: Stage) -> None:
    stage.delay = 60.0
    first = stage.start_worker()
    job_id = stage.submit(trials=4)
    wait_until(lambda: [t.state for t in stage.tasks(job_id)] == ["running"], 20)
    wait_until(lambda: live_engines(stage.orders), 20)
    told = time.monotonic()
    first.terminate()
    wait_until(lambda: [t.state for t in stage.tasks(job_id)] == ["ready"], 10, "handed back")
    assert time.monotonic() - told < stage.settings.lease_seconds + 2
    assert first.wait(15) == 0
    assert not live_engines(stage.orders)
    assert stage.job(job_id).state == "queued"
    stage.delay = 0.02
    stage.start_worker()
    stage.wait_state(job_id, "completed")
    stage.check(job_id)


@pytest.mark.parametrize("lanes", [0, 2])
def test_pause_resume_cancel(stage: Stage, lanes: int) -> None:
    stage.lanes = lanes
    stage.delay = 0.1
    stage.start_worker()
    job_id = stage.submit(trials=60)
    stage.wait_complete(job_id, 2)
    stage.write(lambda s: control.pause(s, stage.owner, s.get_one(Job, job_id)))
    stage.wait_state(job_id, "paused", 10)
    wait_until(lambda: not live_engines(stage.orders), 5, "the GPU is free while paused")
    done = stage.complete(job_id)
    stage.write(lambda s: control.resume(s, stage.owner, s.get_one(Job, job_id)))
    ring_for(stage.sessions, stage.settings, job_id)
    stage.wait_complete(job_id, done + 2)
    stage.write(lambda s: control.cancel(s, stage.owner, s.get_one(Job, job_id)))
    stage.wait_state(job_id, "cancelled", 10)
    stage.check(job_id, "cancelled")


@rarely
def test_an_engine_deaf_to_stop_is_killed(stage: Stage) -> None:
    stage.delay = 60.0
    stage.order("deaf")
    stage.start_worker(NULLSPACE_STOP_SECONDS="0.5")
    job_id = stage.submit(trials=4)
    wait_until(lambda: live_engines(stage.orders), 20)
    stage.write(lambda s: control.pause(s, stage.owner, s.get_one(Job, job_id)))
    stage.wait_state(job_id, "paused", 10)
    assert not live_engines(stage.orders)


def test_more_trials_after_the_end(stage: Stage) -> None:
    stage.start_worker()
    job_id = stage.submit(trials=4)
    stage.wait_state(job_id, "completed")
    stage.write(lambda s: control.amend(s, stage.owner, s.get_one(Job, job_id), trials=9))
    ring_for(stage.sessions, stage.settings, job_id)
    wait_until(lambda: stage.complete(job_id) == 9, 30)
    stage.wait_state(job_id, "completed")


@pytest.mark.parametrize("op", ["prepare", pytest.param("score", marks=rarely)])
def test_a_typed_reason_pauses_and_is_not_retried(stage: Stage, op: str) -> None:
    refusal = {"reason": "hub_unreachable", "message": "no answer", "mend": "try later"}
    stage.order(f"refuse-{op}", json.dumps(refusal))
    stage.start_worker()
    job_id = stage.submit(trials=4)
    stage.wait_state(job_id, "paused")
    assert stage.job(job_id).error == refusal
    assert [task.attempts for task in stage.tasks(job_id)] == [1]
    (stage.orders / f"refuse-{op}").unlink()
    stage.write(lambda s: control.resume(s, stage.owner, s.get_one(Job, job_id)))
    ring_for(stage.sessions, stage.settings, job_id)
    stage.wait_state(job_id, "completed")
    stage.check(job_id)


def _export(stage: Stage, job_id: object) -> Artifact:
    with stage.sessions.begin() as session:
        job = session.get_one(Job, job_id)
        artifact = artifacts.request(session, stage.owner, job, 0, "merged")
    ring_for(stage.sessions, stage.settings, job.id)

    def over() -> Artifact | None:
        with stage.sessions() as session:
            found = session.get_one(Artifact, artifact.id)
            return found if found.state in ("ready", "failed") else None

    found = wait_until(over, 20, "the export is over")
    assert found is not None
    return found


@pytest.fixture
def small_disk(stage: Stage) -> Path:
    """A file system of 64 KiB under the artifacts folder."""
    folder = stage.settings.artifacts
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    stage.stack.callback(subprocess.run, ["umount", "-l", str(folder)], check=True)
    return folder


def test_disk_full_at_export(stage: Stage, small_disk: Path) -> None:
    stage.start_worker()
    job_id = stage.submit(trials=1)
    stage.wait_state(job_id, "completed")
    artifact = _export(stage, job_id)
    assert artifact.state == "failed"
    assert artifact.error is not None and artifact.error["reason"] == "disk_full"
    assert list(small_disk.iterdir()) == [], "what was written is removed"
    assert stage.job(job_id).state == "completed", "the job is not harmed"
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    assert _export(stage, job_id).state == "ready"
    stage.check(job_id)


def test_export_after_a_refusal(stage: Stage) -> None:
    refusal = {"reason": "disk_full", "message": "full", "mend": "free some space"}
    stage.order("refuse-export", json.dumps(refusal))
    stage.start_worker()
    job_id = stage.submit(trials=1)
    stage.wait_state(job_id, "completed")
    artifact = _export(stage, job_id)
    assert (artifact.state, artifact.error) == ("failed", refusal)
    assert list(stage.settings.artifacts.iterdir()) == []
    (stage.orders / "refuse-export").unlink()
    ready = _export(stage, job_id)
    assert ready.state == "ready"
    folder = artifacts.folder(stage.settings, ready.id)
    with stage.sessions() as session:
        listed = {file.name: file.size for file in artifacts.files(session, ready.id)}
    assert listed == {path.name: path.stat().st_size for path in folder.iterdir()}
    card = json.loads((folder / "card.json").read_text())
    assert card["scores"]["heldout"]["interval"][0] <= 1 and card["commit"] == "c0ffee"
