"""What a candidate would score, told from recorded trials: a Gaussian process (kriging).

    python -m bench.surrogate bench/trials.jsonl    # how well it tells a fifth that it has not seen

The demo model's scores change smoothly with the strengths that a candidate has on each layer, so
636 trials tell those of others. A search on this model costs seconds instead of minutes; what it
finds is a claim about the samplers, to be confirmed on the engine. `bench/trials.jsonl`: searches
by TPE on 4 seeds and a scrambled Sobol sequence, method mpoa, bfloat16.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize

from jobs.spec.candidate import Ablation, Candidate
from jobs.spec.protocol import Scored
from jobs.spec.scores import Scores
from worker.space import candidate_from

Array = NDArray[np.float64]
LAYERS = 8  # of the demo model
PROMPTS = 100  # of the search
FITTED = 250  # trials to which the length scales are fitted
LEAST_KL = 1e-5
NO_INDEX = 0.6  # where a candidate has a direction per layer, as a share of the depth


class Recorded(BaseModel):
    """A scored trial: a point of the space of mpoa, refusals of PROMPTS, first-token KL."""

    params: dict[str, Any]
    refusals: int
    kl: float


def recorded(file: Path) -> list[Recorded]:
    """The trials in a file of JSON lines."""
    return [Recorded.model_validate_json(line) for line in file.read_text("utf-8").splitlines()]


class Surrogate:
    """Scores candidates of the demo model without it."""

    def __init__(self, trials: Sequence[Recorded]) -> None:
        candidates = [candidate_from(trial.params, LAYERS, "mpoa") for trial in trials]
        points = np.array([features(candidate) for candidate in candidates])
        refused = np.array([trial.refusals for trial in trials])
        kls = np.array([trial.kl for trial in trials])
        self._refusals = Process(points, logit(refused))
        self._kl = Process(points, np.log(np.maximum(kls, LEAST_KL)))

    def __call__(self, candidate: Candidate) -> Scored:
        """Refusals, a whole number, and first-token KL."""
        point = features(candidate)
        share = 1 / (1 + math.exp(-self._refusals(point)))
        refusals = min(PROMPTS, max(0, round(share * (PROMPTS + 1) - 0.5)))
        kl = math.exp(self._kl(point))
        scores = Scores(role="search", refusals=refusals, total=PROMPTS, kl_first=kl)
        return Scored(scores=scores, outcomes=[])


class Process:
    """Kriging with a Matérn-5/2 kernel, one length scale per coordinate, of greatest likelihood.

    points (n, d), values (n,). Rasmussen and Williams 2006, chapters 2 and 5.
    """

    def __init__(self, points: Array, values: Array) -> None:
        self._points, self._mean, self._scale = points, values.mean(), values.std()
        wanted = (values - self._mean) / self._scale
        part = np.random.default_rng(0).permutation(len(points))[:FITTED]

        def unlikely(logs: Array) -> float:
            factor = cho_factor(covariance(points[part], logs), lower=True)
            fit = 0.5 * wanted[part] @ cho_solve(factor, wanted[part])
            prior = 0.02 * float(((logs[:-2] - math.log(2)) ** 2).sum())  # no scale runs away
            return float(fit + np.log(np.diag(factor[0])).sum() + prior)

        start = np.r_[np.full(points.shape[1], math.log(2)), 0.0, math.log(0.01)]
        self._logs = minimize(unlikely, start, method="L-BFGS-B", options={"maxiter": 15}).x
        factor = cho_factor(covariance(points, self._logs), lower=True)
        self._weights = np.exp(self._logs[-2]) * cho_solve(factor, wanted)

    def __call__(self, point: Array) -> float:
        """The expected value at one point (d,)."""
        near = kernel(point[None], self._points, np.exp(self._logs[:-2]))[0]
        return float(near @ self._weights * self._scale + self._mean)


def covariance(points: Array, logs: Array) -> Array:
    """(n, n). logs: of the length scales (d,), of the amplitude, of the noise."""
    noise = (np.exp(logs[-1]) + 1e-6) * np.eye(len(points))
    return np.asarray(np.exp(logs[-2]) * kernel(points, points, np.exp(logs[:-2])) + noise)


def kernel(a: Array, b: Array, scales: Array) -> Array:
    """Matérn 5/2 between rows of a (n, d) and b (m, d): (n, m)."""
    a, b = a / scales, b / scales
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
    s = np.sqrt(5 * np.maximum(squares, 1e-12))
    return np.asarray((1 + s + s * s / 3) * np.exp(-s))


def features(candidate: Candidate) -> Array:
    """Strength on each layer of both components, whether one direction serves all, and which."""
    assert isinstance(candidate, Ablation)
    strengths = [
        each.weight(layer)
        for each in (candidate.attention, candidate.mlp)
        for layer in range(LAYERS)
    ]
    depth = NO_INDEX if candidate.index is None else candidate.index / (LAYERS - 1)
    return np.array([*strengths, float(candidate.scope == "global"), depth])


def logit(refusals: NDArray[np.int64]) -> Array:
    """Log-odds of refusals of PROMPTS, finite at both ends."""
    share = (refusals + 0.5) / (PROMPTS + 1)
    return np.asarray(np.log(share / (1 - share)))


def main() -> None:
    """Fit to four fifths and tell the last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    trials = recorded(parser.parse_args().file)
    order = np.random.default_rng(0).permutation(len(trials))
    fifth = len(trials) // 5
    told = Surrogate([trials[at] for at in order[fifth:]])
    seen = [trials[at] for at in order[:fifth]]
    found = [told(candidate_from(each.params, LAYERS, "mpoa")).scores for each in seen]
    off = np.mean([abs(a.refusals - b.refusals) for a, b in zip(found, seen, strict=True)])
    true = np.log([each.kl for each in seen])
    rest = np.log([each.kl_first or LEAST_KL for each in found]) - true
    print(f"{fifth} trials that it has not seen: refusals {off:.1f} of {PROMPTS} off on average, "
          f"R² of log KL {1 - rest.var() / true.var():.4f}")  # fmt: skip


if __name__ == "__main__":
    main()
