"""Trials that are not decoded: what screens them, and what is never made of them."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from jobs import comparison, control, events, fronts, queue, screening, trials
from jobs.database import Sessions
from jobs.problems import Conflict
from jobs.settings import Settings
from jobs.spec.candidate import single_pass
from jobs.spec.job import JobSpec
from jobs.spec.methods import MethodName
from jobs.spec.protocol import Scored
from jobs.spec.scorers import ScorerName
from jobs.spec.scores import Outcome, Scores
from jobs.tables import Trial, User
from jobs.trial_scores import front_of, objectives_of
from nullspace.terminal import FRONT, front_rows, out, table
from tests.service import api_worker
from tests.service.api_server import Api, api, spec
from tests.service.builders import CANDIDATE, held, make_spec, scored
from tests.service.test_api_jobs import problem
from worker.points import Point, together
from worker.space import plain
from worker.study import MethodStudy, open_storage

__all__ = ["api"]
OBJECTIVES: list[ScorerName] = ["refusals", "kl_first"]


def screened(refusals: int, total: int, kl: float, prompts: int = 4) -> Scored:
    """A score of which `total` of `prompts` answers are known."""
    outcomes = [
        Outcome(refused=place < refusals, text=f"answer {place}", tokens=3)
        if place < total
        else Outcome(refused=False, answered=False)
        for place in range(prompts)
    ]
    scores = Scores(role="search", refusals=refusals, total=total, kl_first=kl)
    return Scored(scores=scores, outcomes=outcomes, seconds=0.125, screened=True)


def fill(sessions: Sessions, claim: queue.Claim, found: list[Scored]) -> None:
    """Complete the job's next slots, each in a transaction of its own."""
    for one in found:
        with sessions.begin() as session:
            (slot,) = trials.reserve(session, claim.task, claim.token, 1)
            begin = (slot.number, CANDIDATE, {"x": 1}, "sampler", None)
            trials.begin(session, claim.task, claim.token, *begin)
            assert trials.complete(session, claim.task, claim.token, slot.number, one)


@pytest.mark.parametrize(
    ("fields", "origin", "applies"),
    [
        ({}, "sampler", True),
        ({"objectives": ["refusals", "log_odds", "kl_multi"]}, "sampler", True),
        ({"screening": False}, "sampler", False),
        # nothing is to be decoded, so nothing can be left out
        ({"objectives": ["log_odds", "kl_first"]}, "sampler", False),
        ({}, "single_pass", False),
        ({}, "plain", False),
        ({}, "selected", False),
        ({}, "warm_start", False),
    ],
)
def test_what_may_be_screened(fields: dict[str, object], origin: str, applies: bool) -> None:
    assert screening.applies(make_spec(**fields), origin) is applies


def test_one_request_holds_one_method_where_that_screens() -> None:
    one, other = ([{"refusals": share, "kl_first": 0.1}] for share in (0.2, 0.3))

    def point(number: int, method: MethodName, finished: list[dict[str, float]]) -> Point:
        return Point(number, method, single_pass(8), {}, "sampler", finished=finished)

    whole: list[MethodName] = ["mpoa", "ara", "deccp", "svd"]
    points = [point(number, method, []) for number, method in enumerate(whole)]
    points += [point(4, "mpoa", one), point(5, "svd", other), point(6, "mpoa", list(one))]
    groups = together(points, size=2)
    assert [[each.number for each in group] for group in groups] == [[0, 2], [1], [3], [4, 6], [5]]


def test_a_front_holds_what_was_decoded() -> None:
    """A screened trial has the best estimate of all here."""
    rows = [
        Trial(number=0, refusals=2, total=100, kl_first=0.2, screened=False),
        Trial(number=1, refusals=0, total=0, kl_first=0.1, screened=True),
        Trial(number=2, refusals=1, total=4, kl_first=0.3, screened=True),
    ]
    assert [objectives_of(row, OBJECTIVES) for row in rows] == [(2, 0.2), (0, 0.1), (1, 0.3)]
    assert [row.number for row in front_of(rows, OBJECTIVES)] == [0]


def test_screened_trials_of_a_job(sessions: Sessions, owner: User, farm: Settings) -> None:
    claim = held(sessions, owner, farm, methods=["mpoa", "svd"], trials=8)
    job_id = claim.job.id
    points = [
        scored(2, 0.04), scored(0, 0.5),  # mpoa 0, svd 1
        scored(1, 0.05), scored(3, 0.01),
        screened(2, 3, 0.045), screened(0, 0, 0.6),  # dominated by 0 and by 1
        screened(1, 1, 0.06), scored(4, 0.005),  # dominated by 2
    ]  # fmt: skip
    fill(sessions, claim, points)
    with sessions.begin() as session:
        assert screening.finished(session, job_id, "mpoa", ["refusals", "kl_first"]) == [
            {"refusals": 0.25, "kl_first": 0.05}, {"refusals": 0.5, "kl_first": 0.04}
        ]  # fmt: skip
        assert screening.finished(session, job_id, "ara", ["refusals", "kl_first"]) == []
        rows = trials.list_trials(session, job_id)
        assert [row.number for row in rows if row.screened] == [4, 5, 6]
        better = [screening.dominator(session, row, OBJECTIVES) for row in rows]
        assert [each and each.number for each in better] == [None] * 4 + [0, 1, 2, None]
        # they are complete, and nothing is made of them
        assert trials.counts(session, job_id)["complete"] == 8
        shown = {row.number for row in trials.front(session, job_id)}
        shown |= {row.number for row in trials.to_check(session, job_id)}
        for mine in trials.fronts_by_method(session, job_id).values():
            shown |= {row.number for row in mine}
        assert shown == {0, 1, 2, 3, 7}
        report = {each.method: each for each in comparison.compare(session, claim.job)}
        assert [each.complete for each in report.values()] == [4, 4]
        expected = fronts.hypervolume([(0.5, 0.04), (0.25, 0.05)])
        assert report["mpoa"].hypervolume == pytest.approx(expected)
        assert report["svd"].hypervolume == pytest.approx(0.25 * 0.9), "trial 3: 3/4 at 0.01"
        assert [o.answered for o in trials.responses(session, job_id, 4)["search"]] == [
            True, True, True, False
        ]  # fmt: skip
        told_of = [e.payload for e in events.since(session, job_id, 0) if e.kind == "trial"]
        assert [payload["screened"] for payload in told_of] == [row.screened for row in rows]
        with pytest.raises(Conflict, match=r"not decoded.*screening off"):
            control.pick(session, owner, claim.job, 4)
        assert not control.pick(session, owner, claim.job, 4, picked=False).picked


