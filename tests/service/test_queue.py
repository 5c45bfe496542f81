"""Leases and the policy of the claim, on a real PostgreSQL."""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import select, text, update

from jobs import (
    artifacts,
    benchmarks,
    control,
    lifecycle,
    progress,
    queue,
    results,
    trials,
    workers,
)
from jobs.database import Sessions
from jobs.problems import Invalid, LeaseLost, TooMany
from jobs.settings import Settings
from jobs.spec.protocol import AnatomyReport, Exported, Prepared
from jobs.spec.scores import Value
from jobs.tables import Job, Task, User, Worker
from tests.service.builders import (
    CANDIDATE,
    add_job,
    add_worker,
    lapse,
    make_spec,
    scored,
)


def claim(sessions: Sessions, worker: Worker, settings: Settings) -> queue.Claim | None:
    with sessions.begin() as session:
        return queue.claim(session, worker, settings)


def must_claim(sessions: Sessions, worker: Worker, settings: Settings) -> queue.Claim:
    found = claim(sessions, worker, settings)
    assert found is not None
    return found


def release(sessions: Sessions, claim: queue.Claim, state: str, error: Any = None) -> Job:
    with sessions.begin() as session:
        queue.release(session, claim.task.id, claim.token, state=state, error=error)  # type: ignore[arg-type]
    return reload(sessions, claim.job)


def reload(sessions: Sessions, job: Job) -> Job:
    with sessions.begin() as session:
        return session.get_one(Job, job.id)


def fill(sessions: Sessions, claim: queue.Claim, count: int = 100) -> None:
    """Score every slot that is free, at most `count`."""
    with sessions.begin() as session:
        while count and (slots := trials.reserve(session, claim.task, claim.token, count)):
            for slot in slots:
                trials.begin(
                    session, claim.task, claim.token, slot.number, CANDIDATE, {}, "sampler", None
                )
                trials.complete(session, claim.task, claim.token, slot.number, scored())
            count -= len(slots)


@pytest.fixture
def worker(sessions: Sessions) -> Worker:
    with sessions.begin() as session:
        return add_worker(session)


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


def test_renew_lengthens_and_tells_what_is_wanted(
    sessions: Sessions, owner: User, farm: Settings, worker: Worker
) -> None:
    with sessions.begin() as session:
        job = add_job(session, owner, farm)
    held = must_claim(sessions, worker, farm)
    with sessions.begin() as session:
        before = session.execute(select(Task.lease_expires_at)).scalar_one()
    with sessions.begin() as session:
        assert queue.renew(session, held.task.id, held.token, farm) == "run"
    with sessions.begin() as session:
        after = session.execute(select(Task.lease_expires_at)).scalar_one()
        assert before is not None and after is not None and after > before
        job = control.pause(session, owner, job)
        assert job.state == "running"  # its worker carries the pause out
    with sessions.begin() as session:
        assert queue.renew(session, held.task.id, held.token, farm) == "pause"
    assert release(sessions, held, "paused").state == "paused"
    with sessions.begin() as session, pytest.raises(LeaseLost):
        queue.renew(session, held.task.id, held.token, farm)


def prepared() -> Prepared:
    report = AnatomyReport(architecture="x", layers=1, hidden=1, writers=[], coverage=1.0)
    return Prepared(
        anatomy=report,
        device="cpu",
        device_name="cpu",
        dtype="float32",
        quantization="none",
        weight_bytes=1,
        source_bytes=1,
        batch_size=1,
        baseline={"search": scored(4).scores},
        baseline_outcomes={"search": scored(4).outcomes},
    )


