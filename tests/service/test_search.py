"""The spaces and the studies: against ENGINE.md's table, and on a real PostgreSQL."""

from __future__ import annotations

import datetime as dt
import math
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from sqlalchemy import create_engine, inspect, text

from jobs.database import bounded, normal_url
from jobs.spec.candidate import Ablation, Ara
from jobs.spec.job import JobSpec, SamplerName
from jobs.spec.methods import METHODS, MethodName, recipes, share, turn
from jobs.tables import Trial
from worker.problems import EngineError
from worker.space import RANK, candidate_from, first, plain, plain_number, space
from worker.study import MethodStudy, Values, open_storage, startup_trials

SPEC = JobSpec.model_validate({"model": "demo", "trials": 30})
THREE = SPEC.model_copy(update={"objectives": ["log_odds", "kl_first", "kl_multi"]})
ABLATIONS: list[MethodName] = [name for name in METHODS if METHODS[name].kind == "ablation"]
SEARCHED: list[MethodName] = [*ABLATIONS, "ara"]


def study_of(
    storage: RDBStorage,
    job_id: object,
    spec: JobSpec = SPEC,
    method: MethodName = "mpoa",
    budget: int = 30,
) -> MethodStudy:
    if method not in spec.methods:
        spec = spec.model_copy(update={"methods": [method]})
    return MethodStudy(storage, job_id, spec, method, 8, budget)


@pytest.fixture
def storage(database_url: str) -> Iterator[RDBStorage]:
    made = open_storage(database_url, 30.0)
    yield made
    made.engine.dispose()


@pytest.mark.parametrize("layers", [1, 2, 8, 80])
@pytest.mark.parametrize("method", ABLATIONS)
def test_every_point_of_the_space_is_a_candidate_within_the_table(
    layers: int, method: MethodName
) -> None:
    last = layers - 1
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    for _ in range(30):
        params = study.ask(space(layers, method)).params
        made = candidate_from(params, layers, method)
        assert isinstance(made, Ablation)
        row = METHODS[method]
        assert (made.mode, made.recipe, made.affine) == (row.mode, row.recipe, row.affine)
        assert (made.router is not None) == row.router
        if made.router is not None:
            assert 1 <= made.router.experts <= 8 and 0.01 <= made.router.bias <= 10
        assert (made.index is None) == (made.scope == "per_layer")
        if made.index is not None:
            assert 0.4 * last - 1e-9 <= made.index <= 0.9 * last + 1e-9
        assert 0.8 <= made.attention.max_weight <= 1.5
        assert 0.0 <= made.mlp.max_weight <= 1.5
        for kernel in (made.attention, made.mlp):
            assert 0 <= kernel.min_weight <= kernel.max_weight
            assert 0.6 * last - 1e-9 <= kernel.position <= last + 1e-9
            assert 1 <= kernel.distance <= max(1, 0.6 * last)