def test_other_objectives_must_be_no_worse(sessions: Sessions, owner: User, farm: Settings) -> None:
    """Each of them: what is better in one alone dominates nothing."""
    three: list[ScorerName] = ["refusals", "kl_first", "kl_multi"]
    claim = held(sessions, owner, farm, trials=3, objectives=three)
    last = screened(1, 1, 0.4)
    last.scores.kl_multi = 0.04  # that of trial 0 is 0.05, of trial 1 0.03
    fill(sessions, claim, [scored(0, 0.1), scored(1, 0.06), last])
    with sessions.begin() as session:
        row = trials.get(session, claim.job.id, 2)
        better = screening.dominator(session, row, three)
        assert better is not None and better.number == 1


@pytest.fixture
def storage(database_url: str) -> Iterator[RDBStorage]:
    made = open_storage(database_url, 30.0)
    yield made
    made.engine.dispose()


def test_a_crash_before_the_sampler_was_told(storage: RDBStorage) -> None:
    """What `mend` tells of a screened row is what the search would have told of its score."""
    asked = JobSpec.model_validate({"model": "demo", "trials": 30})
    study = MethodStudy(storage, "s", asked, "mpoa", 8, 30)
    params, number = study.ask(2)
    found = screened(3, 16, 0.25, prompts=100)
    row = Trial(
        job_id=uuid.uuid4(), number=2, method="mpoa", state="complete", candidate={}, screened=True,
        params=params, optuna_number=number, refusals=found.scores.refusals,
        total=found.scores.total, kl_first=found.scores.kl_first,
    )  # fmt: skip
    warm = Trial(
        job_id=uuid.uuid4(), number=1, method="mpoa", state="complete", candidate={},
        params=plain(8, "mpoa"), refusals=7, total=100, kl_first=0.5,
    )  # fmt: skip
    for _ in range(2):
        study.mend([warm, row], 30.0)
        complete = study._study.get_trials(states=[TrialState.COMPLETE])
        assert sorted(trial.values for trial in complete) == [[7.0, 0.5], [100.0, 0.25]]


def test_screened_trials_over_http(api: Api, member: User, sessions: Sessions) -> None:
    with api.as_user(member) as client:
        job = client.post("/jobs", json=spec(trials=2)).json()["id"]
        claim = api_worker.claim(sessions, api.settings)
        api_worker.score(sessions, claim, 1, 0.01)
        fill(sessions, claim, [screened(1, 2, 0.02, prompts=8)])
        listed = client.get(f"/jobs/{job}/trials").json()["items"]
        assert [trial["screened"] for trial in listed] == [False, True]
        assert [t["number"] for t in client.get(f"/jobs/{job}/front").json()["items"]] == [0]
        one = client.get(f"/jobs/{job}/trials/1").json()
        assert one["screened_by"] == 0 and one["search"]["kl_first"] == 0.02
        assert (one["search"]["refusals"], one["search"]["total"]) == (1, 2)
        assert [answer["text"] for answer in one["responses"]["search"]] == ["answer 0", "answer 1"]
        assert client.get(f"/jobs/{job}/trials/0").json()["screened_by"] is None
        assert client.get(f"/jobs/{job}").json()["best"]["number"] == 0
        refused = problem(client.post(f"/jobs/{job}/trials/1/pick"), 409)
        assert "not decoded" in str(refused["detail"])
        # its candidate is known, so all that needs no score can be had
        assert client.post(f"/jobs/{job}/trials/1/artifacts", json={}).status_code == 202
        chat = client.post(f"/jobs/{job}/chat", json={"prompt": "Hello?", "trial": 1})
        assert chat.status_code == 202


def test_tables_of_the_command_line() -> None:
    """A column that no row fills is not shown; a screened trial has no count of refusals."""
    scores = {"refusals": 3, "total": 100, "kl_first": 0.5, "kl_multi": None}
    rows: list[dict[str, object]] = [
        {"number": 4, "search": scores, "method": "mpoa", "screened": False},
        {"number": 5, "search": {**scores, "total": 0}, "method": "mpoa", "screened": True},
    ]
    with out.capture() as captured:
        table(FRONT, front_rows(rows))
    head, first, second = captured.get().splitlines()
    assert "KL multi" not in head and head.split()[:4] == ["trial", "search", "KL", "first"]
    assert "3/100" in first and "not decoded" in second and "None" not in captured.get()
    with out.capture() as captured:
        table(FRONT, front_rows([*rows, {"number": 6, "search": {**scores, "kl_multi": 0.25}}]))
    assert "KL multi" in captured.get() and "0.25" in captured.get()