VALUES = {"judge": Value(value=0.5)}
Write = Callable[[Any, Task, int], object]
FENCED: dict[str, Write] = {
    "fence": lambda s, t, k: queue.fence(s, t.id, k),
    "release done": lambda s, t, k: queue.release(s, t.id, k, state="done"),
    "release ready": lambda s, t, k: queue.release(s, t.id, k, state="ready"),
    "release failed": lambda s, t, k: queue.release(
        s, t.id, k, state="failed", error={"reason": "engine_died", "message": "x"}
    ),
    "reserve": lambda s, t, k: trials.reserve(s, t, k, 1),
    "begin": lambda s, t, k: trials.begin(s, t, k, 0, CANDIDATE, {}, "sampler", 7),
    "complete": lambda s, t, k: trials.complete(s, t, k, 0, scored()),
    "fail": lambda s, t, k: trials.fail(s, t, k, 0, "x"),
    "store_baseline": lambda s, t, k: trials.store_baseline(s, t, k, prepared()),
    "store_rescored": lambda s, t, k: trials.store_rescored(s, t, k, 1, "heldout", scored()),
    "store_values": lambda s, t, k: trials.store_values(s, t, k, -1, "search", VALUES),
    "store_results": lambda s, t, k: results.store(s, t, k, {"model": {"search": scored()}}),
    "store_figures": lambda s, t, k: results.store_figures(s, t, k, -1, VALUES),
    "store_benchmark": lambda s, t, k: benchmarks.store(s, t, k, (-1, "x", None), VALUES),
    "report": lambda s, t, k: progress.report(s, t, k, "search", 1, 2, "x"),
    "mark_running": lambda s, t, k: artifacts.mark_running(s, t, k, uuid.uuid4()),
    "mark_ready": lambda s, t, k: artifacts.mark_ready(s, t, k, uuid.uuid4(), Exported(files=[])),
    "mark_failed": lambda s, t, k: artifacts.mark_failed(s, t, k, uuid.uuid4(), {}),
}
DUMP = text(
    """SELECT json_build_array(
    (SELECT json_agg(t ORDER BY t.id) FROM tasks t),
    (SELECT json_agg(j ORDER BY j.id) FROM jobs j),
    (SELECT json_agg(r ORDER BY r.number) FROM trials r),
    (SELECT json_agg(p ORDER BY p.number) FROM trial_responses p),
    (SELECT json_agg(e ORDER BY e.seq) FROM events e),
    (SELECT count(*) FROM artifacts))::text"""
)


@pytest.mark.parametrize("how", ["lapsed", "claimed by another", "wrong token", "released"])
def test_a_stale_token_changes_nothing(
    sessions: Sessions, owner: User, farm: Settings, worker: Worker, how: str
) -> None:
    with sessions.begin() as session:
        add_job(session, owner, farm)
    held = must_claim(sessions, worker, farm)
    token = held.token
    with sessions.begin() as session:
        for slot in trials.reserve(session, held.task, token, 2):
            trials.begin(session, held.task, token, slot.number, CANDIDATE, {}, "sampler", None)
        trials.complete(session, held.task, token, 1, scored())
    with sessions.begin() as session:
        if how in ("lapsed", "claimed by another"):
            lapse(session, held.task.id)
        elif how == "wrong token":
            token += 1000
        else:
            queue.release(session, held.task.id, token, state="ready")
    if how == "claimed by another":
        assert must_claim(sessions, worker, farm).token > token
    with sessions.begin() as session:
        before = session.execute(DUMP).scalar_one()
    for name, write in FENCED.items():
        with pytest.raises(LeaseLost), sessions.begin() as session:
            write(session, held.task, token)
            pytest.fail(name)
        # and when the caller swallows the error and commits all the same
        with sessions.begin() as session, pytest.raises(LeaseLost):
            write(session, held.task, token)
    with sessions.begin() as session, pytest.raises(LeaseLost):
        queue.renew(session, held.task.id, token, farm)
    with sessions.begin() as session:
        assert session.execute(DUMP).scalar_one() == before


def test_a_slow_worker_does_not_wipe_out_what_is_known_of_the_original(
    sessions: Sessions, owner: User, farm: Settings, worker: Worker
) -> None:
    """It claimed beside another and is ready when the other has the original's figures."""
    with sessions.begin() as session:
        job = add_job(session, owner, farm, parallelism=2)
    fast, slow = must_claim(sessions, worker, farm), must_claim(sessions, worker, farm)
    with sessions.begin() as session:
        trials.store_baseline(session, fast.task, fast.token, prepared())
        trials.store_values(session, fast.task, fast.token, trials.ORIGINAL, "search", VALUES)
    other = prepared().model_copy(update={"baseline_outcomes": {"search": []}})
    with sessions.begin() as session:
        trials.store_baseline(session, slow.task, slow.token, other)
    with sessions.begin() as session:
        kept = session.get_one(Job, job.id)
        assert trials.values(session, kept, trials.ORIGINAL, "search")["judge"]["value"] == 0.5
        assert trials.responses(session, job.id, trials.ORIGINAL)["search"] == scored(4).outcomes


def test_lease_of_a_dead_worker_is_claimed_again(
    sessions: Sessions, owner: User, farm: Settings, worker: Worker
) -> None:
    with sessions.begin() as session:
        add_job(session, owner, farm)
    first = must_claim(sessions, worker, farm)
    assert claim(sessions, worker, farm) is None
    with sessions.begin() as session:
        lapse(session, first.task.id)
        assert queue.claimable(session) == [(first.task.id, "search")]
    second = must_claim(sessions, worker, farm)
    assert second.task.id == first.task.id and second.token > first.token
    assert second.task.attempts == 2


