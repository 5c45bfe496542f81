"""Warm starts: which points of which jobs, for whom, how many, and decided once."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.samplers import RandomSampler
from optuna.study import create_study
from sqlalchemy.orm import Session

from jobs import queue, trials, warm
from jobs.database import Sessions
from jobs.problems import LeaseLost
from jobs.settings import Settings
from jobs.spec.candidate import Ablation, Ara
from jobs.spec.methods import METHODS, MethodName, budget, share, turn
from jobs.spec.protocol import AnatomyReport
from jobs.tables import Job, Task, Trial, User
from jobs.warm import WarmStart
from tests.service.api_server import serve
from tests.service.builders import CANDIDATE, add_job, add_worker, lapse
from worker.space import candidate_from, plain, plain_number, space
from worker.warm import fitted, places

SEARCHED: list[MethodName] = [name for name in METHODS if METHODS[name].kind != "fixed"]


def anatomy(layers: int = 8, architecture: str = "LlamaForCausalLM") -> AnatomyReport:
    return AnatomyReport(
        architecture=architecture, layers=layers, hidden=16, writers=[], coverage=1.0
    )


def points(method: MethodName, layers: int, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Random points of a method's space."""
    study = create_study(sampler=RandomSampler(seed=seed))
    return [study.ask(space(layers, method)).params for _ in range(count)]


# --- pure ---------------------------------------------------------------------------------------


@given(st.integers(2, 12), st.integers(1, 7), st.integers(0, 1000))
def test_a_kernel_keeps_its_shape_over_the_depth(before: int, factor: int, seed: int) -> None:
    """Layer l of the one is layer factor · l of the other: λ is the same there."""
    after = factor * (before - 1) + 1
    [old] = points("mpoa", before, 1, seed)
    ours = candidate_from(old, before, "mpoa")
    theirs = candidate_from(warm.scaled(old, before, after), after, "mpoa")
    assert isinstance(ours, Ablation) and isinstance(theirs, Ablation)
    for layer in range(before):
        for component in ("attention", "mlp"):
            weight = ours.kernel(component).weight(layer)
            # at the very end of a kernel, rounding decides between its last weight and none
            edge = ours.kernel(component)
            if abs(abs(layer - edge.position) - edge.distance) > 1e-6:
                again = theirs.kernel(component).weight(factor * layer)
                assert again == pytest.approx(weight, abs=1e-9)
    if ours.index is not None:
        assert theirs.index == pytest.approx(factor * ours.index)


def test_a_range_of_ara_keeps_its_first_and_last_layer() -> None:
    point = plain(8, "ara") | {"start": 2, "end": 6}
    for after, expected in ((8, (2, 6)), (15, (4, 11)), (22, (6, 16))):
        params = fitted(warm.scaled(point, 8, after), space(after, "ara"), plain(after, "ara"))
        made = candidate_from(params, after, "ara")
        assert isinstance(made, Ara) and (made.start, made.end) == expected
    whole = warm.scaled(plain(8, "ara"), 8, 80)
    assert (whole["start"], whole["end"]) == (0, 80), "all layers stay all layers"


@given(st.sampled_from(SEARCHED), st.integers(1, 90), st.integers(1, 90), st.integers(0, 99))
def test_what_is_fitted_is_in_the_space(
    method: MethodName, before: int, after: int, seed: int
) -> None:
    [point] = points(method, before, 1, seed)
    table = space(after, method)
    found = fitted(warm.scaled(point, before, after), table, plain(after, method))
    assert found.keys() == table.keys()
    for name, each in table.items():
        assert each._contains(each.to_internal_repr(found[name])), name
    if before == after:
        assert found == point, "nothing is moved that fits"


def test_what_a_space_does_not_know_is_as_in_the_plain_point() -> None:
    usual = plain(8, "router")
    old = {"scope": "sideways", "attention.max_weight": 9.0, "gone": 1.0}
    found = fitted(old, space(8, "router"), usual)
    assert found == usual | {"attention.max_weight": 1.5}


