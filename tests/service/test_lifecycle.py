"""A machine that submits, claims, scores, ends leases and changes its mind at random.

After every step the invariants hold, on a real PostgreSQL: a job over stays over unless somebody
revives it, slots never exceed the budget, numbers are unique, lease tokens rise, events have no
gaps, every change of state is a legal move, and nothing that waits is unclaimable.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from jobs import control, events, lifecycle, queue, trials
from jobs.database import Sessions
from jobs.problems import Conflict, Invalid, LeaseLost
from jobs.settings import Settings
from jobs.states import JOB_MOVES, JOB_OVER, TaskState
from jobs.tables import Job, Task, Trial, User, Worker
from tests.service.builders import CANDIDATE, add_job, add_worker, lapse, scored

MEND = {"reason": "disk_full", "message": "No room.", "mend": "Make room"}
DEATH = {"reason": "engine_died", "message": "Killed.", "mend": ""}


class Machine(RuleBasedStateMachine):
    """One job, up to four workers."""

    sessions: ClassVar[Sessions]
    settings: ClassVar[Settings]
    owner: ClassVar[User]

    def __init__(self) -> None:
        super().__init__()
        self.held: list[queue.Claim] = []
        self.stale: list[queue.Claim] = []
        self.last_token = self.claims = 0
        with self.transaction() as session:
            self.job: Job = add_job(session, self.owner, self.settings, trials=4, parallelism=2)
            self.workers: list[Worker] = [add_worker(session) for _ in range(4)]

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        with self.sessions.begin() as session:
            yield session

    @contextmanager
    def attempt(self) -> Iterator[Session]:
        """A change that may be refused; then nothing of it is kept."""
        try:
            with self.sessions.begin() as session:
                yield session
        except (Conflict, Invalid):
            pass

    @rule(worker=st.integers(0, 3))
    def claim(self, worker: int) -> None:
        with self.transaction() as session:
            found = queue.claim(session, self.workers[worker], self.settings)
        if found is None:
            return
        assert found.token > self.last_token
        self.last_token = found.token
        self.claims += 1
        again = [one for one in self.held if one.task.id == found.task.id]
        self.stale += again
        self.held = [one for one in self.held if one not in again] + [found]

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 3), count=st.integers(1, 3), finish=st.booleans())
    def search(self, which: int, count: int, finish: bool) -> None:
        one = self.held[which % len(self.held)]
        if one.task.kind != "search":
            return
        try:
            with self.transaction() as session:
                for slot in trials.reserve(session, one.task, one.token, count):
                    trials.begin(
                        session, one.task, one.token, slot.number, CANDIDATE, {}, "x", None
                    )
                    if finish:
                        trials.complete(session, one.task, one.token, slot.number, scored())
        except LeaseLost:
            self.lost(one)

    @precondition(lambda self: self.held)
    @rule(
        which=st.integers(0, 3),
        state=st.sampled_from(["done", "done", "done", "ready", "paused", "cancelled"]),
        error=st.sampled_from([None, None, None, MEND, DEATH]),
    )
    def release(self, which: int, state: TaskState, error: dict[str, str] | None) -> None:
        one = self.held[which % len(self.held)]
        if error is not None:
            state = "failed"
        try:
            with self.transaction() as session:
                # workers obey: they pause and cancel only what was asked for
                wanted = queue.renew(session, one.task.id, one.token, self.settings)
                if (state, wanted) in {("paused", "run"), ("paused", "cancel")}:
                    state = "ready"
                if state == "cancelled" and wanted != "cancel":
                    state = "ready"
                queue.release(session, one.task.id, one.token, state=state, error=error)
            self.held.remove(one)
            self.stale.append(one)
        except LeaseLost:
            self.lost(one)

    def lost(self, one: queue.Claim) -> None:
        self.held.remove(one)
        self.stale.append(one)

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 3))
    def expire(self, which: int) -> None:
        with self.transaction() as session:
            lapse(session, self.held[which % len(self.held)].task.id)

    @rule()
    def reap(self) -> None:
        with self.transaction() as session:
            queue.reap(session)

    @rule()
    def pause(self) -> None:
        with self.attempt() as session:
            control.pause(session, self.owner, self.job)

    @rule()
    def resume(self) -> None:
        with self.attempt() as session:
            control.resume(session, self.owner, self.job)

    @precondition(lambda self: self.claims > 3)  # not a token: those of earlier runs count in it
    @rule()
    def cancel(self) -> None:
        with self.attempt() as session:
            control.cancel(session, self.owner, self.job)

    @rule(budget=st.integers(1, 8), parallelism=st.integers(1, 3))
    def amend(self, budget: int, parallelism: int) -> None:
        with self.attempt() as session:
            control.amend(session, self.owner, self.job, trials=budget, parallelism=parallelism)

    @invariant()
    def stale_leases_are_dead(self) -> None:
        for one in self.stale[-2:]:
            with self.transaction() as session, pytest.raises(LeaseLost):
                queue.fence(session, one.task.id, one.token)

    @invariant()
    def everything_adds_up(self) -> None:
        with self.transaction() as session:
            job = session.get_one(Job, self.job.id)
            tasks = list(session.scalars(select(Task).where(Task.job_id == job.id)))
            numbers = list(session.scalars(select(Trial.number).where(Trial.job_id == job.id)))
            assert len(set(numbers)) == len(numbers) <= job.trials
            assert not numbers or max(numbers) < job.trials
            assert job.state == "cancelled" or job.state == lifecycle.derive(job, tasks)
            assert (job.finished_at is not None) == (job.state in JOB_OVER)
            running = [task for task in tasks if task.state == "running"]
            assert all(task.lease_token is not None for task in running)
            assert all(t.lease_token is None for t in tasks if t.state != "running")
            if job.state == "queued":
                assert queue.claimable(session), "a queued job that nobody can claim"
            if job.state == "completed":
                assert lifecycle.completed(session, job.id) == job.trials
            if job.state in JOB_OVER | {"paused"}:
                assert running == [] and queue.claimable_of(session, job.id) == []
            told = events.since(session, job.id, 0, limit=10_000)
            assert [event.seq for event in told] == list(range(1, job.event_seq + 1))
            states = [event.payload["state"] for event in told if event.kind == "job"]
            moves = [(a, b) for a, b in pairwise(states) if a != b]
            assert all(b in JOB_MOVES[a] for a, b in moves), moves
            assert states[-1] == job.state
            complete = select(func.count()).where(Trial.job_id == job.id, Trial.state == "complete")
            scores = [
                event.payload["number"]
                for event in told
                if event.kind == "trial" and event.payload["state"] == "complete"
            ]
            assert len(set(scores)) == len(scores) == session.execute(complete).scalar_one()

    def teardown(self) -> None:
        with self.attempt() as session:
            control.cancel(session, self.owner, self.job)
        with self.transaction() as session:
            for task in session.scalars(select(Task).where(Task.state == "running")):
                lapse(session, task.id)
            session.flush()
            session.expire_all()
        with self.transaction() as session:
            queue.reap(session)
        with self.transaction() as session:
            assert session.get_one(Job, self.job.id).state in JOB_OVER


def test_random_lives_of_a_job(
    sessions: Sessions, crowd: Sessions, owner: User, farm: Settings
) -> None:
    class Bound(Machine):
        pass

    Bound.sessions, Bound.settings, Bound.owner = sessions, farm, owner
    case = Bound.TestCase
    case.settings = settings(
        max_examples=25,
        stateful_step_count=30,
        deadline=None,
        # a trace of 30 steps can be read; shrinking it on a real server takes minutes
        phases=(Phase.explicit, Phase.reuse, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )
    case().runTest()