def test_reap_carries_out_what_was_wanted(
    sessions: Sessions, owner: User, farm: Settings, worker: Worker
) -> None:
    """Three jobs lose their workers: one goes on, one was to pause, one was to be cancelled."""
    with sessions.begin() as session:
        jobs = [add_job(session, owner, farm) for _ in range(3)]
    held = [must_claim(sessions, worker, farm) for _ in range(3)]
    with sessions.begin() as session:
        assert queue.reap(session) == []
        control.pause(session, owner, jobs[1])
        control.cancel(session, owner, jobs[2])
        for one in held:
            lapse(session, one.task.id)
    with sessions.begin() as session:
        assert sorted(queue.reap(session)) == sorted(one.task.id for one in held)
        assert queue.reap(session) == []
    assert [reload(sessions, job).state for job in jobs] == ["queued", "paused", "cancelled"]
    with sessions.begin() as session:
        states = {task.job_id: task.state for task in session.scalars(select(Task))}
    assert [states[job.id] for job in jobs] == ["ready", "paused", "cancelled"]


def test_a_search_ends_in_one_evaluation_and_then_completes(
    sessions: Sessions, owner: User, farm: Settings, worker: Worker
) -> None:
    with sessions.begin() as session:
        job = add_job(session, owner, farm, trials=5, parallelism=2)
    first, second = must_claim(sessions, worker, farm), must_claim(sessions, worker, farm)
    fill(sessions, first)
    assert release(sessions, first, "done").state == "running"
    assert release(sessions, second, "done").state == "queued"
    evaluation = must_claim(sessions, worker, farm)
    assert evaluation.task.kind == "evaluate" and evaluation.task.payload["generation"] == 5
    assert claim(sessions, worker, farm) is None
    job = release(sessions, evaluation, "done")
    assert job.state == "completed" and job.finished_at is not None
    tight = farm.model_copy(update={"max_running": 1, "max_trials": 8})
    with sessions.begin() as session:
        with pytest.raises(Invalid, match="At most 8"):
            control.amend(session, owner, job, trials=9, settings=tight)
        other = add_job(session, owner, farm)
        with pytest.raises(TooMany):
            control.amend(session, owner, job, trials=7, settings=tight)
        control.cancel(session, owner, other)
        job = control.amend(session, owner, job, trials=7, settings=tight)
        assert job.state == "queued" and job.finished_at is None
    again = must_claim(sessions, worker, farm)
    assert again.task.kind == "search"
    fill(sessions, again)
    release(sessions, again, "done")
    evaluation = must_claim(sessions, worker, farm)
    assert evaluation.task.payload["generation"] == 7
    assert release(sessions, evaluation, "done").state == "completed"
    with sessions.begin() as session:
        assert trials.counts(session, job.id)["complete"] == 7


def test_done_with_slots_left_goes_on(
    sessions: Sessions, owner: User, farm: Settings, worker: Worker
) -> None:
    with sessions.begin() as session:
        add_job(session, owner, farm, trials=3)
    held = must_claim(sessions, worker, farm)
    fill(sessions, held, count=2)
    assert release(sessions, held, "done").state == "queued"
    held = must_claim(sessions, worker, farm)
    fill(sessions, held)
    release(sessions, held, "done")
    assert must_claim(sessions, worker, farm).task.kind == "evaluate"


@pytest.mark.parametrize("reason", sorted(queue.MENDABLE))
def test_what_a_person_can_mend_pauses_the_job(
    sessions: Sessions, owner: User, farm: Settings, worker: Worker, reason: str
) -> None:
    with sessions.begin() as session:
        add_job(session, owner, farm, parallelism=2)
    held = must_claim(sessions, worker, farm)
    error = {"reason": reason, "message": "There is no room.", "mend": "Make room"}
    job = release(sessions, held, "failed", error)
    assert job.state == "paused" and job.error == error
    with sessions.begin() as session:
        told = queue.waiting_reason(session, job, farm)
        assert told == "paused: There is no room. (Make room)"
        assert control.resume(session, owner, job).error is None
    assert must_claim(sessions, worker, farm).task.error is None


def test_other_failures_fail_the_job_and_resume_revives_it(
    sessions: Sessions, owner: User, farm: Settings, worker: Worker
) -> None:
    """Two searchers: the failure of one stops the other before the job is failed."""
    with sessions.begin() as session:
        job = add_job(session, owner, farm, parallelism=2)
    first, second = must_claim(sessions, worker, farm), must_claim(sessions, worker, farm)
    error = {"reason": "engine_died", "message": "Killed by signal 9.", "mend": ""}
    assert release(sessions, first, "failed", error).state == "running"
    with sessions.begin() as session:
        assert queue.renew(session, second.task.id, second.token, farm) == "pause"
    job = release(sessions, second, "paused")
    assert (job.state, job.error) == ("failed", error) and job.finished_at is not None
    assert claim(sessions, worker, farm) is None
    with sessions.begin() as session:
        job = control.resume(session, owner, job)
        assert (job.state, job.error, job.finished_at) == ("queued", None, None)
        assert len(queue.claimable_of(session, job.id)) == 2
    third = must_claim(sessions, worker, farm)
    assert third.task.crashes == 0


