"""Evolution: NSGA-III and CMA-ES, whose generations follow from the finished trials alone.

Optuna's own samplers keep generations in attributes of trials and study, which a point that is
stored in one transaction does not have. Here a generation is the next so many finished trials in
the order of their numbers, whoever asked for them.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import NSGAIIISampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from worker.cube import Points, decode, encode

POPULATION = 16  # of NSGA-III: 200 trials are a dozen generations
TRIES = 20  # for a child that is no copy
EMPHASIS = 2.0  # how much more the objective counts whose turn it is
AUGMENTED = 0.05  # weight of the sum beside the maximum, in the Chebyshev norm
BEST = 0.3  # share of the start from which CMA-ES takes its first distribution


class Nsga3(NSGAIIISampler):
    """NSGA-III (Deb and Jain 2014). The first `startup` trials are its first generation.

    Survivors are selected with the seed of the search, so that all children of a generation have
    the same parents, in whatever process they are made.
    """

    def __init__(self, seed: int, startup: int, search: int) -> None:
        super().__init__(population_size=POPULATION, seed=seed)
        self._startup, self._search = max(2, startup), search

    def get_trial_generation(self, study: Study, trial: FrozenTrial) -> int:
        """0 until `startup` trials are complete; then one more with every POPULATION trials."""
        beyond = len(complete(study)) - self._startup
        return 0 if beyond < 0 else 1 + beyond // POPULATION

    def get_population(self, study: Study, generation: int) -> list[FrozenTrial]:
        """The finished trials of a generation."""
        end = self._startup + generation * POPULATION
        return complete(study)[end - POPULATION if generation else 0 : end]

    def select_parent(self, study: Study, generation: int) -> list[FrozenTrial]:
        """The survivors among the generation before and its parents."""
        twin = Nsga3((self._search + generation) % 2**32, self._startup, self._search)
        chosen = NSGAIIISampler.select_parent(twin, study, generation)
        return sorted(chosen, key=lambda trial: trial.number)  # as they come from Optuna's cache

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """A child that is no copy of a trial, whose score would be known; {} in generation 0."""
        known = [each.params for each in study.get_trials(deepcopy=False) if each.params]
        for _ in range(TRIES):
            child = super().sample_relative(study, trial, search_space)
            if child not in known:
                break
        return child


class CmaEs(TPESampler):
    """CMA-ES (Hansen, arXiv 1604.00772) on a scalarisation that changes with the generation.

    CMA-ES minimises one number of real parameters. The number is an augmented Chebyshev norm of
    the objectives (`scalarised`), in which each objective in turn counts double: all trials of a
    generation are compared by one norm, those of the next by another. The first distribution comes
    from the best of the first `startup` trials (Nomura et al., arXiv 2012.06932), and is told every
    generation since; that costs milliseconds. Integers are rounded; categories, of which it has
    no notion, are drawn by an independent TPE.
    """

    def __init__(self, seed: int, startup: int, search: int) -> None:
        super().__init__(n_startup_trials=startup, multivariate=True, constant_liar=True, seed=seed)
        self._startup, self._seed, self._search = max(4, startup), seed, search

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """All parameters but categories."""
        table = super().infer_relative_search_space(study, trial)
        category = CategoricalDistribution
        return {name: each for name, each in table.items() if not isinstance(each, category)}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """A draw from the distribution to which the finished generations lead."""
        trials = complete(study)
        if len(trials) < self._startup or not search_space:
            return {}
        from cmaes import CMA, get_warm_start_mgd

        points = [encode(each.params, search_space) for each in trials]
        values = np.array([each.values for each in trials])
        start = zip(points, scalarised(values[: self._startup], 0), strict=False)
        mean, sigma, cov = get_warm_start_mgd(list(start), gamma=BEST)
        bounds = np.array([[0.0, 1.0]] * len(search_space))
        search = CMA(mean, sigma, bounds, seed=self._search, cov=cov)
        ends = range(self._startup, len(trials) + 1, search.population_size)
        for generation, (begin, end) in enumerate(pairwise(ends)):
            costs = scalarised(values[:end], generation)[begin:]
            search.tell(list(zip(points[begin:end], costs.tolist(), strict=True)))
        search.reseed_rng(self._seed)
        return decode(search.ask(), search_space)


def scalarised(values: Points, turn: int) -> Points:
    """(trials,): the augmented Chebyshev norm of each trial's ranks, the less the better.

    values: (trials, objectives), minimised. An objective's rank is the share of trials that are
    better: a KL ranges over decades, and an objective may have any unit. `turn` says which counts
    double.
    """
    ranks = (values[:, None] > values[None]).mean(axis=1)
    weights = np.ones(values.shape[1])
    weights[turn % len(weights)] = EMPHASIS
    weighed = ranks * weights
    return np.asarray(weighed.max(axis=1) + AUGMENTED * weighed.sum(axis=1))


def complete(study: Study) -> list[FrozenTrial]:
    """The finished trials in the order of their numbers."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
