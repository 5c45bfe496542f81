"""Several methods in one job, through deaths, several workers and more trials."""

from __future__ import annotations

import uuid
from collections import Counter

import optuna
import pytest
from optuna.trial import TrialState

from jobs import comparison, control, trials
from jobs.spec.candidate import Ablation, Ara, parse
from jobs.spec.job import JobSpec
from jobs.spec.methods import METHODS, turn
from jobs.tables import Job
from jobs.trial_scores import objectives_of
from tests.crash.conftest import Stage
from tests.service.processes import ring_for, wait_until
from worker.study import open_storage, told

pytestmark = pytest.mark.crash
COMPARED = ["mpoa", "ara", "deccp", "arditi", "svd"]
OBJECTIVES = ["refusals", "kl_first", "log_odds"]


def check_studies(stage: Stage, job_id: uuid.UUID) -> None:
    """Each searched method's study holds its complete trials, once, and nothing of another."""
    storage = open_storage(stage.settings.database_url, 30.0)
    with stage.sessions() as session:
        rows = trials.list_trials(session, job_id, limit=1000)
        spec = JobSpec.model_validate(session.get_one(Job, job_id).spec)
    names = {f"job-{job_id}-{name}" for name in COMPARED if METHODS[name].kind != "fixed"}  # type: ignore[index]
    assert {name for name in optuna.get_all_study_names(storage) if str(job_id) in name} == names
    for name in names:
        study = optuna.load_study(study_name=name, storage=storage)
        known = study.get_trials(states=[TrialState.COMPLETE])
        mine = [row for row in rows if name.endswith(f"-{row.method}") and row.params]
        expected = sorted(
            told(spec, objectives_of(row, OBJECTIVES) or (), row.screened) for row in mine
        )
        assert sorted(tuple(trial.values) for trial in known) == expected
    storage.engine.dispose()


def test_methods_are_searched_side_by_side_through_deaths(stage: Stage) -> None:
    for _ in range(2):
        stage.start_worker()
    job_id = stage.submit(
        methods=COMPARED, trials=17, parallelism=2, objectives=OBJECTIVES, scorers=["length"]
    )
    stage.wait_complete(job_id, 4)
    stage.order("die")
    stage.wait_complete(job_id, 8)
    stage.workers[0].end()  # SIGKILL in the middle of something
    stage.start_worker()
    stage.wait_state(job_id, "completed")
    stage.check(job_id)
    with stage.sessions() as session:
        rows = trials.list_trials(session, job_id)
        assert [row.method for row in rows] == [turn(COMPARED, n)[0] for n in range(17)]  # type: ignore[arg-type]
        assert Counter(row.method for row in rows) == {
            "deccp": 1, "arditi": 1, "mpoa": 5, "ara": 5, "svd": 5
        }  # fmt: skip
        for row in rows:
            edit = parse(row.candidate)
            method = METHODS[row.method]  # type: ignore[index]
            assert isinstance(edit, Ara) == (method.kind == "ara")
            if isinstance(edit, Ablation) and row.method != "arditi":
                assert (edit.mode, edit.recipe) == (method.mode, method.recipe)
            assert set(row.values) == {"log_odds"}, "what is not cheap is for the front"
            if row.heldout is not None:
                assert set(row.heldout["values"]) == {"log_odds", "length"}
        origins = {row.number: row.origin for row in rows}
        # deccp, arditi; then mpoa, ara, svd in turn
        assert [origins[number] for number in range(8)] == [
            "single_pass", "selected", "single_pass", "plain", "single_pass", "plain", "sampler",
            "plain",
        ]  # fmt: skip
        chosen = parse(rows[1].candidate)
        assert isinstance(chosen, Ablation) and chosen.recipe.position == -2
        assert rows[1].params["layer"] == 3, "why it was chosen"
        reports = comparison.compare(session, session.get_one(Job, job_id))
        assert all(each.best is not None and each.best.heldout for each in reports)
    check_studies(stage, job_id)

    with stage.sessions.begin() as session:
        control.amend(session, stage.owner, session.get_one(Job, job_id), trials=23)
    ring_for(stage.sessions, stage.settings, job_id)
    wait_until(lambda: stage.complete(job_id) == 23, 30, "six more, two for each method")
    stage.wait_state(job_id, "completed")
    with stage.sessions() as session:
        counted = Counter(row.method for row in trials.list_trials(session, job_id))
    assert counted == {"deccp": 1, "arditi": 1, "mpoa": 7, "ara": 7, "svd": 7}
    check_studies(stage, job_id)


def test_fixed_methods_alone_need_no_study(stage: Stage) -> None:
    stage.start_worker()
    job_id = stage.submit(methods=["arditi", "deccp"], trials=50)
    stage.wait_state(job_id, "completed")
    stage.check(job_id)
    with stage.sessions() as session:
        rows = trials.list_trials(session, job_id)
    assert [(row.method, row.origin) for row in rows] == [
        ("arditi", "selected"), ("deccp", "single_pass")
    ]  # fmt: skip
