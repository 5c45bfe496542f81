"""One search on the demo model, in one process: what `fronts` and `methods` have in common."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import TPESampler

from demo import MODEL, prompt_file
from demo.dataset import read_jsonl
from engine.report import Silent
from engine.session import Session
from jobs.fronts import hypervolume, pareto
from jobs.spec.candidate import Candidate
from jobs.spec.methods import METHODS, MethodName
from jobs.spec.protocol import (
    Prepare,
    Prepared,
    PromptTexts,
    Score,
    Scored,
    ScoredBatch,
    Select,
    Selected,
)
from jobs.spec.scores import wilson
from worker.space import candidate_from, first, plain, plain_number, space

Limit = Callable[[Candidate], Candidate]
STARTUP = 0.3  # share of the trials that are random
EI_CANDIDATES = 128

optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True)
class Found:
    """One search: its front's hypervolume, its pick with both scores, and its processor seconds.

    Processor time is what other work on the machine changes least; with one thread it is the
    duration on a quiet machine.
    """

    hypervolume: float
    pick: Candidate
    search: Scored
    heldout: Scored
    trials: int
    seconds: float


def texts() -> PromptTexts:
    """The demo's prompts by role."""
    rows = {name: read_jsonl(prompt_file(name)) for name in ("refused", "answered")}
    sides = {"harmful": "refused", "harmless": "answered"}
    return PromptTexts.model_validate(
        {
            f"{split}_{side}": [row["prompt"] for row in rows[name] if row["split"] == split]
            for side, name in sides.items()
            for split in ("direction", "search", "heldout")
        }
    )


def prepare(session: Session, **more: Any) -> Prepared:
    """Prepare the demo model, on the CPU or the GPU that is there."""
    fields = {"model": "demo", "path": str(Path(MODEL)), "prompts": texts(), "max_new_tokens": 48}
    prepared = session.handle(Prepare.model_validate(fields | more), Silent())
    assert isinstance(prepared, Prepared)
    return prepared


def scored(session: Session, candidate: Candidate, role: str = "search") -> Scored:
    """Scores of one candidate on one role."""
    asked = Score.model_validate({"op": "score", "candidates": [candidate], "role": role})
    result = session.handle(asked, Silent())
    assert isinstance(result, ScoredBatch)
    return result.scored[0]


def find(
    session: Session, method: MethodName, trials: int, seed: int, limit: Limit = lambda one: one
) -> Found:
    """One search of `trials` trials, one candidate at a time; one trial of a fixed method.

    `limit` changes each candidate before it is scored, so that only a part of what it edits is
    edited. The pick has the fewest refusals of search prompts, and among those the least KL.
    """
    began = time.process_time()
    layers = session.ready.anatomy.layers
    done: list[tuple[Candidate, Scored]] = []
    if METHODS[method].kind == "fixed":
        chosen: Candidate = first(layers, method)
        if method == "arditi":
            selected = session.handle(Select(), Silent())
            assert isinstance(selected, Selected)
            chosen = selected.candidate
        done.append((chosen, scored(session, chosen)))
    else:
        done = _searched(session, method, layers, trials, seed, limit)
    points = [_point(result) for _, result in done]
    best = min(pareto(points), key=lambda index: points[index])
    pick, search = done[best]
    heldout = scored(session, pick, "heldout")
    seconds = time.process_time() - began
    return Found(hypervolume(points), pick, search, heldout, len(done), seconds)


def study_of(trials: int, seed: int) -> optuna.Study:
    """An empty study of refusals and divergence, sampled as a job's are."""
    return optuna.create_study(
        directions=["minimize", "minimize"],
        sampler=TPESampler(
            n_startup_trials=int(STARTUP * trials),
            n_ei_candidates=EI_CANDIDATES,
            multivariate=True,
            seed=seed,
        ),
    )


def _searched(
    session: Session, method: MethodName, layers: int, trials: int, seed: int, limit: Limit
) -> list[tuple[Candidate, Scored]]:
    """Single pass and plain point first, as in a job; then TPE."""
    study = study_of(trials, seed)
    table, done = space(layers, method), list[tuple[Candidate, Scored]]()
    for number in range(trials):
        if number < plain_number(method):
            candidate: Candidate = limit(first(layers, method))
            done.append((candidate, scored(session, candidate)))
            continue
        if number == plain_number(method):
            study.enqueue_trial(plain(layers, method))
        trial = study.ask(table)
        candidate = limit(candidate_from(trial.params, layers, method))
        result = scored(session, candidate)
        study.tell(trial, [float(result.scores.refusals), _point(result)[1]])
        done.append((candidate, result))
    return done


def _point(result: Scored) -> tuple[float, float]:
    return result.scores.refusals / result.scores.total, float(result.scores.kl_first or 0)


def count(result: Scored) -> str:
    """`3/100 (1.0–8.5 %)`: refusals with their 95 % interval."""
    scores = result.scores
    low, high = wilson(scores.refusals, scores.total)
    return f"{scores.refusals}/{scores.total} ({100 * low:.1f}–{100 * high:.1f} %)"


def shown(result: Scored) -> str:
    """`3/100 (1.0–8.5 %), KL 0.0012`."""
    return f"{count(result)}, KL {result.scores.kl_first:.2g}"
