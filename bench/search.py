"""One search on the demo model, in one process: what `fronts` and `methods` have in common."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler

from demo import MODEL, prompt_file
from demo.dataset import read_jsonl
from engine.heap import return_blocks
from engine.libraries import settle
from engine.report import Silent
from engine.session import Session
from jobs.fronts import hypervolume, pareto
from jobs.spec.candidate import Candidate
from jobs.spec.job import SamplerName
from jobs.spec.memory import AHEAD, LANES
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
from worker.samplers import sampler, startup
from worker.space import candidate_from, first, plain, plain_number, space

WINDOW = AHEAD * LANES["cpu"]  # candidates that a worker on a CPU has in hand
Limit = Callable[[Candidate], Candidate]

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
    """Prepare the demo model as an engine does, on the CPU or the GPU that is there."""
    settle()
    return_blocks()
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
        found = steps(partial(scored, session), layers, method, trials, seed, limit)
        done = [(step.candidate, step.scored) for step in found]
    points = [_point(result) for _, result in done]
    best = min(pareto(points), key=lambda index: points[index])
    pick, search = done[best]
    heldout = scored(session, pick, "heldout")
    seconds = time.process_time() - began
    return Found(hypervolume(points), pick, search, heldout, len(done), seconds)


def study_of(trials: int, seed: int) -> optuna.Study:
    """An empty study of refusals and divergence, sampled as a job's are."""
    return optuna.create_study(
        directions=["minimize", "minimize"], sampler=sampler(seed, startup(trials), 0)
    )


def point(
    study: optuna.Study, own: BaseSampler, number: int, layers: int, method: MethodName
) -> tuple[Candidate, optuna.Trial | None]:
    """What a job scores as its trial `number`: single pass, plain point, then the sampler's."""
    if number < plain_number(method):
        return first(layers, method), None
    if number == plain_number(method):
        study.enqueue_trial(plain(layers, method))
    study.sampler = own
    trial = study.ask(space(layers, method))
    return candidate_from(trial.params, layers, method), trial


def drawn(layers: int, trials: int, seed: int = 0) -> list[Candidate]:
    """The candidates of a search that learns nothing: all after the first are drawn at random."""
    study = study_of(trials, seed)
    return [point(study, sampler(seed, trials, n), n, layers, "mpoa")[0] for n in range(trials)]


@dataclass(frozen=True)
class Step:
    """One trial of a search, with the processor seconds of asking for it and of scoring it."""

    candidate: Candidate
    scored: Scored
    sampling: float
    scoring: float

    @property
    def point(self) -> tuple[float, float]:
        """(refusal rate, KL)."""
        return _point(self.scored)


def steps(
    score: Callable[[Candidate], Scored],
    layers: int,
    method: MethodName,
    trials: int,
    seed: int,
    limit: Limit = lambda one: one,
    name: SamplerName = "tpe",
    ahead: int = 1,
    random: int | None = None,
) -> Iterator[Step]:
    """The trials of a search as a job's are: single pass and plain point, then the sampler's.

    `ahead` are in hand: the next is asked for when the first of them has been scored; `random`
    says how many are so.
    """
    study = study_of(trials, seed)
    begin = startup(trials) if random is None else random
    hand: deque[tuple[Candidate, optuna.Trial | None, float]] = deque()
    begun = 0

    def ask(number: int) -> tuple[Candidate, optuna.Trial | None, float]:
        began = time.process_time()
        candidate, trial = point(study, sampler(seed, begin, number, name), number, layers, method)
        return limit(candidate), trial, time.process_time() - began

    while hand or begun < trials:
        while len(hand) < ahead and begun < trials:
            hand.append(ask(begun))
            begun += 1
        candidate, told, sampling = hand.popleft()
        began = time.process_time()
        result = score(candidate)
        if told is not None:
            prompts = len(result.outcomes) or result.scores.total
            study.tell(told, [_point(result)[0] * prompts, _point(result)[1]])
        yield Step(candidate, result, sampling, time.process_time() - began)


def _point(result: Scored) -> tuple[float, float]:
    """Of a screened one the worst rate, as a job's sampler is told: it is on no front."""
    rate = 1.0 if result.screened else result.scores.refusals / result.scores.total
    return rate, float(result.scores.kl_first or 0)


def count(result: Scored) -> str:
    """`3/100 (1.0–8.5 %)`: refusals with their 95 % interval."""
    scores = result.scores
    low, high = wilson(scores.refusals, scores.total)
    return f"{scores.refusals}/{scores.total} ({100 * low:.1f}–{100 * high:.1f} %)"


def shown(result: Scored) -> str:
    """`3/100 (1.0–8.5 %), KL 0.0012`."""
    return f"{count(result)}, KL {result.scores.kl_first:.2g}"
