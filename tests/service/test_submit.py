"""Submitting, listing and changing jobs; and a machine that plays with one at random."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import func, select

from jobs import control, listing, queue, submit, trials
from jobs.database import Sessions
from jobs.problems import Conflict, Forbidden, Invalid, NoSpace, NotFound, TooMany
from jobs.settings import Settings
from jobs.tables import Audit, Job, Task, User, Webhook, WebhookDelivery
from tests.service.builders import CANDIDATE, add_job, add_worker, make_spec, scored


def test_a_job_is_whole_from_the_start(sessions: Sessions, owner: User, farm: Settings) -> None:
    with sessions.begin() as session:
        job = add_job(session, owner, farm, trials=5, parallelism=3, private=True, name="Mine")
    with sessions.begin() as session:
        kept = session.get_one(Job, job.id)
        assert (kept.state, kept.trials, kept.name, kept.private) == ("queued", 5, "Mine", True)
        assert set(kept.prompts) >= {"search_harmful", "direction_harmless"}
        assert len(queue.claimable_of(session, job.id)) == 3
        assert "job.submit" in session.scalars(select(Audit.action)).all()
        few = add_job(session, owner, farm, trials=2, parallelism=3)
        assert len(queue.claimable_of(session, few.id)) == 2  # never more than there are slots


def test_fifty_submits_at_once_stay_within_the_quota(
    crowd: Sessions, owner: User, farm: Settings
) -> None:
    tight = farm.model_copy(update={"max_running": 4})
    start = threading.Barrier(25)

    def one(number: int) -> bool:
        if number < 25:
            start.wait(60)
        try:
            with crowd.begin() as session:
                submit.submit(session, session.get_one(User, owner.id), make_spec(), tight)
        except TooMany:
            return False
        return True

    with ThreadPoolExecutor(25) as pool:
        accepted = sum(pool.map(one, range(50)))
    assert accepted == 4
    with crowd.begin() as session:
        assert session.execute(select(func.count()).select_from(Job)).scalar_one() == 4
        job = session.scalars(select(Job)).first()
        assert job is not None
        control.pause(session, owner, job)
        add_job(session, owner, tight)
        with pytest.raises(TooMany):
            control.resume(session, owner, job, tight)


def test_one_key_one_job_even_at_once(crowd: Sessions, owner: User, farm: Settings) -> None:
    start = threading.Barrier(8)

    def one(_: int) -> tuple[uuid.UUID, bool]:
        start.wait(30)
        with crowd.begin() as session:
            user = session.get_one(User, owner.id)
            job, created = submit.submit(session, user, make_spec(), farm, idempotency_key="k")
            return job.id, created

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(one, range(8)))
    assert len({job for job, _ in found}) == 1 and sum(created for _, created in found) == 1


def test_refused_submits_name_the_field(
    sessions: Sessions, owner: User, make_user: Callable[..., User], farm: Settings
) -> None:
    with sessions.begin() as session:
        for changes, field in (
            ({"model": "missing"}, "model"),
            ({"trials": 10_000}, "trials"),
            ({"prompts": {"harmful": "nothere", "harmless": "plain"}}, "prompts.harmful"),
        ):
            with pytest.raises(Invalid) as caught:
                limited = farm.model_copy(update={"max_trials": 500})
                submit.submit(session, owner, make_spec(**changes), limited)
            assert caught.value.field == field
        for key in ("", "x" * 201, "a\x00"):
            with pytest.raises(Invalid):
                submit.submit(session, owner, make_spec(), farm, idempotency_key=key)
        with pytest.raises(Forbidden):
            submit.submit(session, make_user(role="viewer"), make_spec(), farm)
        full = farm.model_copy(update={"disk_reserve_bytes": 10**18})
        with pytest.raises(NoSpace, match="reserve"):
            submit.submit(session, owner, make_spec(), full)
        assert session.execute(select(func.count()).select_from(Job)).scalar_one() == 0


def test_who_sees_and_who_changes(
    sessions: Sessions, owner: User, admin: User, make_user: Callable[..., User], farm: Settings
) -> None:
    other = make_user()
    with sessions.begin() as session:
        hidden, shared = add_job(session, owner, farm, private=True), add_job(session, owner, farm)
        assert control.visible(session, other, shared.id) is shared
        with pytest.raises(Forbidden):
            control.editable(session, other, shared.id)
        for act in (control.visible, control.editable):
            with pytest.raises(NotFound):
                act(session, other, hidden.id)
            with pytest.raises(NotFound):
                act(session, other, uuid.uuid4())
        for change in (control.pause, control.resume, control.cancel):
            with pytest.raises(Forbidden):
                change(session, other, shared)
            with pytest.raises(NotFound):
                change(session, other, hidden)
        assert control.editable(session, admin, hidden.id) is hidden
        assert [job.id for job in listing.list_jobs(session, other)[0]] == [shared.id]
        assert len(listing.list_jobs(session, admin)[0]) == 2
        assert listing.list_jobs(session, admin, mine=True)[0] == []


def test_pages_of_jobs(sessions: Sessions, owner: User, farm: Settings) -> None:
    made = []
    for number in range(5):
        with sessions.begin() as session:
            made.append(add_job(session, owner, farm, name=f"50%_{number}").id)
    with sessions.begin() as session:
        seen, cursor = [], None
        while True:
            found, cursor = listing.list_jobs(session, owner, limit=2, cursor=cursor)
            seen += [job.id for job in found]
            if cursor is None:
                break
        assert seen == made[::-1]
        assert len(listing.list_jobs(session, owner, q="0%_")[0]) == 5
        assert listing.list_jobs(session, owner, q="0%3")[0] == []  # % is no wildcard
        assert listing.list_jobs(session, owner, state="running")[0] == []
        for cursor in ("", "x", "é", "bm90aGluZw"):
            with pytest.raises(Invalid) as caught:
                listing.list_jobs(session, owner, cursor=cursor)
            assert caught.value.field == "cursor"


def test_the_view_of_a_job(sessions: Sessions, owner: User, farm: Settings) -> None:
    with sessions.begin() as session:
        job = add_job(session, owner, farm, trials=8)
        view = listing.summary(session, job, farm)
        assert (view.owner, view.position, view.eta_seconds) == ("owner@example.org", 0, None)
        assert view.waiting == "no worker is running that accepts search tasks"
        worker = add_worker(session)
    with sessions.begin() as session:
        held = queue.claim(session, worker, farm)
        assert held is not None
        for slot in trials.reserve(session, held.task, held.token, 4):
            trials.begin(session, held.task, held.token, slot.number, CANDIDATE, {}, "plain", None)
            score = scored(3 - slot.number, 0.1 * (slot.number + 1))
            trials.complete(session, held.task, held.token, slot.number, score)
        view = listing.summary(session, session.get_one(Job, job.id), farm)
    assert (view.state, view.position, view.waiting) == ("running", None, None)
    assert view.trials.model_dump() == {"complete": 4, "running": 0, "failed": 0, "budget": 8}
    assert view.eta_seconds == pytest.approx(4 * 0.25)
    assert view.best is not None and (view.best.number, view.best.refusals) == (3, 0)
    assert view.front_size == 4
    assert listing.JobView.model_validate_json(view.model_dump_json()) == view


def test_amending(sessions: Sessions, owner: User, farm: Settings) -> None:
    with sessions.begin() as session:
        job = add_job(session, owner, farm, trials=2)
        job = control.amend(session, owner, job, trials=9, parallelism=4, priority=-3, name="New")
        assert (job.trials, job.parallelism, job.priority, job.name) == (9, 4, -3, "New")
        assert len(queue.claimable_of(session, job.id)) == 4
        bad: list[tuple[dict[str, object], str]] = [
            ({"trials": 0}, "trials"),
            ({"trials": 10**9}, "trials"),
            ({"priority": 11}, "priority"),
            ({"parallelism": 0}, "parallelism"),
            ({"name": "a\x00"}, "name"),
        ]
        for changes, field in bad:
            with pytest.raises(Invalid) as caught:
                control.amend(session, owner, job, **changes)  # type: ignore[arg-type]
            assert caught.value.field == field
        single = add_job(session, owner, farm, methods=["deccp"])
        with pytest.raises(Invalid, match="one trial each"):
            control.amend(session, owner, single, trials=2)
        with pytest.raises(Invalid, match="run on one worker"):
            control.amend(session, owner, single, parallelism=2)
        three = add_job(session, owner, farm, methods=["mpoa", "ara", "deccp"], trials=2)
        assert three.trials == 3 and three.name == "tiny, 3 methods", "each has a trial at least"
        with pytest.raises(Invalid, match="Each of the 3 methods needs a trial"):
            control.amend(session, owner, three, trials=2)
        assert control.amend(session, owner, three, trials=9).trials == 9
        for made in (single, three):
            control.cancel(session, owner, made)
        worker = add_worker(session)
    with sessions.begin() as session:
        held = queue.claim(session, worker, farm)
        assert held is not None
        trials.reserve(session, held.task, held.token, 3)
        with pytest.raises(Invalid, match="3 trials have already been started"):
            control.amend(session, owner, held.job, trials=2)


def test_over_is_over(sessions: Sessions, owner: User, farm: Settings) -> None:
    with sessions.begin() as session:
        job = control.cancel(session, owner, add_job(session, owner, farm))
        assert control.cancel(session, owner, job).state == "cancelled"
        with pytest.raises(Conflict):
            control.pause(session, owner, job)
        with pytest.raises(Conflict):
            control.resume(session, owner, job)
        with pytest.raises(Conflict):
            control.amend(session, owner, job, trials=10)
        states = set(session.scalars(select(Task.state)))
        assert states == {"cancelled"}


def test_webhooks_hear_of_ends_once(sessions: Sessions, owner: User, farm: Settings) -> None:
    with sessions.begin() as session:
        for kinds in ([], ["job.cancelled"], ["job.completed"]):
            session.add(
                Webhook(owner_id=owner.id, url="https://example.org", secret="s", kinds=kinds)
            )
        session.flush()
        job = add_job(session, owner, farm)
        control.cancel(session, owner, job)
        control.cancel(session, owner, job)
        bodies = session.scalars(select(WebhookDelivery.body)).all()
    assert [body["type"] for body in bodies] == ["job.cancelled"] * 2
    assert all(body["data"]["id"] == str(job.id) for body in bodies)
