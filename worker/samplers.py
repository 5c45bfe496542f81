"""Which sampler proposes the points of a search: from the job's word to an Optuna sampler.

Each ask makes a new sampler, because each trial has a random stream of its own. So all that a
sampler knows of a search is its finished and its running trials: no generation and no distribution
is kept anywhere. A search goes on after a crash as if nothing had happened, several workers share
it, and points that no sampler asked for (the plain one, those of earlier jobs) count as any other.
Which one when, and what was measured: docs/search.md.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable
from importlib.util import find_spec

from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, TPESampler

from jobs.spec.job import SamplerName
from worker.bayes import Qnehvi
from worker.evolution import CmaEs, Nsga3
from worker.problems import EngineError

STARTUP = 10  # random trials first, and at most this share of all; docs/search.md has the figures
STARTUP_SHARE = 0.3
EI_CANDIDATES = 128

# sampler → what it needs besides Optuna: a package, and the extra of Nullspace that brings it
NEEDS: dict[SamplerName, tuple[str, str]] = {
    "cmaes": ("cmaes", "worker"),
    "qnehvi": ("botorch", "botorch"),
}

warnings.simplefilter("ignore", ExperimentalWarning)  # Optuna's NSGA-III, since version 3.2


def sampler(seed: int, first: int, number: int, name: SamplerName = "tpe") -> BaseSampler:
    """The sampler for a method's own trial `number`; random until `first` trials are complete.

    The same seed and number give the same random stream, whatever is compared with the method.
    """
    return SAMPLERS[name](stream(seed, number), first, stream(seed))


def startup(trials: int) -> int:
    """How many of a search's trials are random when its owner does not say."""
    return min(STARTUP, math.ceil(STARTUP_SHARE * trials))


def stream(*place: int) -> int:
    """A random seed, 32 bits, for a place: a search by its seed, a trial in it by its number."""
    digest = hashlib.sha256("/".join(map(str, place)).encode()).digest()
    return int.from_bytes(digest[:4], "big")


def check(name: SamplerName) -> None:
    """EngineError, of reason `missing_library`, where a package is missing that the sampler needs.

    Only the worker that runs the search can know it.
    """
    package, extra = NEEDS.get(name, ("optuna", "worker"))
    if find_spec(package) is None:
        raise EngineError(
            "missing_library",
            f"sampler: {name} needs {package}, which this worker does not have",
            f"Install nullspace[{extra}] on the workers and resume the job, or submit it with "
            "sampler tpe.",
        )


def tpe(seed: int, first: int, search: int) -> TPESampler:
    """Tree-structured Parzen estimators of all parameters together (Watanabe, arXiv 2304.11127).

    Running trials count as bad ones (`constant_liar`), so that what is asked at once differs.
    """
    return TPESampler(
        n_startup_trials=first,
        n_ei_candidates=EI_CANDIDATES,
        multivariate=True,
        constant_liar=True,
        seed=seed,
    )


# (seed of the trial, random trials first, seed of the search) → sampler
SAMPLERS: dict[SamplerName, Callable[[int, int, int], BaseSampler]] = {
    "tpe": tpe,
    "nsga3": Nsga3,
    "cmaes": CmaEs,
    "qnehvi": Qnehvi,
}
