"""The samplers without a database: against stateful twins, formulas and random search."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, get_args

import numpy as np
import optuna
import pytest
from cmaes import CMA, get_warm_start_mgd
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import create_trial

from jobs.spec.job import SamplerName
from jobs.spec.methods import MethodName
from worker import samplers
from worker.bayes import combinations, shares
from worker.cube import decode, encode
from worker.evolution import BEST, POPULATION, Nsga3, complete, scalarised
from worker.problems import EngineError
from worker.samplers import STARTUP, check, sampler, startup, stream
from worker.space import space

NAMES: tuple[SamplerName, ...] = get_args(SamplerName)
CHEAP = [name for name in NAMES if name != "qnehvi"]
needs_botorch = pytest.mark.skipif(find_spec("botorch") is None, reason="needs BoTorch")
EACH = [*CHEAP, pytest.param("qnehvi", marks=[needs_botorch, pytest.mark.slow])]
SPACES: list[MethodName] = ["mpoa", "router", "ara"]
PLANE: dict[str, BaseDistribution] = {
    "x": FloatDistribution(-2.0, 3.0),
    "y": FloatDistribution(1e-3, 1e3, log=True),
    "kind": CategoricalDistribution(("good", "bad")),
}


def empty() -> optuna.Study:
    return optuna.create_study(directions=["minimize", "minimize"])


def two_valleys(params: dict[str, Any]) -> tuple[float, float]:
    """A front between x = 0 and x = 1, at y = 10; the other kind is worse everywhere."""
    off = (math.log10(params["y"]) - 1) ** 2 + (params["kind"] == "bad")
    return params["x"] ** 2 + off, (params["x"] - 1) ** 2 + off


def walk(
    name: SamplerName | None, trials: int, seed: int = 0, batch: int = 2, first: int = 8
) -> optuna.Study:
    """A search of `trials` trials, each with a new sampler; None: random."""
    study = empty()
    for begin in range(0, trials, batch):
        asked = []
        for number in range(begin, min(begin + batch, trials)):
            study.sampler = (
                optuna.samplers.RandomSampler(seed=stream(seed, number))
                if name is None
                else sampler(seed, first, number, name)
            )
            asked.append(study.ask(PLANE))
        for trial in asked:
            study.tell(trial, two_valleys(trial.params))
    return study


def covered(study: optuna.Study) -> float:
    """Area of the front under the reference (2, 2), by the definition: a sum over a fine grid."""
    values = np.array([trial.values for trial in complete(study)])
    grid = np.stack(np.meshgrid(*[np.linspace(0, 2, 201)] * 2), axis=-1)
    return float((values[:, None, None] <= grid).all(-1).any(0).mean())


@pytest.mark.parametrize("name", EACH)
def test_each_sampler_finds_more_than_chance(name: SamplerName) -> None:
    trials, seeds = {"qnehvi": (20, 1), "nsga3": (100, 8)}.get(name, (60, 4))
    found = [covered(walk(name, trials, seed)) for seed in range(seeds)]
    chance = [covered(walk(None, trials, seed)) for seed in range(10)]
    assert np.mean(found) > np.mean(chance) + 2 * np.std(chance) / math.sqrt(len(chance))


@pytest.mark.parametrize("name", EACH)
def test_what_is_asked_next_follows_from_the_trials_alone(name: SamplerName) -> None:
    """A study that somebody else made, without any attribute, leads to the same points."""
    study, again = walk(name, 14 if name == "qnehvi" else 28), empty()
    for trial in complete(study):
        params, values = trial.params, trial.values
        again.add_trial(create_trial(params=params, distributions=PLANE, values=values))
    for each in (study, again):
        each.sampler = sampler(0, 8, len(study.trials), name)
    assert study.ask(PLANE).params == again.ask(PLANE).params


@pytest.mark.parametrize("name", EACH)
def test_what_is_asked_at_once_differs(name: SamplerName) -> None:
    study, found = walk(name, 12), []
    for number in range(12, 16):
        study.sampler = sampler(0, 8, number, name)
        found.append(encode(study.ask(PLANE).params, PLANE).tolist())
    assert len(set(map(tuple, found))) == 4


@needs_botorch
def test_a_running_trial_is_not_asked_for_twice() -> None:
    """With the same seed and the same finished trials, only the pending point differs."""
    study = walk("tpe", 10)
    asked = []
    for _ in range(2):
        study.sampler = sampler(0, 8, 10, "qnehvi")
        asked.append(encode(study.ask(PLANE).params, PLANE))
    assert np.linalg.norm(asked[0] - asked[1]) > 0.02


def test_survivors_are_the_parents() -> None:
    """All values of children come from the best trials, but for one in three that mutates."""
    study = empty()
    rng = np.random.default_rng(0)
    for rank in range(2 * POPULATION):
        params = {"x": rng.uniform(-2, 3), "y": rng.uniform(1, 9), "kind": "good"}
        values = [float(rank), float(rank)]
        study.add_trial(create_trial(params=params, distributions=PLANE, values=values))
    inherited: list[int] = []
    for number in range(60):
        study.sampler = Nsga3(number, 2 * POPULATION, 7)
        child = study.ask(PLANE).params
        parents = [t.number for t in complete(study) if t.params["x"] == child["x"]]
        assert study.sampler.get_trial_generation(study, study.trials[-1]) == 1
        inherited += parents
    assert 25 <= len(inherited) < 60
    assert set(inherited) <= set(range(POPULATION))


@pytest.mark.parametrize(("done", "generation"), [(7, 0), (8, 1), (23, 1), (24, 2), (40, 3)])
def test_a_generation_is_the_next_so_many_trials(done: int, generation: int) -> None:
    study = walk(None, done)
    evolved = Nsga3(1, 8, 1)
    study.ask(PLANE)
    assert evolved.get_trial_generation(study, study.trials[-1]) == generation
    found = [evolved.get_population(study, each) for each in range(generation)]
    numbers = [trial.number for population in found for trial in population]
    assert numbers == list(range(8 + POPULATION * (generation - 1) if generation else 0))


def test_cma_es_is_that_of_one_object_that_is_told_each_generation() -> None:
    """Two equal objectives leave one order, whatever norm is used: a plain CMA-ES of that."""
    table: dict[str, BaseDistribution] = {name: FloatDistribution(0.0, 1.0) for name in "abcd"}
    study, first = empty(), 10

    def cost(point: Sequence[float]) -> float:
        return sum((each - 0.3) ** 2 * (1 + place) for place, each in enumerate(point))

    for number in range(first):
        study.sampler = sampler(3, first, number, "cmaes")
        trial = study.ask(table)
        study.tell(trial, [cost(list(trial.params.values()))] * 2)
    begun = [(encode(t.params, table), cost(list(t.params.values()))) for t in complete(study)]
    mean, sigma, cov = get_warm_start_mgd(begun, gamma=BEST)
    twin = CMA(mean, sigma, np.array([[0.0, 1.0]] * 4), cov=cov)
    for generation in range(5):
        told = []
        for place in range(twin.population_size):
            number = first + generation * twin.population_size + place
            study.sampler = sampler(3, first, number, "cmaes")
            trial = study.ask(table)
            twin.reseed_rng(stream(3, number))
            point = twin.ask()
            assert [trial.params[name] for name in sorted(table)] == pytest.approx(list(point))
            study.tell(trial, [cost(list(point))] * 2)
            told.append((point, cost(list(point))))
        twin.tell(told)
    assert cost(list(point)) < min(value for _, value in begun)


def test_the_norm_of_ranks() -> None:
    values = np.array([[0.0, 9.0], [1.0, 5.0], [2.0, 5.0], [3.0, 1.0]])
    ranks = np.array([[0, 3], [1, 1], [2, 1], [3, 0]]) / 4
    for turn, weights in enumerate(([2, 1], [1, 2], [2, 1])):
        expected = [max(weights * row) + 0.05 * sum(weights * row) for row in ranks]
        assert scalarised(values, turn) == pytest.approx(expected)


@pytest.mark.parametrize("method", SPACES)
@given(seed=st.integers(0, 1000), layers=st.integers(1, 80))
def test_points_of_the_cube_and_back(method: MethodName, seed: int, layers: int) -> None:
    table = space(layers, method)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    params = study.ask(table).params
    point = encode(params, table)
    assert ((point >= 0) & (point <= 1)).all()
    back = decode(point, table)
    for name, value in params.items():
        assert back[name] == (pytest.approx(value) if isinstance(value, float) else value)
        assert table[name]._contains(table[name].to_internal_repr(back[name])), name
    outside = [decode(np.full(len(table), unit), table) for unit in (-0.5, 1.5)]
    inside = [decode(np.full(len(table), unit), table) for unit in (0.0, 1.0)]
    assert outside == inside and outside[0] != outside[1]


def test_a_logarithmic_scale_is_one_in_the_cube() -> None:
    params = {"x": 0.5, "y": 1.0, "kind": "bad"}
    assert encode(params, PLANE) == pytest.approx([0.5, 0.5, 1.0])


def test_combinations_of_categories() -> None:
    assert combinations(PLANE) == [{2: 0.0}, {2: 1.0}]
    assert combinations(space(8, "ara")) == [{}]
    both = {"a": CategoricalDistribution("pqr"), "x": PLANE["x"], "kind": PLANE["kind"]}
    assert len(combinations(both)) == 6 and {0: 0.5, 2: 1.0} in combinations(both)


def test_shares_of_better_trials() -> None:
    found = shares(np.array([[3.0, 1.0], [1.0, 1.0], [2.0, 1.0], [4.0, 1.0]]))
    assert found.T.tolist() == [[0.625, 0.125, 0.375, 0.875], [0.5] * 4]


def test_a_few_trials_are_random() -> None:
    assert [startup(trials) for trials in (1, 10, 30, 200)] == [1, 3, 9, STARTUP]


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    check("tpe")
    monkeypatch.setattr(samplers, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match="qnehvi needs botorch") as caught:
        check("qnehvi")
    assert caught.value.reason == "missing_library"
    assert "nullspace[botorch]" in caught.value.mend and "tpe" in caught.value.mend