def row(number: int, refusals: int, kl: float, **more: Any) -> Trial:
    values: dict[str, Any] = {
        "method": "mpoa", "origin": "sampler", "state": "complete", "candidate": {},
        "params": {"x": number}, "values": {}, "screened": False, "total": 100,
    }  # fmt: skip
    return Trial(number=number, refusals=refusals, kl_first=kl, **(values | more))


def test_the_pick_comes_first_and_the_others_are_spread() -> None:
    front = [row(n, 10 * n, 0.1 / (n + 1)) for n in range(9)]  # pick: trial 0
    assert [each.number for each in warm.chosen(front, 4)] == [0, 2, 5, 7]
    assert [each.number for each in warm.chosen(front, 1)] == [0]
    assert [each.number for each in warm.chosen(front[:2], 4)] == [0, 1]
    assert warm.chosen(front, 0) == warm.chosen([], 4) == []
    # hardly more refusals, far less KL: `fronts.best`
    assert warm.chosen([row(0, 0, 0.1), row(1, 2, 0.01)], 1)[0].number == 1


def test_single_pass_and_plain_point_are_no_warm_starts() -> None:
    front = [
        row(0, 1, 0.01, params={}, origin="single_pass"),
        row(1, 0, 0.02, origin="plain"),
        row(2, 50, 0.001),
    ]
    assert [each.number for each in warm.chosen(front, 4)] == [2]


@given(
    st.lists(st.sampled_from(sorted(METHODS)), min_size=1, max_size=6, unique=True),
    st.integers(1, 300),
)
def test_slots_are_behind_the_plain_point_and_a_tenth_at_most(
    methods: list[MethodName], asked: int
) -> None:
    trials = budget(methods, asked)
    found = places(methods, trials)
    assert set(found) == {name for name in methods if name in SEARCHED}
    for method, numbers in found.items():
        assert len(numbers) <= min(4, share(methods, trials, method) / 10)
        assert all(number < trials for number in numbers)
        begin = plain_number(method) + 1
        assert [turn(methods, number) for number in numbers] == [
            (method, begin + place) for place in range(len(numbers))
        ]


def test_known_slots() -> None:
    assert places(["mpoa"], 3) == {"mpoa": []}
    assert places(["mpoa"], 30) == {"mpoa": [2, 3, 4]}
    assert places(["mpoa"], 10_000) == {"mpoa": [2, 3, 4, 5]}
    # deccp 0; mpoa 1 (single pass), 3 (plain), 5; ara 2 (plain), 4
    assert places(["mpoa", "ara", "deccp"], 29) == {"mpoa": [5], "ara": [4]}


# --- with a database ----------------------------------------------------------------------------

REPORT = anatomy()
FRONT = [(8, 0.001), (4, 0.01), (1, 0.02), (0, 0.03)]  # refusals of 10, KL


@pytest.fixture
def earlier(sessions: Sessions, owner: User, farm: Settings) -> Callable[..., uuid.UUID]:
    """A finished job: trials 2.. of each of its methods have the front's points."""

    def make(
        user: User | None = None, *, layers: int = 8, state: str = "completed", seed: int = 1,
        model: str = "tiny", architecture: str = "LlamaForCausalLM", front: Any = tuple(FRONT),
        screened: bool = False, **fields: Any,
    ) -> uuid.UUID:  # fmt: skip
        with sessions.begin() as session:
            user = session.get_one(User, (user or owner).id)
            job = add_job(session, user, farm, **{"trials": 20, **fields})
            job.model, job.state, job.desired_state = model, state, "run"  # type: ignore[assignment]
            report = anatomy(layers, architecture).model_dump(mode="json")
            job.prepared = {"anatomy": report}
            job.finished_at = job.created_at
            number = 2
            for method in job.spec["methods"]:
                asked = points(method, layers, len(front), seed)
                for (refusals, kl), params in zip(front, asked, strict=True):
                    session.add(
                        row(
                            number, refusals, kl, params=params, method=method, total=10,
                            job_id=job.id, screened=screened,
                        )
                    )  # fmt: skip
                    number += 1
            return job.id

    return make


