"""What jobs that search nothing have found: a model's scores beside those of its original."""

from __future__ import annotations

import math
from collections.abc import Iterable

from pydantic import BaseModel, Field
from sqlalchemy.orm import Session

from jobs import events, queue, trials
from jobs.spec.job import JobSpec
from jobs.spec.protocol import Scored
from jobs.spec.scores import Role, Scores, Value
from jobs.tables import Job, Task
from jobs.trial_scores import further
from jobs.trials import Side

NUMBERS: dict[Side, int] = {side: number for number, side in trials.SIDES.items()}


class Result(BaseModel):
    """Scores by role and harness figures (`<task>.<metric>`) by side; what was not asked is empty.

    `commit` is the model's, where it was loaded beside an original.
    """

    original: dict[Role, Scores] = {}
    model: dict[Role, Scores] = {}
    benchmark: dict[Side, dict[str, Value]] = {}
    commit: str | None = None
    warnings: list[str] = Field([], description="what the reader of the figures must know")

    def scores(self, side: Side) -> dict[Role, Scores]:
        """The scores of one side."""
        return self.original if side == "original" else self.model


def sides(spec: JobSpec) -> list[Side]:
    """What a job looks at, in the order in which it does."""
    return ["model"] if spec.original is None else ["original", "model"]


def of(job: Job) -> Result:
    """What is known so far."""
    return Result.model_validate(job.result or {})


def store(
    session: Session,
    task: Task,
    token: int,
    found: dict[Side, dict[Role, Scored]],
    commit: str | None = None,
    warnings: Iterable[str] = (),
) -> None:
    """Keep scores and answers of both sides, and tell the live views. Fenced."""
    held = queue.fence(session, task.id, token)
    job = session.get_one(Job, held.job_id, populate_existing=True)
    result = of(job)
    for side, by_role in found.items():
        for role, scored in by_role.items():
            result.scores(side)[role] = _finite(scored.scores)
            trials.store_outcomes(session, job.id, NUMBERS[side], role, scored.outcomes)
    result.commit = commit
    result.warnings = list(warnings)
    _write(session, held, job, result)
    told = {
        side: scores["search"].model_dump(mode="json")
        for side in NUMBERS
        if "search" in (scores := result.scores(side))
    }
    events.append(session, job.id, "job", {"state": job.state, "result": told})


def store_figures(
    session: Session, task: Task, token: int, number: int, found: dict[str, Value]
) -> None:
    """Add harness figures of one side. Fenced."""
    held = queue.fence(session, task.id, token)
    job = session.get_one(Job, held.job_id, populate_existing=True)
    result = of(job)
    side = trials.SIDES[number]
    known = {name: value for name, value in found.items() if math.isfinite(value.value)}
    result.benchmark.setdefault(side, {}).update(known)
    _write(session, held, job, result)


def _finite(scores: Scores) -> Scores:
    return Scores.model_validate({**scores.model_dump(), "values": further(scores)})


def _write(session: Session, held: Task, job: Job, result: Result) -> None:
    job.result = result.model_dump(mode="json")
    held.crashes = 0  # progress: engine deaths are counted from here again
    session.flush()
