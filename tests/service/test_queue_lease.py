"""Leases: what a token is good for, and what becomes of those whose worker is gone."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import select, text

from jobs import artifacts, benchmarks, control, progress, queue, results, trials
from jobs.database import Sessions
from jobs.problems import LeaseLost
from jobs.settings import Settings
from jobs.spec.protocol import AnatomyReport, Exported, Prepared
from jobs.spec.scores import Value
from jobs.tables import Job, Task, User, Worker
from tests.service.builders import CANDIDATE, add_job, lapse, scored
from tests.service.claims import claim, must_claim, release, reload


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
