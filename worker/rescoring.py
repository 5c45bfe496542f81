"""Trials again, on prompts that neither the directions nor the search have seen."""

from __future__ import annotations

from functools import partial

from sqlalchemy.orm import Session

from jobs import queue, trials
from jobs.spec import scorers
from jobs.spec.candidate import parse
from jobs.spec.protocol import Prepared, Score, Scored, ScoredBatch
from jobs.spec.scores import Role
from jobs.tables import Trial
from worker.run import Run

ROLES: tuple[Role, ...] = ("heldout", "over_refusal")  # columns of a trial, too


def rescore(run: Run, prepared: Prepared, chosen: list[Trial], phase: str) -> None:
    """Score the trials on ROLES, where that has not been done."""
    names = scorers.of_engine(run.spec.objectives, run.spec.scorers)
    if "judge" in run.spec.scorers:
        names.append("judge")  # it reads whole answers
    size = run.batch_size()
    todo: list[tuple[Role, list[Trial]]] = []
    for role in ROLES:
        missing = [trial for trial in chosen if getattr(trial, role) is None]
        if role in prepared.baseline:
            todo += [(role, missing[at : at + size]) for at in range(0, len(missing), size)]
    total, done = sum(len(batch) for _, batch in todo), 0
    for role, batch in todo:
        run.lease.check()
        run.progress(phase, done, total, role)
        candidates = [parse(trial.candidate) for trial in batch]
        result = run.ask(
            Score(candidates=candidates, role=role, scorers=names), on_progress=lambda answer: None
        )
        for trial, scored in zip(
            batch, ScoredBatch.model_validate(result.value).scored, strict=True
        ):
            run.write(partial(_store, run, trial.number, role, scored))
        done += len(batch)
    run.progress(phase, total, total)


def _store(run: Run, number: int, role: Role, scored: Scored, session: Session) -> None:
    trials.store_rescored(session, run.task, run.token, number, role, scored)
    # progress, as a finished trial is: engine deaths are counted from here again
    queue.fence(session, run.task.id, run.token).crashes = 0
