"""One pass of the reconciler; files and webhooks."""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import hmac
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
import redis
from sqlalchemy import select, text

from jobs import queue, webhooks, workers
from jobs.database import Sessions
from jobs.settings import Settings
from jobs.tables import Job, Task, User, WebhookDelivery, Worker
from tests.service.processes import make_model, make_owner, submit_job
from worker import inventory
from worker.celery_app import accepted
from worker.files import prune
from worker.reconciler import LOCK, Reconciler
from worker.webhooks import Refused, checked_address, deliver, send, sign


@pytest.fixture
def quick(make_settings: Callable[..., Settings], tmp_path: Path) -> Settings:
    make_model(tmp_path / "models")
    return make_settings(models=tmp_path / "models", lease_seconds=1.0)


@pytest.fixture
def worker(sessions: Sessions) -> Worker:
    with sessions.begin() as session:
        return workers.register(
            session, name="w", host="h", pid=1, accepts=["search"], device={}, versions={}
        )


def test_it_reaps_and_rings_once(sessions: Sessions, quick: Settings, worker: Worker) -> None:
    submit_job(sessions, quick, make_owner(sessions), ring=False, trials=3)
    with sessions.begin() as session:
        claim = queue.claim(session, worker, quick)
        assert claim is not None
        expired = dt.datetime.now(dt.timezone.utc) - dt.timedelta(seconds=1)
        session.get_one(Task, claim.task.id).lease_expires_at = expired
    reconciler = Reconciler(quick, worker.id)
    with redis.Redis.from_url(quick.redis_url) as client:
        for _ in range(3):
            assert reconciler.reconcile()
            assert client.llen("search") == 1, "messages do not pile up"
    with sessions() as session:
        assert session.get_one(Task, claim.task.id).state == "ready"
    reconciler._doorbell.close()
    reconciler._database.dispose()
    reconciler._redis.close()


def test_one_at_a_time(sessions: Sessions, quick: Settings, worker: Worker) -> None:
    reconciler = Reconciler(quick, worker.id)
    with sessions.begin() as other:
        other.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK})
        assert reconciler.reconcile() is False
    assert reconciler.reconcile() is True
    reconciler._doorbell.close()
    reconciler._database.dispose()
    reconciler._redis.close()


def test_old_leavings_are_removed(quick: Settings) -> None:
    for folder in (quick.artifacts / ".tmp-old-1", quick.artifacts / ".tmp-new-2"):
        folder.mkdir(parents=True)
    (quick.artifacts / "ready").mkdir()
    quick.spool.mkdir(parents=True)
    (quick.spool / "old.json").touch()
    then = time.time() - 30 * 86_400
    for path in (
        quick.artifacts / ".tmp-old-1",
        quick.artifacts / "ready",
        quick.spool / "old.json",
    ):
        os.utime(path, (then, then))
    assert {path.name for path in prune(quick)} == {".tmp-old-1", "old.json"}
    assert {path.name for path in quick.artifacts.iterdir()} == {".tmp-new-2", "ready"}


def test_kinds_are_checked(make_settings: Callable[..., Settings]) -> None:
    assert accepted(make_settings(accepts="chat, search")) == ["search", "chat"]
    with pytest.raises(ValueError, match="NULLSPACE_ACCEPTS: serach"):
        accepted(make_settings(accepts="serach"))


def test_inventory() -> None:
    found = inventory.device()
    assert found["kind"] in ("cpu", "cuda") and found["name"]
    assert found["memory_bytes"] > 1e8
    assert "optuna" in inventory.versions()


def test_signature_is_that_of_standard_webhooks() -> None:
    """The formula of standardwebhooks.com, written out once more with its published layout."""
    key = os.urandom(24)
    secret = "whsec_" + base64.b64encode(key).decode().replace("+", "-").replace("/", "_")
    body = b'{"type":"job.completed"}'
    message, stamp = "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330
    expected = hmac.new(key, f"{message}.{stamp}.".encode() + body, hashlib.sha256).digest()
    assert sign(secret, message, stamp, body) == "v1," + base64.b64encode(expected).decode()


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "10.1.2.3", "169.254.169.254", "::1", "::ffff:10.0.0.1", "fd00::1", "0.0.0.0",
     "224.0.0.1", "100.64.0.1", "localhost"],
)  # fmt: skip
def test_private_addresses_are_refused(host: str) -> None:
    with pytest.raises(Refused, match="not a public address"):
        checked_address(host, 443)


def test_a_refused_address_is_noted_and_tried_later(sessions: Sessions, quick: Settings) -> None:
    owner = make_owner(sessions)
    job_id = submit_job(sessions, quick, owner, ring=False, trials=3)
    with sessions.begin() as session:
        webhooks.create(session, session.get_one(User, owner.id), "https://127.0.0.1/hook")
        webhooks.enqueue(session, session.get_one(Job, job_id), "job.completed")
    with sessions.begin() as session:
        assert deliver(session) is True
    with sessions.begin() as session:
        assert deliver(session) is False, "not before its time"
        [delivery] = session.scalars(select(WebhookDelivery))
        assert (delivery.attempts, delivery.delivered_at) == (1, None)
        assert "not a public address" in delivery.error
        assert delivery.next_at is not None


def test_unknown_worker_ids_do_no_harm(sessions: Sessions, quick: Settings) -> None:
    reconciler = Reconciler(quick, uuid.uuid4())
    assert reconciler.reconcile()
    reconciler._doorbell.close()
    reconciler._database.dispose()
    reconciler._redis.close()


@pytest.mark.parametrize("host", ["a" * 64 + ".example", "a..example", "1.1.1.1%"])
def test_an_address_that_cannot_be_looked_up_blocks_no_other_message(
    sessions: Sessions, quick: Settings, host: str
) -> None:
    owner = make_owner(sessions)
    job_id = submit_job(sessions, quick, owner, ring=False, trials=3)
    with sessions.begin() as session:
        webhooks.create(session, session.get_one(User, owner.id), f"https://{host}/hook")
        webhooks.enqueue(session, session.get_one(Job, job_id), "job.completed")
    with sessions.begin() as session:
        assert deliver(session) is True
    with sessions.begin() as session:
        assert deliver(session) is False, "not before its time"
        assert session.scalars(select(WebhookDelivery.attempts)).one() == 1


@pytest.mark.parametrize("opening", [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nx: "])
def test_a_receiver_that_never_ends_does_not_hold_the_reconciler(opening: bytes) -> None:
    """It answers a byte at a time: every read is in time, the whole answer never is."""
    over = threading.Event()

    def drip(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(opening)
            while not over.wait(0.05):
                try:
                    connection.sendall(b"x")
                except OSError:
                    return

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=drip, args=(server,), daemon=True)
        thread.start()
        target = f"http://127.0.0.1:{server.getsockname()[1]}/"
        began = time.monotonic()
        try:
            if opening.endswith(b"\r\n\r\n"):
                assert send(target, b"{}", {}, "localhost", seconds=2.0) == 200
            else:
                with pytest.raises(Refused, match="no answer within 2 s"):
                    send(target, b"{}", {}, "localhost", seconds=2.0)
            assert time.monotonic() - began < 5
        finally:
            over.set()
            thread.join(5)


def test_a_worker_that_never_became_ready_still_says_goodbye(
    sessions: Sessions, quick: Settings, worker: Worker
) -> None:
    """SIGTERM while Redis is away: `stop` without `start`."""
    Reconciler(quick, worker.id).stop()
    with sessions() as session:
        assert session.get_one(Worker, worker.id).stopped_at is not None
