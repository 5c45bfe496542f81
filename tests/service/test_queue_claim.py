"""Who gets which task: the policy of the claim, on a real PostgreSQL."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import text, update

from jobs import control, lifecycle, queue, workers
from jobs.database import Sessions
from jobs.settings import Settings
from jobs.tables import Job, Task, User, Worker
from tests.service.builders import add_job, add_worker, make_spec
from tests.service.claims import claim, must_claim


def test_twenty_threads_never_share_a_task(
    sessions: Sessions, crowd: Sessions, owner: User, farm: Settings
) -> None:
    """50 tasks of 5 jobs, 20 sessions at once: each task once, tokens unique and rising."""
    with sessions.begin() as session:
        for _ in range(5):
            add_job(session, owner, farm, trials=10, parallelism=10)
        accepting = [add_worker(session) for _ in range(20)]
    start = threading.Barrier(20)

    def work(worker: Worker) -> list[tuple[uuid.UUID, int]]:
        start.wait(30)
        taken = []
        while (found := claim(crowd, worker, farm)) is not None:
            taken.append((found.task.id, found.token))
        return taken

    with ThreadPoolExecutor(20) as pool:
        taken = [pair for pairs in pool.map(work, accepting) for pair in pairs]
    # a session that met only locked rows may have gone home early; nothing is lost by that
    while (late := claim(sessions, accepting[0], farm)) is not None:
        taken.append((late.task.id, late.token))
    assert len(taken) == 50
    assert len({task for task, _ in taken}) == 50
    assert len({token for _, token in taken}) == 50


def test_parallelism_holds_against_simultaneous_claims(
    sessions: Sessions, crowd: Sessions, owner: User, farm: Settings
) -> None:
    """Eight ready search tasks, parallelism lowered to two, eight sessions at once: two leases."""
    with sessions.begin() as session:
        job = add_job(session, owner, farm, trials=20, parallelism=8)
        control.amend(session, owner, job, parallelism=2)
        accepting = [add_worker(session) for _ in range(8)]
    start = threading.Barrier(8)

    def work(worker: Worker) -> queue.Claim | None:
        start.wait(30)
        return claim(crowd, worker, farm)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(work, accepting))
    assert sum(one is not None for one in found) == 2


def test_parallelism_holds_against_a_claim_that_saw_the_past(
    sessions: Sessions, owner: User, farm: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One claim is held up between its snapshot and its locks while another takes the last place.

    The gate is an advisory lock inside the very statement.
    """
    with sessions.begin() as session:
        job = add_job(session, owner, farm, trials=20, parallelism=2)
        control.amend(session, owner, job, parallelism=1)
        late, early = add_worker(session), add_worker(session)
    gate = "gate AS MATERIALIZED (SELECT pg_advisory_xact_lock(1))"
    gated = str(queue.CLAIM).replace("WITH ", f"WITH {gate}, ", 1)
    gated = gated.replace(queue.SOURCE, f"gate CROSS JOIN {queue.SOURCE}")
    with ThreadPoolExecutor(1) as pool, sessions() as keeper:
        keeper.execute(text("SELECT pg_advisory_xact_lock(1)"))
        with monkeypatch.context() as patch:
            patch.setattr(queue, "CLAIM", text(gated))
            found = pool.submit(claim, sessions, late, farm)
            waiting = text(
                "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
            )
            end = time.monotonic() + 30
            while not keeper.execute(waiting).scalar_one():
                assert time.monotonic() < end and not found.done()
        must_claim(sessions, early, farm)
        keeper.commit()
        assert found.result(30) is None


def test_a_busy_job_is_waited_for(
    sessions: Sessions, owner: User, farm: Settings, worker: Worker
) -> None:
    """A claim during another's write of the same job waits for it and does not come back empty."""
    with sessions.begin() as session:
        job = add_job(session, owner, farm)
    held, ready = threading.Event(), threading.Event()

    def hold() -> None:
        with sessions.begin() as session:
            lifecycle.lock(session, job.id)
            ready.set()
            held.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    ready.wait(10)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(claim, sessions, worker, farm)
        with sessions.begin() as session:
            waiting = text("SELECT count(*) FROM pg_locks WHERE NOT granted")
            end = time.monotonic() + 30
            while not session.execute(waiting).scalar_one():
                assert time.monotonic() < end and not found.done()
        held.set()
        assert found.result(10) is not None
    thread.join(10)


