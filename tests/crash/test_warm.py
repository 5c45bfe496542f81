"""Warm starts through a death and with several workers; without them a search is as ever."""

from __future__ import annotations

import optuna
import pytest
from optuna.trial import TrialState

from jobs import trials, warm
from jobs.tables import Trial
from tests.crash.conftest import Stage
from worker.study import open_storage

pytestmark = pytest.mark.crash


def test_warm_starts_through_deaths(stage: Stage) -> None:
    stage.start_worker()
    first = stage.submit(trials=20)
    stage.wait_state(first, "completed")
    cold = stage.submit(trials=20, warm_start=False)
    stage.wait_state(cold, "completed")
    with stage.sessions() as session:
        one, two = (trials.list_trials(session, job) for job in (first, cold))
        assert stage.job(first).warm_starts == {}
        assert stage.job(cold).warm_starts is None, "nobody has looked for them"
    assert [row.params for row in one] == [row.params for row in two]
    assert {row.origin for row in one[2:] + two[2:]} == {"sampler"}

    stage.order("die")  # as soon as the first candidates are scored
    stage.start_worker()
    begun = stage.submit(trials=44, parallelism=2, seed=5)
    stage.wait_complete(begun, 3)
    stage.order("die")
    stage.wait_state(begun, "completed")
    stage.check(begun)
    with stage.sessions() as session:
        rows = trials.list_trials(session, begun)
        before = {row.number: row for row in trials.front(session, first)}
        before |= {row.number: row for row in trials.front(session, cold)}
    count = len(stage.job(begun).warm_starts or {})
    assert 1 <= count <= 4
    origins = ["single_pass", "plain", *[warm.ORIGIN] * count, *["sampler"] * (42 - count)]
    assert [row.origin for row in rows] == origins
    for row in rows[2 : 2 + count]:
        source = warm.source(stage.job(begun), row)
        assert source is not None and source.job in (first, cold)
        assert row.params == before[source.trial].params
        assert row.candidate == before[source.trial].candidate, "the same layers: the same edit"
    assert len({str(row.params) for row in rows[2 : 2 + count]}) == count
    worst = float(stage.job(begun).spec["prompts"]["search"])
    _told(stage, f"job-{begun}-mpoa", rows, worst)


def _told(stage: Stage, name: str, rows: list[Trial], worst: float) -> None:
    """Optuna knows the score of every point of its space, once; `worst` of what was screened."""
    storage = open_storage(stage.settings.database_url, 30.0)
    study = optuna.load_study(study_name=name, storage=storage)
    complete = study.get_trials(states=[TrialState.COMPLETE])
    assert sorted(trial.values for trial in complete) == sorted(
        [worst if row.screened else row.refusals, row.kl_first] for row in rows if row.params
    )
    assert len(complete) == len(rows) - 1, "all but the single pass"
    storage.engine.dispose()
