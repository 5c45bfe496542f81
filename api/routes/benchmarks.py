"""Harness tasks on a trial, and the answers of a job that searches nothing."""

from __future__ import annotations

import datetime as dt
import uuid
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, Field

from api.auth import Reader, Writer
from api.bodies import Body
from api.problems import errors
from api.routes.jobs import MISSING, NOT_YOURS
from api.routes.trials import NO_TRIAL, Answer, Number, answers_of
from jobs import benchmarks, control, queue, trials
from jobs.spec.scores import Role
from jobs.states import TaskState
from jobs.tables import Task

router = APIRouter(tags=["trials"])


class BenchmarkRequest(Body):
    """Which harness tasks to run."""

    tasks: Annotated[list[str], Field(min_length=1, max_length=50)]
    limit: int | None = Field(None, ge=1, le=100_000, description="samples per task; null: all")


class BenchmarkView(BaseModel):
    """A benchmark of a trial. Its figures are `heldout.values` of the trial, `harness.<task>.…`."""

    id: uuid.UUID
    trial: int
    tasks: list[str]
    limit: int | None
    state: TaskState
    error: dict[str, Any] | None
    created_at: dt.datetime
    finished_at: dt.datetime | None


class BenchmarkPage(BaseModel):
    """The benchmarks of a trial, oldest first."""

    items: list[BenchmarkView]


class AnswerPage(BaseModel):
    """What the job's model said by role, next to the original where there is one."""

    responses: dict[Role, list[Answer]]


def view(task: Task) -> BenchmarkView:
    """A row of the table `tasks` as the API shows it."""
    return BenchmarkView(
        id=task.id,
        trial=task.payload["number"],
        tasks=task.payload["tasks"],
        limit=task.payload["limit"],
        state=task.state,
        error=task.error,
        created_at=task.created_at,
        finished_at=task.finished_at,
    )


@router.post(
    "/jobs/{job_id}/trials/{number}/benchmarks",
    status_code=202,
    responses=errors(
        {
            403: NOT_YOURS,
            404: NO_TRIAL,
            409: "The trial is not complete.",
            422: "A task's name or the limit.",
            429: "Too many benchmarks of this job wait.",
        }
    ),
)
def request_benchmark(
    who: Writer, job_id: uuid.UUID, number: Number, wanted: BenchmarkRequest
) -> BenchmarkView:
    """Run harness tasks on a trial, and on the original where its figures are not known."""
    with who.begin() as session:
        job = control.editable(session, who.user, job_id)
        task = benchmarks.request(session, who.user, job, number, wanted.tasks, wanted.limit)
        tasks = queue.claimable_of(session, job_id)
        found = view(task)
    who.doorbell.ring(tasks)
    who.doorbell.nudge(job_id)
    return found


@router.get("/jobs/{job_id}/trials/{number}/benchmarks", responses=errors({404: NO_TRIAL}))
def list_benchmarks(who: Reader, job_id: uuid.UUID, number: Number) -> BenchmarkPage:
    """The benchmarks that were asked for of a trial."""
    with who.begin() as session:
        control.visible(session, who.user, job_id)
        trials.get(session, job_id, number)
        found = benchmarks.of_job(session, job_id, number)
    return BenchmarkPage(items=[view(task) for task in found])


@router.post(
    "/jobs/{job_id}/benchmarks/{task_id}/stop",
    responses=errors({403: NOT_YOURS, 404: "No such job or benchmark."}),
)
def stop_benchmark(who: Writer, job_id: uuid.UUID, task_id: uuid.UUID) -> BenchmarkView:
    """Call a benchmark off. What it has measured stays."""
    with who.begin() as session:
        job = control.editable(session, who.user, job_id)
        found = view(benchmarks.stop(session, who.user, job, task_id))
    who.doorbell.nudge(job_id)
    return found


@router.get("/jobs/{job_id}/answers", tags=["jobs"], responses=errors({404: MISSING}))
def show_answers(who: Reader, job_id: uuid.UUID) -> AnswerPage:
    """The answers of a job of kind `evaluate`; empty for the other kinds."""
    with who.begin() as session:
        job = control.visible(session, who.user, job_id)
        return AnswerPage(responses=answers_of(session, job, trials.MODEL))
