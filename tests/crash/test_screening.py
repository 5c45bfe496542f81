"""Trials that are not decoded, through deaths and with several workers and methods."""

from __future__ import annotations

import optuna
import pytest
from optuna.trial import TrialState

from jobs import comparison, trials
from jobs.tables import Job, Trial
from tests.crash.conftest import Stage
from worker.study import open_storage

pytestmark = pytest.mark.crash
METHODS = ["mpoa", "svd", "deccp"]


def dominators(row: Trial, rows: list[Trial]) -> list[Trial]:
    """Decoded trials of the method, finished before, that are no worse whatever it answers."""
    return [
        other
        for other in rows
        if other.method == row.method
        and not other.screened
        and (other.finished_at or 0) <= (row.finished_at or 0)  # type: ignore[operator]
        and (other.kl_first or 0.0) <= (row.kl_first or 0.0)
        and (other.refusals or 0) == row.refusals
    ]


@pytest.mark.parametrize(("methods", "lanes"), [(METHODS, 0), (["mpoa"], 2)])
def test_trials_are_screened_by_their_own_method_through_deaths(
    stage: Stage, methods: list[str], lanes: int
) -> None:
    """And the sampler is told all of them, once: also where they are told later than written."""
    stage.lanes = lanes
    for _ in range(2):
        stage.start_worker()
    job_id = stage.submit(methods=methods, trials=25, parallelism=2)
    stage.wait_complete(job_id, 6)
    stage.order("die")
    stage.wait_complete(job_id, 12)
    stage.workers[0].end()  # SIGKILL, perhaps between our table and the sampler's
    stage.start_worker()
    stage.wait_state(job_id, "completed")
    stage.check(job_id)
    with stage.sessions() as session:
        rows = trials.list_trials(session, job_id)
        left_out = [row for row in rows if row.screened]
        front = trials.front(session, job_id)
        reports = comparison.compare(session, session.get_one(Job, job_id))
    searched = [method for method in methods if method != "deccp"]
    assert {row.method for row in left_out} == set(searched)
    for row in left_out:
        assert row.origin == "sampler" and row.total == row.refusals and row.heldout is None
        assert dominators(row, rows), (row.number, row.method)
    assert not any(row.screened for row in front)
    assert sum(report.complete for report in reports) == 25
    worst = float(stage.job(job_id).spec["prompts"]["search"])  # all refused
    storage = open_storage(stage.settings.database_url, 30.0)
    for method in searched:
        study = optuna.load_study(study_name=f"job-{job_id}-{method}", storage=storage)
        told = study.get_trials(states=[TrialState.COMPLETE])
        mine = [row for row in rows if row.method == method and row.params]
        expected = [
            [worst if row.screened else float(row.refusals or 0), row.kl_first] for row in mine
        ]
        assert sorted(trial.values for trial in told) == sorted(expected)
    storage.engine.dispose()


def test_without_screening_all_is_decoded(stage: Stage) -> None:
    stage.start_worker()
    job_id = stage.submit(trials=12, screening=False)
    stage.wait_state(job_id, "completed")
    with stage.sessions() as session:
        rows = trials.list_trials(session, job_id)
    assert len(rows) == 12 and not any(row.screened for row in rows)
