"""The evaluate task of a job that searches nothing: its model as it is, and beside an original.

What is kept already is left out, so that a restart repeats nothing: scores of both sides come
first, then harness tasks one by one, then a judge's verdicts.
"""

from __future__ import annotations

from functools import partial

from sqlalchemy.orm import Session

from jobs import models, results, trials
from jobs.results import NUMBERS
from jobs.spec import scorers
from jobs.spec.protocol import Compare, Compared, Prepared, Scored
from jobs.spec.scores import Role
from jobs.tables import Job
from jobs.trials import Side
from worker.benchmark import measure, unmeasured
from worker.judging import judge
from worker.run import Run


def evaluate(run: Run) -> None:
    """Score the model, and compare it with the original where there is one."""
    known = run.lease.write(lambda session: results.of(session.get_one(Job, run.job.id)))
    if not known.model:
        _score(run)
    benchmark(run)
    if "judge" in run.spec.scorers:
        judge(run, [NUMBERS[side] for side in results.sides(run.spec)])


def benchmark(run: Run) -> None:
    """Run the job's harness tasks on each side."""
    for side in results.sides(run.spec):
        number, tasks, limit = NUMBERS[side], run.spec.tasks, run.spec.task_limit
        if unmeasured(run, number, tasks, limit):
            _load(run, side)
            measure(run, number, None, tasks, limit)


def _score(run: Run) -> None:
    prepared = run.prepare()
    first = _baseline(prepared)
    if run.spec.original is None:
        run.write(partial(_store, run, {"model": first}, Compared(scored={})))
        return
    path = models.local_path(run.spec.model, run.station.settings)
    names = scorers.of_engine((), run.spec.scorers)
    if "judge" in run.spec.scorers:
        names.append("judge")  # it reads whole answers
    request = Compare(
        model=run.spec.model,
        revision=run.job.commit or run.spec.revision,
        path=None if path is None else str(path),
        roles=list(prepared.baseline),
        scorers=names,
    )
    compared = Compared.model_validate(run.ask(request).value)
    run.write(partial(_store, run, {"original": first, "model": compared.scored}, compared))


def _baseline(prepared: Prepared) -> dict[Role, Scored]:
    """What `prepare` measured of the model that it loaded."""
    return {
        role: Scored(scores=scores, outcomes=prepared.baseline_outcomes.get(role, []))
        for role, scores in prepared.baseline.items()
    }


def _store(
    run: Run, found: dict[Side, dict[Role, Scored]], compared: Compared, session: Session
) -> None:
    results.store(session, run.task, run.token, found, compared.commit, compared.warnings)


def _load(run: Run, side: Side) -> None:
    """An engine with this side's model; the one that scored it will do."""
    if run.spec.kind == "evaluate" and run.station.is_ready(run.request_for(side, "evaluate")):
        return
    prepared = run.prepare_for(run.request_for(side, "respond"))
    if run.spec.kind == "benchmark" and side == "model" and run.job.prepared is None:
        run.write(lambda session: trials.store_baseline(session, run.task, run.token, prepared))
