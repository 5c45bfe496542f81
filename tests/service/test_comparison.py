"""Methods side by side: turns, fronts, further scores, and the report of each method."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import comparison, fronts, queue, trials
from jobs.database import Sessions
from jobs.settings import Settings
from jobs.spec.scores import Value, wilson
from jobs.tables import User
from jobs.trial_scores import objectives_of
from tests.service.builders import CANDIDATE, held, scored

METHODS = ["mpoa", "deccp", "ara"]


def fill(
    sessions: Sessions, claim: queue.Claim, points: list[tuple[int, float]], **values: list[float]
) -> None:
    """Score the job's trials: refusals of 4 and KL, and further scores by name."""
    with sessions.begin() as session:
        for slot in trials.reserve(session, claim.task, claim.token, len(points)):
            origin = "single_pass" if slot.number < 2 else "sampler"
            number = slot.number
            trials.begin(session, claim.task, claim.token, number, CANDIDATE, {}, origin, None)
            found = scored(*points[number])
            found.scores.values = {
                name: Value(value=each[number], low=None, high=None, n=4)
                for name, each in values.items()
            }
            found.seconds = 1.0 + number
            trials.complete(session, claim.task, claim.token, number, found)


def test_methods_take_turns_also_over_orphans_and_more_trials(
    sessions: Sessions, owner: User, farm: Settings
) -> None:
    claim = held(sessions, owner, farm, methods=METHODS, trials=6)
    with sessions.begin() as session:
        slots = trials.reserve(session, claim.task, claim.token, 9)
        assert [slot.method for slot in slots] == ["deccp", "mpoa", "ara", "mpoa", "ara", "mpoa"]
        assert [row.method for row in trials.list_trials(session, claim.job.id)] == [
            slot.method for slot in slots
        ]
        trials.fail(session, claim.task, claim.token, 2, "engine_died")
        job = session.merge(claim.job)
        job.trials = 8
    with sessions.begin() as session:
        again = trials.reserve(session, claim.task, claim.token, 9)
    assert [(slot.number, slot.method) for slot in again] == [(2, "ara"), (6, "ara"), (7, "mpoa")]


def test_each_method_has_its_report(sessions: Sessions, owner: User, farm: Settings) -> None:
    claim = held(sessions, owner, farm, methods=METHODS, trials=7)
    # deccp 0; mpoa 1, 3, 5; ara 2, 4; one slot is left for ara
    points = [(4, 0.5), (2, 0.04), (3, 0.02), (1, 0.05), (3, 0.03), (1, 0.02)]
    fill(sessions, claim, points)
    with sessions.begin() as session:
        trials.store_rescored(
            session, claim.task, claim.token, 5, "heldout", scored(1, 0.03, role="heldout")
        )
        report = {each.method: each for each in comparison.compare(session, claim.job)}
        assert list(report) == METHODS
        assert [each.budget for each in report.values()] == [3, 1, 3]
        assert [each.complete for each in report.values()] == [3, 1, 2]
        assert report["mpoa"].front == [5] and report["ara"].front == [2]
        assert report["mpoa"].seconds == pytest.approx((2 + 4 + 6) / 3)
        # refusal rate 1/4 at KL 0.02 of 0.1, the others of mpoa are dominated
        assert report["mpoa"].hypervolume == pytest.approx(0.75 * 0.8)
        assert report["ara"].hypervolume == pytest.approx(0.25 * 0.8)
        assert report["deccp"].hypervolume == 0.0, "it refuses everything"
        best = report["mpoa"].best
        assert best is not None and best.number == 5
        assert best.search.interval == wilson(1, 4) and best.search.kl_multi == 0.01
        assert best.heldout is not None and best.heldout.kl_first == 0.03
        other = report["ara"].best
        assert other is not None and other.heldout is None
        # the job's front is mpoa's trial alone; to be compared, the others are checked too
        assert [row.number for row in trials.front(session, claim.job.id)] == [5]
        assert [row.number for row in trials.to_check(session, claim.job.id)] == [0, 1, 2, 5]


def test_a_job_without_trials_has_empty_reports(
    sessions: Sessions, owner: User, farm: Settings
) -> None:
    claim = held(sessions, owner, farm, methods=METHODS, trials=7)
    with sessions.begin() as session:
        for each in comparison.compare(session, claim.job):
            assert (each.complete, each.front, each.best) == (0, [], None)
            assert each.hypervolume is None and each.seconds is None


def test_the_front_is_of_the_jobs_objectives(
    sessions: Sessions, owner: User, farm: Settings
) -> None:
    objectives = ["log_odds", "kl_first", "kl_multi"]
    claim = held(sessions, owner, farm, trials=5, objectives=objectives)
    # the refusals and KLs of trial 1 are the best, its log-odds are the worst
    points = [(3, 0.4), (0, 0.1), (3, 0.3), (2, 0.3), (1, 0.1)]
    nan = float("nan")
    fill(
        sessions,
        claim,
        points,
        log_odds=[-4.0, 3.0, -5.0, -2.0, nan],
        perplexity=[7.0, 8.0, nan, 9.0, 7.5],
    )
    with sessions.begin() as session:
        rows = trials.list_trials(session, claim.job.id)
        assert [objectives_of(row, objectives) for row in rows] == [
            (-4.0, 0.4, 0.2), (3.0, 0.1, 0.05), (-5.0, 0.3, 0.15), (-2.0, 0.3, 0.15), None
        ]  # fmt: skip
        assert "log_odds" not in rows[4].values and set(rows[2].values) == {"log_odds"}
        assert [row.number for row in trials.front(session, claim.job.id)] == [2, 1]


numbers = st.one_of(st.integers(0, 3).map(float), st.floats(allow_infinity=False))


@given(st.lists(st.tuples(numbers, numbers, numbers), max_size=25))
def test_pareto_of_three_is_the_definition(points: list[tuple[float, ...]]) -> None:
    clean = [i for i, point in enumerate(points) if all(value == value for value in point)]

    def dominates(p: tuple[float, ...], q: tuple[float, ...]) -> bool:
        return p != q and all(a <= b for a, b in zip(p, q, strict=True))

    slow = [i for i in clean if not any(dominates(points[j], points[i]) for j in clean)]
    assert fronts.pareto(points) == slow


@given(st.lists(st.tuples(st.floats(0, 1.2), st.floats(0, 0.12)), max_size=8))
def test_hypervolume_is_the_dominated_share_of_the_box(points: list[tuple[float, float]]) -> None:
    """Against darts thrown at the box of refusal rates 0..1 and KLs 0..0.1."""
    noise = random.Random(0)
    darts = [(noise.random(), noise.random() * fronts.REFERENCE_KL) for _ in range(2000)]
    hit = sum(any(rate <= x and kl <= y for rate, kl in points) for x, y in darts)
    # four standard errors of a share at most
    assert fronts.hypervolume(points) == pytest.approx(hit / len(darts), abs=4 * 0.5 / 2000**0.5)


def test_hypervolume_of_known_fronts() -> None:
    assert fronts.hypervolume([]) == 0.0
    assert fronts.hypervolume([(0.0, 0.0)]) == 1.0
    assert fronts.hypervolume([(0.5, 0.05), (0.0, float("nan"))]) == pytest.approx(0.25)
    assert fronts.hypervolume([(0.5, 0.0), (0.0, 0.05)]) == pytest.approx(0.75)