@pytest.mark.parametrize("layers", [1, 2, 3, 8, 31])
def test_the_space_of_ara(layers: int) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    found = []
    for _ in range(200):
        params = study.ask(space(layers, "ara")).params
        made = candidate_from(params, layers, "ara")
        assert isinstance(made, Ara) and made.rank == RANK
        found.append(made)
    assert {made.start for made in found} == set(range(layers // 2 + 1))
    ends = {made.end for made in found}
    assert max(ends) == layers and min(ends) >= layers / 2
    assert all(made.start < made.end for made in found), "an empty range would edit nothing"
    assert {made.neighbours for made in found} == set(range(1, 16))
    assert all(0 <= made.preserve <= 1 and 0 <= made.overshoot <= 1.3 for made in found)
    assert all(1e-4 <= made.steer <= 1 for made in found)
    # log scale: half of the points lie below the geometric mean of the ends
    assert 70 <= sum(made.steer < 0.01 for made in found) <= 130


def test_fixed_methods_have_no_space() -> None:
    with pytest.raises(ValueError, match="deccp"):
        space(8, "deccp")
    edit = first(11, "deccp")
    assert (edit.mode, edit.recipe.projection, edit.scope) == ("none", "none", "global")
    assert edit.index == 6.0 and edit.attention.weight(0) == edit.mlp.weight(10) == 1.0
    assert first(11, "svd").recipe.count == 3
    assert first(11, "router").router and first(11, "mpoa").router is None


def test_mlp_can_switch_itself_off() -> None:
    params = {**plain(8, "mpoa"), "mlp.max_weight": -0.2}
    made = candidate_from(params, 8, "mpoa")
    assert isinstance(made, Ablation)
    assert [made.mlp.weight(layer) for layer in range(8)] == [0.0] * 8


@pytest.mark.parametrize("method", SEARCHED)
@pytest.mark.parametrize("layers", [1, 2, 3, 8, 31, 80])
def test_the_plain_point_is_in_the_space_and_is_everywhere(layers: int, method: MethodName) -> None:
    params, table = plain(layers, method), space(layers, method)
    assert params.keys() == table.keys()
    for name, distribution in table.items():
        assert distribution._contains(distribution.to_internal_repr(params[name])), name
    made = candidate_from(params, layers, method)
    if isinstance(made, Ara):
        assert (made.start, made.end) == (0, layers)
    else:
        assert [made.attention.weight(layer) for layer in range(layers)] == [1.0] * layers
        assert [made.mlp.weight(layer) for layer in range(layers)] == [1.0] * layers


def test_startup_trials() -> None:
    assert [startup_trials(SPEC, budget, "mpoa") for budget in (20, 200)] == [6, 10]
    few = SPEC.model_copy(update={"startup_trials": 5})
    assert startup_trials(few, 200, "mpoa") == 5
    pair = few.model_copy(update={"methods": ["mpoa", "ara", "deccp"]})
    assert startup_trials(pair, 201, "mpoa") == startup_trials(pair, 201, "ara") == 3


@given(
    st.lists(st.sampled_from(sorted(METHODS)), min_size=1, max_size=6, unique=True),
    st.integers(0, 40),
)
def test_shares_are_what_turns_give(methods: list[MethodName], trials: int) -> None:
    searched = [name for name in methods if METHODS[name].kind != "fixed"]
    if not searched:
        trials = min(trials, len(methods))
    given = [turn(methods, number) for number in range(trials)]
    for name in methods:
        own = [place for method, place in given if method == name]
        assert own == list(range(share(methods, trials, name)))


def test_recipes_are_each_measured_once() -> None:
    assert recipes(["mpoa", "mpoa_columns", "affine", "ara"]) == [METHODS["mpoa"].recipe]
    found = recipes(["deccp", "arditi"])
    assert [recipe.position for recipe in found] == [-1, -2, -3, -4, -5]
    assert {recipe.projection for recipe in found} == {"none"}


def _walk(
    storage: RDBStorage,
    job_id: object,
    numbers: range,
    method: MethodName = "mpoa",
    spec: JobSpec = SPEC,
) -> list[dict[str, object]]:
    study = study_of(storage, job_id, spec, method)
    asked = []
    for number in numbers:
        params, optuna_number = study.ask(number)
        asked.append(params)
        values: Values = (float(number % 5), 1.0 / (number + 1), 0.5)[: len(spec.objectives)]
        study.tell(number, params, optuna_number, values)
    return asked


@pytest.mark.parametrize(("method", "spec"), [("mpoa", SPEC), ("ara", SPEC), ("svd", THREE)])
def test_the_same_seed_asks_the_same_points_also_after_a_restart(
    storage: RDBStorage, method: MethodName, spec: JobSpec
) -> None:
    """Random points first, then TPE: several of the trials are past the start-up."""
    whole = _walk(storage, "a", range(1, 16), method, spec)
    parts = (range(1, 8), range(8, 16))
    assert whole == [each for part in parts for each in _walk(storage, "b", part, method, spec)]


@pytest.mark.parametrize("name", ["tpe", "nsga3", "cmaes"])
def test_a_search_goes_on_in_other_hands(storage: RDBStorage, name: SamplerName) -> None:
    """Two workers in turn, of whom one begins anew all the time, ask for what one alone would.

    30 trials are several generations of either kind of evolution.
    """
    spec = SPEC.model_copy(update={"sampler": name})
    alone = _walk(storage, f"one-{name}", range(1, 30), spec=spec)
    steady = study_of(storage, f"two-{name}", spec)
    shared = []
    for number in range(1, 30):
        worker = steady if number % 2 else study_of(storage, f"two-{name}", spec)
        params, optuna_number = worker.ask(number)
        worker.tell(number, params, optuna_number, (float(number % 5), 1.0 / (number + 1)))
        shared.append(params)
    assert shared == alone
    assert len({tuple(params.values()) for params in shared}) == 29


def test_a_sampler_without_its_package_fails_before_the_search(
    storage: RDBStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.samplers.find_spec", lambda name: None)
    with pytest.raises(EngineError, match="botorch") as caught:
        study_of(storage, "none", SPEC.model_copy(update={"sampler": "qnehvi"}))
    assert caught.value.facts()["reason"] == "missing_library" and caught.value.mend
    assert "job-none-mpoa" not in optuna.get_all_study_names(storage)


def test_methods_have_studies_of_their_own(storage: RDBStorage) -> None:
    """What is compared beside a method does not change its points."""
    pair = SPEC.model_copy(update={"methods": ["mpoa", "ara"]})
    alone = _walk(storage, "x", range(2, 7))
    both = [study_of(storage, "y", pair, name, budget=60) for name in pair.methods]
    found = []
    for number in range(2, 7):
        for place, study in enumerate(both):
            params, optuna_number = study.ask(number)
            assert study.space.keys() == params.keys()
            study.tell(2 * number + place, params, optuna_number, (float(number % 5), 0.1))
            if place == 0:
                found.append(params)
    assert found == alone
    assert [len(study._study.get_trials()) for study in both] == [5, 5]


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


def _row(
    number: int,
    state: str,
    params: dict[str, object],
    optuna_number: int | None,
    method: MethodName = "mpoa",
) -> Trial:
    return Trial(
        job_id=uuid.uuid4(), number=number, method=method, state=state, params=params,
        candidate={}, optuna_number=optuna_number, refusals=number, total=10, kl_first=0.5,
    )  # fmt: skip


def test_what_a_crash_left_is_mended(storage: RDBStorage) -> None:
    study = study_of(storage, "d")
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
        _row(1, "complete", plain(8, "mpoa"), None),  # never asked for
        _row(2, "complete", told, told_number),
        _row(3, "complete", committed, committed_number),
        _row(4, "running", running, running_number),
        _row(7, "complete", failed, failed_number),
        _row(8, "complete", plain(8, "ara"), None, "ara"),  # another study's
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
    study = study_of(storage, f"e{value}")
    params, number = study.ask(2)
    study.tell(2, params, number, (3.0, value))
    [trial] = study._study.get_trials()
    assert trial.state == TrialState.FAIL


def test_the_plain_point_is_asked_for_once(storage: RDBStorage) -> None:
    for method in SEARCHED:
        study = study_of(storage, f"p-{method}", method=method)
        number = plain_number(method)
        assert study.ask(number) == (plain(8, method), None)
        study.tell(number, plain(8, method), None, (1.0, 0.5))
        study.tell(number, plain(8, method), None, (1.0, 0.5))
        assert [trial.values for trial in study._study.get_trials()] == [[1.0, 0.5]]


def test_workers_that_mend_at_once_add_a_score_once(database_url: str) -> None:
    """One tells what it has just written, while others that have come find it missing."""
    storages = [open_storage(database_url, 30.0) for _ in range(4)]
    studies = [study_of(storage, "m") for storage in storages]
    rows = [_row(number, "complete", plain(8, "mpoa"), None) for number in range(1, 4)]
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(study.mend, rows, 30.0) for study in studies]:
            done.result(60)
    assert sorted(trial.values for trial in studies[0]._study.get_trials()) == [
        [1.0, 0.5], [2.0, 0.5], [3.0, 0.5]
    ]  # fmt: skip
    for storage in storages:
        storage.engine.dispose()


def test_an_idle_transaction_is_ended_by_the_server(database_url: str) -> None:
    engine = create_engine(bounded(database_url, 1.5, "optuna"))
    with engine.connect() as connection:
        limit = connection.execute(text("SHOW idle_in_transaction_session_timeout")).scalar_one()
        path = connection.execute(text("SHOW search_path")).scalar_one()
    assert (limit, path) == ("1500ms", "optuna")
    engine.dispose()