def test_trials_added_to_a_failed_job_are_searched_after_its_resume(
    sessions: Sessions, owner: User, farm: Settings, worker: Worker
) -> None:
    """The evaluation failed, so no search task is open: without one the budget is not met."""
    with sessions.begin() as session:
        job = add_job(session, owner, farm, trials=3)
    held = must_claim(sessions, worker, farm)
    fill(sessions, held)
    release(sessions, held, "done")
    error = {"reason": "engine_died", "message": "Killed by signal 9.", "mend": ""}
    assert release(sessions, must_claim(sessions, worker, farm), "failed", error).state == "failed"
    with sessions.begin() as session:
        control.amend(session, owner, job, trials=5)
        assert control.resume(session, owner, job).state == "queued"
    held = must_claim(sessions, worker, farm)
    assert held.task.kind == "search"
    fill(sessions, held)
    release(sessions, held, "done")
    evaluation = must_claim(sessions, worker, farm)
    assert evaluation.task.payload["generation"] == 5
    assert release(sessions, evaluation, "done").state == "completed"
    with sessions.begin() as session:
        assert trials.counts(session, job.id)["complete"] == 5


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


def test_export_and_chat_run_whatever_the_job_does(
    sessions: Sessions, owner: User, farm: Settings, worker: Worker
) -> None:
    with sessions.begin() as session:
        job = add_job(session, owner, farm, trials=1)
    held = must_claim(sessions, worker, farm)
    fill(sessions, held)
    with sessions.begin() as session:
        job = control.pause(session, owner, job)
    assert release(sessions, held, "done").state == "paused"
    with sessions.begin() as session:
        artifact = artifacts.request(session, owner, job, 0, "merged")
        assert [kind for _, kind in queue.claimable(session)] == ["export"]
    export = must_claim(sessions, worker, farm)
    assert export.task.kind == "export" and export.task.id == artifact.task_id
    assert reload(sessions, job).state == "paused"
    with sessions.begin() as session:
        assert queue.renew(session, export.task.id, export.token, farm) == "run"
        control.cancel(session, owner, job)
    with sessions.begin() as session:
        assert queue.renew(session, export.task.id, export.token, farm) == "cancel"
    assert release(sessions, export, "cancelled").state == "cancelled"
    with sessions.begin() as session:
        assert artifacts.get(session, owner, artifact.id).state == "cancelled"


def test_no_deadlock_between_people_workers_and_the_reconciler(
    sessions: Sessions, crowd: Sessions, owner: User, farm: Settings
) -> None:
    """Eight threads do random things to two jobs; PostgreSQL reports no deadlock."""
    with sessions.begin() as session:
        jobs = [add_job(session, owner, farm, trials=500, parallelism=4) for _ in range(2)]
        accepting = [add_worker(session) for _ in range(8)]

    def play(seed: int) -> None:
        dice, held = random.Random(seed), list[queue.Claim]()
        for _ in range(25):
            job = dice.choice(jobs)
            with crowd() as session:
                try:
                    match dice.randrange(6):
                        case 0 | 1:
                            found = queue.claim(session, accepting[seed], farm)
                            if found is not None:
                                held.append(found)
                        case 2 if held:
                            one = held[-1]
                            trials.reserve(session, one.task, one.token, 1)
                            progress.report(session, one.task, one.token, "search", 1, 2)
                        case 3 if held:
                            one = held.pop()
                            queue.release(session, one.task.id, one.token, state="ready")
                        case 4:
                            control.pause(session, owner, job)
                            control.resume(session, owner, job)
                        case _:
                            queue.reap(session)
                    session.commit()
                except LeaseLost:
                    session.rollback()

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(play, seed) for seed in range(8)]:
            done.result(60)
    with sessions.begin() as session:
        found = session.execute(
            text("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
        ).scalar_one()
    assert found == 0


def test_single_pass_has_one_slot_and_one_search_task(
    sessions: Sessions, owner: User, farm: Settings
) -> None:
    with sessions.begin() as session:
        job = add_job(session, owner, farm, methods=["deccp"], trials=50, parallelism=4)
        assert job.trials == 1 and len(queue.claimable_of(session, job.id)) == 1
        both = add_job(session, owner, farm, methods=["deccp", "arditi"], trials=50, parallelism=4)
        assert both.trials == 2 and len(queue.claimable_of(session, both.id)) == 1
        assert make_spec().methods == ["mpoa"]
