"""The space and the study: against ENGINE.md's table, and on a real PostgreSQL."""

from __future__ import annotations

import datetime as dt
import math
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import optuna
import pytest
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from sqlalchemy import create_engine, inspect, text

from jobs.database import bounded, normal_url
from jobs.spec.job import JobSpec
from jobs.tables import Trial
from worker.space import candidate_from, plain, space
from worker.study import JobStudy, open_storage, sampler

SPEC = JobSpec.model_validate({"model": "demo", "trials": 30})
BOTH = SPEC.model_copy(update={"modes": ["full", "columns"]})


@pytest.fixture
def storage(database_url: str) -> Iterator[RDBStorage]:
    made = open_storage(database_url, 30.0)
    yield made
    made.engine.dispose()


@pytest.mark.parametrize("layers", [1, 2, 8, 80])
@pytest.mark.parametrize("spec", [SPEC, BOTH])
def test_every_point_of_the_space_is_a_candidate_within_the_table(
    layers: int, spec: JobSpec
) -> None:
    last = layers - 1
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    for _ in range(60):
        params = study.ask(space(layers, spec)).params
        made = candidate_from(params, layers, spec)
        assert made.mode in spec.modes
        assert (made.index is None) == (made.scope == "per_layer")
        if made.index is not None:
            assert 0.4 * last - 1e-9 <= made.index <= 0.9 * last + 1e-9
        assert 0.8 <= made.attention.max_weight <= 1.5
        assert 0.0 <= made.mlp.max_weight <= 1.5
        for kernel in (made.attention, made.mlp):
            assert 0 <= kernel.min_weight <= kernel.max_weight
            assert 0.6 * last - 1e-9 <= kernel.position <= last + 1e-9
            assert 1 <= kernel.distance <= max(1, 0.6 * last)


def test_mlp_can_switch_itself_off() -> None:
    params = {**plain(8, SPEC), "mlp.max_weight": -0.2}
    made = candidate_from(params, 8, SPEC)
    assert [made.mlp.weight(layer) for layer in range(8)] == [0.0] * 8


@pytest.mark.parametrize("layers", [1, 2, 3, 8, 31, 80])
def test_the_plain_edit_is_in_the_space_and_is_one_everywhere(layers: int) -> None:
    params, table = plain(layers, BOTH), space(layers, BOTH)
    assert params.keys() == table.keys()
    for name, distribution in table.items():
        assert distribution._contains(distribution.to_internal_repr(params[name])), name
    made = candidate_from(params, layers, BOTH)
    assert [made.attention.weight(layer) for layer in range(layers)] == [1.0] * layers
    assert [made.mlp.weight(layer) for layer in range(layers)] == [1.0] * layers


def test_startup_trials() -> None:
    assert sampler(SPEC, 200, 0)._n_startup_trials == 60
    few = SPEC.model_copy(update={"startup_trials": 5})
    assert sampler(few, 200, 0)._n_startup_trials == 5


def _walk(storage: RDBStorage, job_id: object, numbers: range) -> list[dict[str, object]]:
    study = JobStudy(storage, job_id, SPEC, 8, 30)
    asked = []
    for number in numbers:
        params, optuna_number = study.ask(number)
        asked.append(params)
        study.tell(number, params, optuna_number, (float(number % 5), 1.0 / (number + 1)))
    return asked


def test_the_same_seed_asks_the_same_points_also_after_a_restart(storage: RDBStorage) -> None:
    """Random points first, then TPE: 12 of 30 trials are past the start-up."""
    whole = _walk(storage, "a", range(1, 16))
    assert whole == _walk(storage, "b", range(1, 8)) + _walk(storage, "b", range(8, 16))


def test_optuna_lives_in_its_own_schema(storage: RDBStorage, database_url: str) -> None:
    _walk(storage, "c", range(1, 3))
    engine = create_engine(normal_url(database_url))
    tables = inspect(engine).get_table_names(schema="optuna")
    assert "studies" in tables and "trials" in tables
    assert "studies" not in inspect(engine).get_table_names(schema="public")
    engine.dispose()


def test_many_processes_may_make_the_tables_at_once(database_url: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        storages = list(pool.map(lambda _: open_storage(database_url, 30.0), range(4)))
    for made in storages:
        made.engine.dispose()


def _row(number: int, state: str, params: dict[str, object], optuna_number: int | None) -> Trial:
    return Trial(
        job_id=uuid.uuid4(), number=number, state=state, params=params, candidate={},
        optuna_number=optuna_number, refusals=number, total=10, kl_first=0.5,
    )  # fmt: skip


def test_what_a_crash_left_is_mended(storage: RDBStorage) -> None:
    study = JobStudy(storage, "d", SPEC, 8, 30)
    raw = study._study
    told, told_number = study.ask(2)
    study.tell(2, told, told_number, (2.0, 0.5))
    committed, committed_number = study.ask(3)  # crash between our commit and tell
    running, running_number = study.ask(4)  # a slot that will be scored again
    _, stray_number = study.ask(5)  # crash between ask and begin, long ago
    _, young_number = study.ask(6)  # another worker, between ask and begin
    failed, failed_number = study.ask(7)  # closed in Optuna, complete in our table
    raw.tell(failed_number or 0, state=TrialState.FAIL)
    _age(storage, stray_number)
    rows = [
        _row(0, "complete", {}, None),  # the single pass is no point of the space
        _row(1, "complete", plain(8, SPEC), None),  # never asked for
        _row(2, "complete", told, told_number),
        _row(3, "complete", committed, committed_number),
        _row(4, "running", running, running_number),
        _row(7, "complete", failed, failed_number),
    ]
    for _ in range(2):  # the second time there is nothing left to do
        study.mend(rows, lease_seconds=30)
        states = {trial.number: trial.state for trial in raw.get_trials(deepcopy=False)}
        assert states[told_number or 0] == TrialState.COMPLETE
        assert states[committed_number or 0] == TrialState.COMPLETE
        assert states[running_number or 0] == TrialState.RUNNING
        assert states[stray_number or 0] == TrialState.FAIL
        assert states[young_number or 0] == TrialState.RUNNING
        complete = [t.values for t in raw.get_trials(states=[TrialState.COMPLETE])]
        assert sorted(complete) == [[1.0, 0.5], [2.0, 0.5], [3.0, 0.5], [7.0, 0.5]]


def _age(storage: RDBStorage, optuna_number: int | None) -> None:
    hour_ago = dt.datetime.now() - dt.timedelta(hours=1)
    with storage.engine.begin() as connection:
        connection.execute(
            text("UPDATE trials SET datetime_start = :then WHERE number = :number"),
            {"then": hour_ago, "number": optuna_number},
        )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_is_not_finite_is_no_point_for_the_sampler(
    storage: RDBStorage, value: float
) -> None:
    study = JobStudy(storage, f"e{value}", SPEC, 8, 30)
    params, number = study.ask(2)
    study.tell(2, params, number, (3.0, value))
    [trial] = study._study.get_trials()
    assert trial.state == TrialState.FAIL


def test_an_idle_transaction_is_ended_by_the_server(database_url: str) -> None:
    engine = create_engine(bounded(database_url, 1.5, "optuna"))
    with engine.connect() as connection:
        limit = connection.execute(text("SHOW idle_in_transaction_session_timeout")).scalar_one()
        path = connection.execute(text("SHOW search_path")).scalar_one()
    assert (limit, path) == ("1500ms", "optuna")
    engine.dispose()
