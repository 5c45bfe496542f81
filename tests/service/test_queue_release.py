"""What a task's end does to its job, and people and workers at once."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import text

from jobs import artifacts, control, progress, queue, trials
from jobs.database import Sessions
from jobs.problems import Invalid, LeaseLost, TooMany
from jobs.settings import Settings
from jobs.tables import User, Worker
from tests.service.builders import add_job, add_worker
from tests.service.claims import claim, fill, must_claim, release, reload


def ends_with(complete: int, sessions: Sessions, worker: Worker, settings: Settings) -> None:
    """The search goes on, fills the budget, and the job completes after one evaluation."""
    held = must_claim(sessions, worker, settings)
    assert held.task.kind == "search"
    fill(sessions, held)
    release(sessions, held, "done")
    evaluation = must_claim(sessions, worker, settings)
    assert evaluation.task.payload["generation"] == complete
    job = release(sessions, evaluation, "done")
    assert job.state == "completed"
    with sessions.begin() as session:
        assert trials.counts(session, job.id)["complete"] == complete


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
    ends_with(7, sessions, worker, farm)


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
    ends_with(5, sessions, worker, farm)


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