@pytest.fixture
def begin(
    sessions: Sessions, owner: User, farm: Settings
) -> Callable[..., tuple[queue.Claim, dict[int, WarmStart]]]:
    """A new job in a worker's hands, and its warm starts."""

    def make(user: User | None = None, report: AnatomyReport = REPORT, **fields: Any) -> Any:
        with sessions.begin() as session:
            user = session.get_one(User, (user or owner).id)
            job = add_job(session, user, farm, **{"trials": 100, **fields})
            queue_only(session, job)
        with sessions.begin() as session:
            claim = queue.claim(session, add_worker(session), farm)
            assert claim is not None and claim.job.id == job.id
        return claim, ask(sessions, claim, report)

    return make


def queue_only(session: Session, job: Job) -> None:
    """Take the tasks of all other jobs out of the way: those were scored by hand."""
    for task in session.query(Task).where(Task.job_id != job.id):
        task.state = "done"


def ask(
    sessions: Sessions, claim: queue.Claim, report: AnatomyReport = REPORT
) -> dict[int, WarmStart]:
    with sessions.begin() as session:
        spec = claim.job.spec
        numbers = places(spec["methods"], claim.job.trials)
        return warm.starts(session, claim.task, claim.token, numbers, report)


Earlier = Callable[..., uuid.UUID]
Begin = Callable[..., tuple[queue.Claim, dict[int, WarmStart]]]


def test_a_search_begins_with_the_front_of_an_earlier_job(
    earlier: Earlier, begin: Begin, sessions: Sessions
) -> None:
    before = earlier()
    claim, found = begin()
    assert {number: each.trial for number, each in found.items()} == {2: 5, 3: 4, 4: 3, 5: 2}
    assert {each.job for each in found.values()} == {before}
    asked = points("mpoa", 8, 4, 1)
    assert [each.params for each in found.values()] == asked[::-1]
    with sessions.begin() as session:
        job = session.get_one(Job, claim.job.id)
        began = row(2, 0, 0.1, origin=warm.ORIGIN)
        assert warm.source(job, began) == warm.Source(job=before, trial=5)
        assert warm.source(job, row(2, 0, 0.1)) is None, "another one has got the number"
        assert warm.source(job, row(9, 0, 0.1, origin=warm.ORIGIN)) is None


def test_without_an_earlier_job_there_are_none(begin: Begin, sessions: Sessions) -> None:
    claim, found = begin()
    assert found == {}
    with sessions.begin() as session:
        assert session.get_one(Job, claim.job.id).warm_starts == {}, "decided, not open"


def test_private_jobs_do_not_leak(
    earlier: Earlier, begin: Begin, make_user: Callable[..., User]
) -> None:
    """Also to those who see the job that would begin with them, and through administrators."""
    other = make_user()
    for seed, role in enumerate(("member", "admin")):
        me = make_user(role=role)
        more = {"architecture": role, "front": FRONT[-1:]}
        shared = earlier(me, seed=10 * seed, **more)
        mine = earlier(me, seed=10 * seed + 1, private=True, **more)
        others = earlier(other, seed=10 * seed + 2, **more)
        earlier(other, seed=10 * seed + 3, private=True, **more)
        for private, seen in ((False, {shared, others}), (True, {shared, others, mine})):
            _, found = begin(me, report=anatomy(architecture=role), private=private)
            assert {each.job for each in found.values()} == seen


def test_jobs_of_which_nothing_is_learned(earlier: Earlier, begin: Begin) -> None:
    for state in ("failed", "running", "paused", "cancelled"):
        earlier(state=state)
    earlier(architecture="MambaForCausalLM")
    earlier(methods=["svd"])
    earlier(screened=True)
    earlier(front=())
    assert begin()[1] == {}
    earlier()
    assert begin(objectives=["log_odds", "kl_first"])[1] == {}, "its trials have no log-odds"
    assert len(begin()[1]) == 4


def test_the_same_model_comes_first_then_the_nearest_in_depth(
    earlier: Earlier, begin: Begin
) -> None:
    two = FRONT[-2:]
    far = earlier(model="far", layers=40, front=two, seed=1)
    near = earlier(model="near", layers=15, front=two, seed=2)
    same = earlier(model="tiny", layers=8, front=two[:1], seed=3)
    _, found = begin()
    assert [each.job for each in found.values()] == [same, near, near, far]
    old, new = points("mpoa", 15, 2, 2)[1], found[3].params
    assert new["attention.position"] == pytest.approx(old["attention.position"] / 2)
    assert new["attention.max_weight"] == old["attention.max_weight"]


