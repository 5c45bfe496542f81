"""Bayesian optimisation of a front by its expected hypervolume, through BoTorch."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import RandomSampler
from optuna.search_space import intersection_search_space
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from worker.cube import Points, decode, encode

RESTARTS, RAW_SAMPLES, STEPS = 2, 64, 30  # of the optimisation of the expectation
FIT = {"options": {"maxiter": 40}}  # each process is fitted anew for each trial
DRAWS = 32  # from the posterior, of which the expectation is the mean
WORST = -1.0  # reference point of the hypervolume, a normal score: the worst sixth counts nothing


class Qnehvi(RandomSampler):
    """qLogNEHVI (Daulton et al., arXiv 2105.08195; Ament et al., arXiv 2310.20708).

    A Gaussian process for each objective, over the unit cube. Objectives are replaced by their
    normal scores, since a KL ranges over decades. Running trials are pending points. Every
    combination of categories is optimised by itself; integers are rounded.
    """

    def __init__(self, seed: int, startup: int, search: int) -> None:
        super().__init__(seed=seed)
        self._startup, self._seed = max(2, startup), seed

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """What finished trials have in common: all parameters."""
        return intersection_search_space(study.get_trials(deepcopy=False))

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The point from which most hypervolume is expected."""
        trials = study.get_trials(deepcopy=False)
        known = [each for each in trials if each.state == TrialState.COMPLETE]
        if len(known) < self._startup or not search_space:
            return {}
        # the trial that is being asked for runs as well, without parameters
        running = [each for each in trials if each.state == TrialState.RUNNING and each.params]
        points = np.array([encode(each.params, search_space) for each in known])
        pending = np.array([encode(each.params, search_space) for each in running])
        values = np.array([each.values for each in known])
        choices = combinations(search_space)
        return decode(most_expected(points, values, pending, choices, self._seed), search_space)


def most_expected(
    points: Points,
    values: Points,
    pending: Points,
    choices: list[dict[int, float]],
    seed: int,
) -> Points:
    """(d,): the point of the unit cube whose score is expected to add most hypervolume.

    points    (n, d) what was tried        values   (n, objectives) its scores, minimised
    pending   (m, d) what is being tried   choices  coordinates of which one set must hold
    """
    import torch
    from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
    from botorch.fit import fit_gpytorch_mll
    from botorch.models.gp_regression import SingleTaskGP
    from botorch.models.model_list_gp_regression import ModelListGP
    from botorch.optim.optimize import optimize_acqf_mixed
    from botorch.sampling.normal import SobolQMCNormalSampler
    from gpytorch.mlls import SumMarginalLogLikelihood

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fits that were tried again
        torch.manual_seed(seed)
        tried = torch.from_numpy(points)
        goals = -torch.special.ndtri(torch.from_numpy(shares(values)))
        models = [SingleTaskGP(tried, goal, outcome_transform=None) for goal in goals.split(1, 1)]
        model = ModelListGP(*models)
        fit_gpytorch_mll(SumMarginalLogLikelihood(model.likelihood, model), optimizer_kwargs=FIT)
        expected = qLogNoisyExpectedHypervolumeImprovement(
            model,
            ref_point=[WORST] * len(models),
            X_baseline=tried,
            X_pending=torch.from_numpy(pending) if len(pending) else None,
            sampler=SobolQMCNormalSampler(torch.Size([DRAWS]), seed=seed),
            prune_baseline=True,
        )
        found, _ = optimize_acqf_mixed(
            expected,
            bounds=torch.stack([torch.zeros_like(tried[0]), torch.ones_like(tried[0])]),
            q=1,
            num_restarts=RESTARTS,
            raw_samples=RAW_SAMPLES,
            fixed_features_list=choices,
            options={"maxiter": STEPS},
        )
    return np.asarray(found[0])


def combinations(table: dict[str, BaseDistribution]) -> list[dict[int, float]]:
    """Every combination of categories: coordinate → value. [{}] where there are none."""
    places = {
        place: np.linspace(0.0, 1.0, len(each.choices)).tolist()
        for place, each in enumerate(table.values())
        if isinstance(each, CategoricalDistribution)
    }
    return [
        dict(zip(places, chosen, strict=True)) for chosen in itertools.product(*places.values())
    ]


def shares(values: Points) -> Points:
    """The share of trials that are better, in each column, 0 < share < 1. Equal ones stay equal."""
    better = (values[:, None] > values[None]).mean(axis=1)
    equal = (values[:, None] == values[None]).mean(axis=1)
    return np.asarray(better + equal / 2)
