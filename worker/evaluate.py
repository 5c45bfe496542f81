"""The evaluate task: the front and the single pass again, on prompts nothing has been fitted to.

The best of 200 trials on the same 100 prompts is the least of 200 noisy numbers. Held-out prompts
were seen by neither the directions nor the search.
"""

from __future__ import annotations

from functools import partial

from sqlalchemy.orm import Session

from jobs import queue, trials
from jobs.spec.candidate import Candidate
from jobs.spec.protocol import Score, Scored, ScoredBatch
from jobs.spec.scores import Role
from jobs.tables import Trial
from worker.run import Run

SINGLE_PASS = 0
ROLES: tuple[Role, ...] = ("heldout", "over_refusal")  # columns of a trial, too


def evaluate(run: Run) -> None:
    """Re-score every front trial and trial 0 on held-out and over-refusal prompts.

    What has scores already is left out, so a restart does not repeat it.
    """
    prepared = run.prepare()
    chosen = run.lease.write(lambda session: _chosen(session, run))
    size = run.batch_size(prepared)
    todo: list[tuple[Role, list[Trial]]] = []
    for role in ROLES:
        missing = [trial for trial in chosen if getattr(trial, role) is None]
        if role in prepared.baseline:
            todo += [(role, missing[at : at + size]) for at in range(0, len(missing), size)]
    total = sum(len(batch) for _, batch in todo)
    done = 0
    for role, batch in todo:
        run.lease.check()
        run.progress("checking the front", done, total, role)
        candidates = [Candidate.model_validate(trial.candidate) for trial in batch]
        result = run.ask(Score(candidates=candidates, role=role), on_progress=lambda answer: None)
        for trial, scored in zip(
            batch, ScoredBatch.model_validate(result.value).scored, strict=True
        ):
            run.write(partial(_store, run, trial.number, role, scored))
        done += len(batch)
    run.progress("checking the front", total, total)


def _chosen(session: Session, run: Run) -> list[Trial]:
    front = trials.front(session, run.job.id)
    if all(trial.number != SINGLE_PASS for trial in front):
        front.append(trials.get(session, run.job.id, SINGLE_PASS))
    return front


def _store(run: Run, number: int, role: Role, scored: Scored, session: Session) -> None:
    trials.store_rescored(session, run.task, run.token, number, role, scored)
    # progress, as a finished trial is: engine deaths are counted from here again
    queue.fence(session, run.task.id, run.token).crashes = 0
