"""Slots, scores and the front."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select

from jobs import control, events, fronts, queue, trials
from jobs.database import Sessions
from jobs.problems import Conflict, LeaseLost, NotFound
from jobs.settings import Settings
from jobs.tables import Job, Task, Trial, User
from tests.service.builders import CANDIDATE, add_job, add_worker, lapse, scored


def leases(
    sessions: Sessions, owner: User, settings: Settings, count: int = 1, **changes: object
) -> list[queue.Claim]:
    """A job whose search tasks are in the hands of `count` workers."""
    with sessions.begin() as session:
        add_job(session, owner, settings, parallelism=count, **changes)
    found = []
    for _ in range(count):
        with sessions.begin() as session:
            claim = queue.claim(session, add_worker(session), settings)
            assert claim is not None
            found.append(claim)
    return found


def again(sessions: Sessions, settings: Settings) -> queue.Claim:
    with sessions.begin() as session:
        claim = queue.claim(session, add_worker(session), settings)
        assert claim is not None
        return claim


def test_workers_at_once_never_overshoot(
    sessions: Sessions, crowd: Sessions, owner: User, farm: Settings
) -> None:
    """Six workers grab batches of seven until nothing is left: 0..49, each once."""
    held = leases(sessions, owner, farm, 6, trials=50)

    def work(claim: queue.Claim) -> list[int]:
        numbers: list[int] = []
        while True:
            with crowd.begin() as session:
                slots = trials.reserve(session, claim.task, claim.token, 7)
            if not slots:
                return numbers
            numbers += [slot.number for slot in slots]
            for slot in slots:
                with crowd.begin() as session:
                    trials.begin(
                        session, claim.task, claim.token, slot.number, CANDIDATE, {}, "sampler", 1
                    )
                    assert trials.complete(session, claim.task, claim.token, slot.number, scored())

    with ThreadPoolExecutor(6) as pool:
        numbers = sorted(number for part in pool.map(work, held) for number in part)
    assert numbers == list(range(50))
    with sessions.begin() as session:
        assert trials.counts(session, held[0].job.id) == {
            "complete": 50,
            "running": 0,
            "failed": 0,
        }


def test_the_last_slots_are_shared_among_those_who_search(
    sessions: Sessions, owner: User, farm: Settings
) -> None:
    """So that they end together; who is gone gets none."""
    first, second, third = leases(sessions, owner, farm, 3, trials=20)
    with sessions.begin() as session:
        lapse(session, third.task.id)

    def numbers(claim: queue.Claim) -> list[int]:
        with sessions.begin() as session:
            slots = trials.reserve(session, claim.task, claim.token, 8)
            return [slot.number for slot in slots]

    assert [len(numbers(claim)) for claim in (first, second)] == [8, 6]
    assert [len(numbers(claim)) for claim in (first, second)] == [3, 2]
    assert [numbers(claim) for claim in (first, second)] == [[19], []]


def test_orphans_come_first_with_their_candidate(
    sessions: Sessions, owner: User, farm: Settings
) -> None:
    first, second = leases(sessions, owner, farm, 2, trials=6)
    with sessions.begin() as session:
        slots = trials.reserve(session, first.task, first.token, 3)
        assert [slot.number for slot in slots] == [0, 1, 2]
        assert all(slot.candidate is None for slot in slots)
        trials.begin(session, first.task, first.token, 1, CANDIDATE, {"x": 1}, "sampler", 9)
        trials.begin(session, first.task, first.token, 2, CANDIDATE, {}, "sampler", 10)
        trials.complete(session, first.task, first.token, 2, scored())
        # while the first lives, its slots are its own
        assert [s.number for s in trials.reserve(session, second.task, second.token, 1)] == [3]
        lapse(session, first.task.id)
    with sessions.begin() as session:
        slots = trials.reserve(session, second.task, second.token, 10)
    assert [(slot.number, slot.candidate, slot.params) for slot in slots] == [
        (0, None, None),
        (1, CANDIDATE, {"x": 1}),
        (4, None, None),
        (5, None, None),
    ]
    third = again(sessions, farm)
    with sessions.begin() as session:
        assert trials.reserve(session, third.task, third.token, 10) == []


def test_a_slot_belongs_to_its_lease(sessions: Sessions, owner: User, farm: Settings) -> None:
    first, second = leases(sessions, owner, farm, 2, trials=6)
    with sessions.begin() as session:
        trials.reserve(session, first.task, first.token, 1)
        for write in (trials.begin, trials.complete, trials.fail):
            with pytest.raises(LeaseLost):
                if write is trials.begin:
                    trials.begin(session, second.task, second.token, 0, CANDIDATE, {}, "x", None)
                elif write is trials.complete:
                    trials.complete(session, second.task, second.token, 0, scored())
                else:
                    trials.fail(session, second.task, second.token, 0, "x")
        with pytest.raises(LeaseLost):
            trials.complete(session, first.task, first.token, 5, scored())


def test_a_slot_is_complete_once(sessions: Sessions, owner: User, farm: Settings) -> None:
    (held,) = leases(sessions, owner, farm)
    with sessions.begin() as session:
        trials.reserve(session, held.task, held.token, 1)
        trials.begin(session, held.task, held.token, 0, CANDIDATE, {"a": 1}, "plain", 3)
        assert trials.complete(session, held.task, held.token, 0, scored(2, 0.25))
        assert not trials.complete(session, held.task, held.token, 0, scored(0, 0.0))
    with sessions.begin() as session:
        row = trials.get(session, held.job.id, 0)
        assert (row.refusals, row.kl_first, row.kl_multi, row.total) == (2, 0.25, 0.125, 4)
        assert (row.origin, row.optuna_number, row.params) == ("plain", 3, {"a": 1})
        assert row.finished_at is not None
        said = trials.responses(session, held.job.id, 0)
        assert said == {"search": scored(2).outcomes}
        told = [e for e in events.since(session, held.job.id, 0) if e.kind == "trial"]
        assert len(told) == 1 and told[0].payload["refusals"] == 2
        with pytest.raises(NotFound):
            trials.get(session, held.job.id, 1)


def test_a_failed_slot_is_given_out_again(sessions: Sessions, owner: User, farm: Settings) -> None:
    (held,) = leases(sessions, owner, farm, trials=1)
    for deaths in (1, 2):
        with sessions.begin() as session:
            (slot,) = trials.reserve(session, held.task, held.token, 5)
            assert slot.number == 0
            trials.begin(session, held.task, held.token, 0, CANDIDATE, {}, "sampler", None)
            trials.fail(session, held.task, held.token, 0, "engine_died")
        with sessions.begin() as session:
            assert session.get_one(Task, held.task.id).crashes == deaths
            assert trials.counts(session, held.job.id)["failed"] == 1
    with sessions.begin() as session:
        (slot,) = trials.reserve(session, held.task, held.token, 5)
        assert slot.candidate == CANDIDATE
        trials.complete(session, held.task, held.token, 0, scored())
        assert session.get_one(Task, held.task.id).crashes == 0


def test_rescoring_needs_a_complete_trial(sessions: Sessions, owner: User, farm: Settings) -> None:
    (held,) = leases(sessions, owner, farm)
    heldout = scored(1, 0.1, role="heldout")
    with sessions.begin() as session:
        trials.reserve(session, held.task, held.token, 1)
        with pytest.raises(NotFound):
            trials.store_rescored(session, held.task, held.token, 0, "heldout", heldout)
        with pytest.raises(Conflict):
            control.pick(session, owner, held.job, 0)
        trials.begin(session, held.task, held.token, 0, CANDIDATE, {}, "sampler", None)
        trials.complete(session, held.task, held.token, 0, scored())
        trials.store_rescored(session, held.task, held.token, 0, "heldout", heldout)
        trials.store_rescored(session, held.task, held.token, 0, "heldout", heldout)
        assert control.pick(session, owner, held.job, 0).picked
        row = trials.get(session, held.job.id, 0)
        assert row.heldout is not None and row.heldout["refusals"] == 1
        assert set(trials.responses(session, held.job.id, 0)) == {"search", "heldout"}


def test_front_of_a_job(sessions: Sessions, owner: User, farm: Settings) -> None:
    (held,) = leases(sessions, owner, farm, trials=5)
    points = [(3, 0.1), (1, 0.5), (2, 0.5), (0, 0.9), (1, 0.4)]
    with sessions.begin() as session:
        for slot in trials.reserve(session, held.task, held.token, 5):
            trials.begin(session, held.task, held.token, slot.number, CANDIDATE, {}, "x", None)
            trials.complete(
                session, held.task, held.token, slot.number, scored(*points[slot.number])
            )
        assert [row.number for row in trials.front(session, held.job.id)] == [3, 4, 0]
        assert [t.number for t in trials.list_trials(session, held.job.id, limit=2, after=1)] == [
            2,
            3,
        ]
        assert session.scalars(select(Job.state)).one() == "running"
        assert session.scalars(select(Trial.picked).distinct()).one() is False


numbers = st.one_of(st.integers(0, 4).map(float), st.floats(allow_infinity=False))


@given(st.lists(st.tuples(numbers, numbers), max_size=25))
def test_pareto_is_the_definition(points: list[tuple[float, float]]) -> None:
    """Against the quadratic definition: not dominated by any other point."""
    clean = [i for i, (a, b) in enumerate(points) if a == a and b == b]

    def dominates(p: tuple[float, float], q: tuple[float, float]) -> bool:
        return p[0] <= q[0] and p[1] <= q[1] and p != q

    slow = [i for i in clean if not any(dominates(points[j], points[i]) for j in clean)]
    assert fronts.pareto(points) == slow
