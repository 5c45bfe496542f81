"""The evaluate task: fronts and single passes again, on prompts nothing has been fitted to.

The best of 200 trials on the same 100 prompts is the least of 200 noisy numbers. Held-out prompts
were seen by neither the directions nor the search. Then, where the job asks for them, the dear
scores: a judge of every answer, and harness tasks on the best trial of each method.

What has a score already is left out, so that a restart repeats nothing.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from sqlalchemy.orm import Session

from jobs import comparison, trials
from jobs.spec.candidate import parse
from jobs.tables import Job
from worker import sides
from worker.benchmark import measure
from worker.judging import judge
from worker.rescoring import rescore
from worker.run import Run


def evaluate(run: Run) -> None:
    """Score what fronts and comparisons show; or what a job without a search asks for."""
    if run.spec.kind != "abliterate":
        (sides.evaluate if run.spec.kind == "evaluate" else sides.benchmark)(run)
        return
    prepared = run.prepare()
    chosen = run.lease.write(lambda session: trials.to_check(session, run.job.id))
    rescore(run, prepared, chosen, "checking the front")
    if "harness" in run.spec.scorers:
        _benchmark(run)
    if "judge" in run.spec.scorers:
        judge(run, [trials.ORIGINAL, *(trial.number for trial in chosen)])


def _benchmark(run: Run) -> None:
    """Harness tasks on the original and on the best trial of each method."""
    for number, candidate in run.lease.write(partial(_best, run)):
        edit = None if candidate is None else parse(candidate)
        measure(run, number, edit, run.spec.tasks, run.spec.task_limit)


def _best(run: Run, session: Session) -> list[tuple[int, dict[str, Any] | None]]:
    """The original and the best trials, with their candidates."""
    job = session.get_one(Job, run.job.id)
    numbers = [report.best.number for report in comparison.compare(session, job) if report.best]
    return [
        (trials.ORIGINAL, None),
        *((each, trials.get(session, job.id, each).candidate) for each in dict.fromkeys(numbers)),
    ]
