"""Screening: never of what could have reached the front, and it saves the answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine import rounds
from engine.report import Silent
from engine.scorers.screen import Race, bound
from engine.session import Session
from jobs.fronts import pareto
from jobs.spec.candidate import Ablation, constant
from jobs.spec.protocol import Score, Scored
from tests.engine.fixtures_run import demo_folder, prepare_request

__all__ = ["demo_folder"]


@pytest.mark.parametrize(
    ("cheap", "finished", "expected"),
    [
        ({"kl_first": 0.2}, [], None),
        ({"kl_first": 0.2}, [{"refusals": 0.0, "kl_first": 0.3}], None),
        ({"kl_first": 0.2}, [{"refusals": 0.03, "kl_first": 0.1}], 3),
        ({"kl_first": 0.2}, [{"refusals": 0.0, "kl_first": 0.2}], 0),  # no better than that one
        (
            {"kl_first": 0.2},
            [{"refusals": 0.5, "kl_first": 0.1}, {"refusals": 0.29, "kl_first": 0.15}],
            29,
        ),
        (
            {"kl_first": 0.2, "log_odds": -3.0},
            [{"refusals": 0.0, "kl_first": 0.1, "log_odds": -2.0}],
            None,
        ),
        ({"kl_first": 0.2}, [{"refusals": 0.0, "kl_first": 0.1, "log_odds": -2.0}], None),
    ],
)
def test_how_many_refusals_are_too_many(
    cheap: dict[str, float], finished: list[dict[str, float]], expected: int | None
) -> None:
    assert bound(cheap, finished, 100) == expected


def test_each_candidate_runs_its_own_race() -> None:
    race = Race([None, 2, 0], each=3)
    assert [race.lost(row) for row in (0, 3, 6)] == [False, False, True]
    for row in (0, 1, 2, 3):
        race.count(row, refused=True)
    race.count(4, refused=False)
    assert not race.lost(5) and not race.lost(0)
    race.count(5, refused=True)
    assert race.lost(3) and not race.lost(1)


@pytest.fixture(scope="module")
def session(demo_folder: Path) -> Session:
    made = Session()
    made.prepare(prepare_request(demo_folder), Silent())
    return made


CANDIDATES = [
    Ablation(attention=constant(attention), mlp=constant(mlp))
    for attention, mlp in ((0, 0.1), (0.2, 0.2), (0.3, 0.1), (0.7, 0), (0, 1.2), (0.5, 0.6), (1, 1))
]


def scores(session: Session, finished: list[dict[str, float]]) -> list[Scored]:
    return session.score(Score(candidates=CANDIDATES, finished=finished), Silent()).scored


def objectives(one: Scored) -> dict[str, float]:
    assert one.scores.kl_first is not None
    return {"refusals": one.scores.refusals / one.scores.total, "kl_first": one.scores.kl_first}


def test_screened_are_exactly_those_that_are_dominated(session: Session) -> None:
    """Against the whole scores of all: with any of them as finished ones, nothing that would have
    been on the front is left out, and what is scored whole has its whole scores."""
    whole = scores(session, [])
    assert not any(one.screened for one in whole)
    counts = [one.scores.refusals for one in whole]
    assert max(counts) == 12 and min(counts) == 0 and len(set(counts)) > 3, counts
    some = 0
    for number in range(len(whole)):
        finished = [objectives(whole[number])]
        found = scores(session, finished)
        for one, truth in zip(found, whole, strict=True):
            mine = objectives(truth)
            assert one.scores.kl_first == pytest.approx(mine["kl_first"], abs=1e-6)
            if abs(mine["kl_first"] - finished[0]["kl_first"]) < 1e-6:
                continue  # itself: equal up to rounding
            dominated = all(finished[0][name] <= mine[name] for name in mine)
            if not one.screened:  # the answer that decides may be the last one
                assert one.outcomes == truth.outcomes
                continue
            some += 1
            assert dominated
            given = [o for o in one.outcomes if o.answered]
            assert one.scores.total == len(given) < 12 == len(one.outcomes)
            assert one.scores.refusals == sum(o.refused for o in given)
            assert one.scores.refusals >= round(12 * finished[0]["refusals"])
    assert some > 2


def test_no_front_loses_a_point(session: Session) -> None:
    whole = [(o["refusals"], o["kl_first"]) for o in map(objectives, scores(session, []))]
    front = {number for number in pareto(whole)}
    finished: list[dict[str, float]] = []
    kept = set()
    for number, candidate in enumerate(CANDIDATES):
        asked = Score(candidates=[candidate], finished=finished)
        (one,) = session.score(asked, Silent()).scored
        if not one.screened:
            finished.append(objectives(one))
            kept.add(number)
    assert front <= kept


def test_what_is_dominated_before_its_first_token_is_not_read(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the divergence is measured."""
    read: list[str] = []
    monkeypatch.setattr(rounds, "Batch", lambda *_, **__: read.append("a batch of answers"))
    asked = Score(candidates=CANDIDATES[-1:], finished=[{"refusals": 0.0, "kl_first": 0.0}])
    (one,) = session.score(asked, Silent()).scored
    assert one.screened and one.scores.total == 0 and not any(o.answered for o in one.outcomes)
    assert one.scores.kl_first is not None and one.scores.kl_first > 0
    assert read == []