def test_priority_then_fair_share_then_age(
    sessions: Sessions, owner: User, make_user: Callable[..., User], farm: Settings, worker: Worker
) -> None:
    other, heavy = make_user(), make_user()
    of_owner = []
    for name in ("first", "second"):  # a transaction has one time
        with sessions.begin() as session:
            of_owner.append(add_job(session, owner, farm, name=name))
    with sessions.begin() as session:
        session.execute(update(User).where(User.id == heavy.id).values(weight=100.0))
        urgent = add_job(session, owner, farm, name="urgent", priority=5)
        of_other = add_job(session, other, farm, name="other")
        of_heavy = add_job(session, heavy, farm, name="heavy")
        # the owner worked an hour just now, `other` two hours two days (half-lives) ago,
        # `heavy` ten hours just now but with a hundredfold weight
        for job, hours, ago in ((of_owner[0], 1, 0), (of_other, 2, 48), (of_heavy, 10, 0)):
            session.execute(
                text(
                    "INSERT INTO tasks (id, job_id, kind, state, payload, attempts, crashes,"
                    " started_at, finished_at) VALUES (gen_random_uuid(), :job, 'chat', 'done',"
                    " '{}', 1, 0, now() - make_interval(hours => :from), now() -"
                    " make_interval(hours => :to))"
                ),
                {"job": job.id, "from": ago + hours, "to": ago},
            )
        line = [job.name for job in (urgent, of_heavy, of_other, *of_owner)]
        assert [queue.position(session, job) for job in (urgent, of_heavy, of_other)] == [0, 1, 2]
        assert [queue.position(session, job) for job in of_owner] == [3, 4]
    taken = []
    while (found := claim(sessions, worker, farm)) is not None:
        taken.append(found.job.name)
    assert taken == line


def test_usage_is_the_decayed_integral(
    sessions: Sessions, owner: User, farm: Settings, worker: Worker
) -> None:
    """The closed form in SQL against a sum over every second of the run."""
    with sessions.begin() as session:
        job = add_job(session, owner, farm)
        session.execute(
            text(
                "UPDATE tasks SET started_at = now() - interval '30 hours',"
                " finished_at = now() - interval '20 hours'"
            )
        )
        found = session.execute(
            text(f"WITH {queue.USAGE} SELECT seconds FROM usage"), {"half": 86_400.0}
        ).scalar_one()
        assert job.owner_id == owner.id
    slow = sum(2.0 ** (-(ago + 0.5) / 86_400.0) for ago in range(20 * 3600, 30 * 3600))
    assert found == pytest.approx(slow, rel=1e-6)


def test_kind_memory_and_device_must_fit(sessions: Sessions, owner: User, farm: Settings) -> None:
    with sessions.begin() as session:
        job = add_job(session, owner, farm, device="cuda")
        session.execute(update(Task).values(payload={"min_bytes": 1000}))
        chats = add_worker(session, accepts=["chat"])
        small = add_worker(session, device={"kind": "cuda", "memory_bytes": 999})
        slow = add_worker(session, device={"kind": "cpu", "memory_bytes": 10**9})
        fits = add_worker(session, device={"kind": "cuda", "memory_bytes": 1000})
    assert claim(sessions, chats, farm) is None
    assert claim(sessions, small, farm) is None
    assert claim(sessions, slow, farm) is None
    found = must_claim(sessions, fits, farm)
    assert found.job.id == job.id and found.job.state == "running"
    assert found.job.started_at is not None and found.expires_in == farm.lease_seconds


def test_paused_and_cancelled_jobs_are_not_claimed(
    sessions: Sessions, owner: User, farm: Settings, worker: Worker
) -> None:
    with sessions.begin() as session:
        paused, cancelled = add_job(session, owner, farm), add_job(session, owner, farm)
        assert control.pause(session, owner, paused).state == "paused"
        assert control.cancel(session, owner, cancelled).state == "cancelled"
        assert queue.claimable(session) == []
    assert claim(sessions, worker, farm) is None
    with sessions.begin() as session:
        control.resume(session, owner, paused)
        assert [kind for _, kind in queue.claimable(session)] == ["search"]
    assert must_claim(sessions, worker, farm).job.id == paused.id


def test_waiting_reasons(sessions: Sessions, owner: User, farm: Settings) -> None:
    with sessions.begin() as session:
        first = add_job(session, owner, farm)
    with sessions.begin() as session:
        second = add_job(session, owner, farm, device="cuda")

        def why(job: Job) -> str | None:
            return queue.waiting_reason(session, job, farm)

        assert why(first) == "no worker is running that accepts search tasks"
        gone = add_worker(session)
        workers.stop(session, gone.id)
        assert why(first) == "no worker is running that accepts search tasks"
        add_worker(session, device={"kind": "cpu", "memory_bytes": 8 * 10**9})
        assert why(first) == "next in the queue: waiting for a free worker"
        assert why(second) == "the job asks for a GPU and no worker with one is running"
        add_worker(session, device={"kind": "cuda", "memory_bytes": 8 * 10**9})
        assert why(second) == "1 job ahead in the queue"
        session.execute(
            update(Task).where(Task.job_id == first.id).values(payload={"min_bytes": 16 * 10**9})
        )
        session.expire_all()
        assert why(first) == ("needs 16.0 GB of memory and the largest running worker has 8.0 GB")
        assert why(control.pause(session, owner, second)) == "paused: resume it to go on"
        assert why(control.cancel(session, owner, first)) is None


def test_single_pass_has_one_slot_and_one_search_task(
    sessions: Sessions, owner: User, farm: Settings
) -> None:
    with sessions.begin() as session:
        job = add_job(session, owner, farm, methods=["deccp"], trials=50, parallelism=4)
        assert job.trials == 1 and len(queue.claimable_of(session, job.id)) == 1
        both = add_job(session, owner, farm, methods=["deccp", "arditi"], trials=50, parallelism=4)
        assert both.trials == 2 and len(queue.claimable_of(session, both.id)) == 1
        assert make_spec().methods == ["mpoa"]