def test_points_that_earlier_jobs_share_are_taken_once(earlier: Earlier, begin: Begin) -> None:
    """The second job began with what the first one found."""
    two = FRONT[-2:]
    first = earlier(trials=30, seed=1, front=two)
    earlier(trials=25, seed=1, front=two)
    third = earlier(trials=20, seed=2, front=two)
    _, found = begin()
    assert [each.job for each in found.values()] == [first, first, third, third]


def test_methods_that_are_compared_begin_alike(earlier: Earlier, begin: Begin) -> None:
    """Each with points of its own; as many as are known of the least known one."""
    earlier(methods=["mpoa"], seed=1)
    _, none = begin(methods=["mpoa", "ara"])
    assert none == {}, "nothing is known of ara"
    ara = earlier(methods=["ara"], front=FRONT[:2], seed=2)
    _, found = begin(methods=["mpoa", "ara"])
    assert sorted(found) == [3, 4, 5, 6]
    for number, start in found.items():
        method = turn(["mpoa", "ara"], number)[0]
        assert start.params.keys() == space(8, method).keys()
        assert (start.job == ara) == (method == "ara")


def test_it_is_decided_once(earlier: Earlier, begin: Begin, sessions: Sessions) -> None:
    """Another worker, later, and with another budget: the same points."""
    earlier(seed=1, front=FRONT[:2])
    claim, found = begin()
    earlier(seed=2, trials=500)
    assert len(found) == 2 and ask(sessions, claim) == found
    with sessions.begin() as session:
        session.get_one(Job, claim.job.id).trials = 1000
    assert ask(sessions, claim) == found


def test_workers_at_once_agree(
    earlier: Earlier, begin: Begin, sessions: Sessions, crowd: Sessions, farm: Settings
) -> None:
    earlier()
    with sessions.begin() as session:
        owner = session.query(User).where(User.email == "owner@example.org").one()
        job = add_job(session, owner, farm, trials=100, parallelism=4)
        queue_only(session, job)
    claims = []
    for _ in range(4):
        with sessions.begin() as session:
            claim = queue.claim(session, add_worker(session), farm)
            assert claim is not None
            claims.append(claim)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda claim: ask(crowd, claim), claims))
    assert len(found[0]) == 4 and found == [found[0]] * 4


def test_a_worker_that_died_before_it_began_changes_nothing(
    earlier: Earlier, begin: Begin, sessions: Sessions, farm: Settings
) -> None:
    earlier()
    claim, found = begin()
    with sessions.begin() as session:
        trials.reserve(session, claim.task, claim.token, 4)
        lapse(session, claim.task.id)
    with pytest.raises(LeaseLost):
        ask(sessions, claim)
    with sessions.begin() as session:
        other = queue.claim(session, add_worker(session), farm)
        assert other is not None
        slots = trials.reserve(session, other.task, other.token, 4)
    assert [(slot.number, slot.candidate) for slot in slots] == [(n, None) for n in range(4)]
    assert ask(sessions, other) == found


def test_a_trial_says_where_it_comes_from(
    earlier: Earlier, begin: Begin, sessions: Sessions, farm: Settings, member: User
) -> None:
    before = earlier()
    claim, found = begin()
    task, token = claim.task, claim.token
    with sessions.begin() as session:
        trials.reserve(session, task, token, 3)
        params = found[2].params
        trials.begin(session, task, token, 2, CANDIDATE, params, warm.ORIGIN, None)
    with serve(farm, sessions) as api, api.as_user(member) as client:
        rows = client.get(f"/jobs/{claim.job.id}/trials").json()["items"]
        one = client.get(f"/jobs/{claim.job.id}/trials/2").json()
    assert [row["warm_start"] for row in rows] == [None, None, {"job": str(before), "trial": 5}]
    assert one["warm_start"] == rows[2]["warm_start"] and one["origin"] == "warm_start"
