"""Trials: the plot's points, one trial with what the model said, the front, picks."""

from __future__ import annotations

import datetime as dt
import uuid
from typing import Annotated, Any, cast

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel, Field
from sqlalchemy.orm import Session

from api.auth import Reader, Writer
from api.bodies import Body
from api.problems import errors
from api.routes.jobs import MISSING, NOT_YOURS
from jobs import analysis, comparison, control, screening, trials, warm
from jobs.analysis import LayerWeight
from jobs.comparison import MethodReport
from jobs.listing import RoleScores
from jobs.spec.job import JobSpec
from jobs.spec.methods import MethodName
from jobs.spec.protocol import PromptTexts
from jobs.spec.scores import Role
from jobs.states import TrialState
from jobs.tables import Job, Trial
from jobs.trial_scores import search_scores
from jobs.warm import Source

router = APIRouter(tags=["trials"])
Number = Annotated[int, Path(ge=0, lt=2**31, description="the trial's number, from 0")]
NO_TRIAL = "No such job, or another member's private one, or no such trial."


class TrialView(BaseModel):
    """One scored (or running) candidate."""

    number: int
    state: TrialState
    method: MethodName
    origin: str = Field(description="single_pass, selected, plain, warm_start or sampler")
    warm_start: Source | None = Field(description="of a warm start: the trial that it is from")
    picked: bool
    on_front: bool
    screened: bool = Field(
        description="not decoded to the end, since a finished trial is better whatever this one "
        "answers; `search` counts its first answers, of which there may be none"
    )
    params: dict[str, Any] = Field(description="what the sampler chose")
    candidate: dict[str, Any] = Field(description="the edit: enough to make it again")
    search: RoleScores | None = None
    heldout: RoleScores | None = None
    over_refusal: RoleScores | None = None
    seconds: float | None
    created_at: dt.datetime
    finished_at: dt.datetime | None


class TrialPage(BaseModel):
    """Trials by number."""

    items: list[TrialView]
    next: int | None = Field(None, description="`after` of the next page; null on the last")


class MethodPage(BaseModel):
    """The methods of a job, in the order of its specification."""

    items: list[MethodReport]


class Answer(BaseModel):
    """What edited and original model said to one prompt. Texts end where the decision was made."""

    prompt: str
    refused: bool
    text: str
    tokens: int
    original_refused: bool | None = None
    original_text: str | None = None


class TrialDetail(TrialView):
    """A trial with its answers per role, next to the original model's."""

    screened_by: int | None = Field(description="the finished trial for which it was not decoded")
    responses: dict[Role, list[Answer]]
    weights: list[LayerWeight] = Field(
        description="edit strength λ of each layer; empty where the edit has none, or none yet"
    )


class Pick(Body):
    """Whether the trial is picked. Files of picks are kept."""

    picked: bool = True


def view(job: Job, row: Trial, front: frozenset[int]) -> TrialView:
    """A row of the job's table `trials` as the API shows it."""
    return TrialView(
        number=row.number,
        state=row.state,
        method=cast(MethodName, row.method),
        origin=row.origin,
        warm_start=warm.source(job, row),
        picked=row.picked,
        on_front=row.number in front,
        screened=row.screened,
        params=row.params,
        candidate=row.candidate,
        search=RoleScores.of(search_scores(row)),
        heldout=RoleScores.of(row.heldout),
        over_refusal=RoleScores.of(row.over_refusal),
        seconds=row.seconds,
        created_at=row.created_at,
        finished_at=row.finished_at,
    )


@router.get("/jobs/{job_id}/trials", responses=errors({404: MISSING}))
def list_trials(
    who: Reader,
    job_id: uuid.UUID,
    after: Annotated[int | None, Query(ge=-1, lt=2**31, description="number to go on from")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> TrialPage:
    """The job's trials by number."""
    with who.begin() as session:
        job = control.visible(session, who.user, job_id)
        rows = trials.list_trials(session, job_id, limit=limit + 1, after=after)
        front = frozenset(row.number for row in trials.front(session, job_id))
    page = rows[:limit]
    following = page[-1].number if len(rows) > limit else None
    return TrialPage(items=[view(job, row, front) for row in page], next=following)


@router.get("/jobs/{job_id}/front", responses=errors({404: MISSING}))
def show_front(who: Reader, job_id: uuid.UUID) -> TrialPage:
    """The Pareto-optimal trials: no other is as good in every objective and better in one."""
    with who.begin() as session:
        job = control.visible(session, who.user, job_id)
        rows = trials.front(session, job_id)
    front = frozenset(row.number for row in rows)
    return TrialPage(items=[view(job, row, front) for row in rows], next=None)


@router.get("/jobs/{job_id}/methods", responses=errors({404: MISSING}))
def show_methods(who: Reader, job_id: uuid.UUID) -> MethodPage:
    """The job's methods side by side: front, hypervolume, best pick and time of each."""
    with who.begin() as session:
        job = control.visible(session, who.user, job_id)
        return MethodPage(items=comparison.compare(session, job))


@router.get("/jobs/{job_id}/trials/{number}", responses=errors({404: NO_TRIAL}))
def show_trial(who: Reader, job_id: uuid.UUID, number: Number) -> TrialDetail:
    """One trial: parameters, scores, and what the model said, next to the original's answers."""
    with who.begin() as session:
        job = control.visible(session, who.user, job_id)
        row = trials.get(session, job_id, number)
        front = frozenset(each.number for each in trials.front(session, job_id))
        weights = analysis.weights(job, row)
        responses = answers_of(session, job, number)
        better = screening.dominator(session, row, JobSpec.model_validate(job.spec).objectives)
    return TrialDetail(
        **view(job, row, front).model_dump(),
        screened_by=better.number if better is not None else None,
        responses=responses,
        weights=weights,
    )


def answers_of(session: Session, job: Job, number: int) -> dict[Role, list[Answer]]:
    """What a trial's model (or `trials.MODEL`) said by role, next to the original.

    Prompts that a screened trial was not asked are left out.
    """
    said = trials.responses(session, job.id, number)
    original = trials.responses(session, job.id, trials.ORIGINAL)
    prompts = {role: prompts_of(job, role) for role in said}
    responses: dict[Role, list[Answer]] = {}
    for role, outcomes in said.items():
        before = original.get(role, [])
        responses[role] = [
            Answer(
                prompt=prompts[role][place] if place < len(prompts[role]) else "",
                refused=outcome.refused,
                text=outcome.text,
                tokens=outcome.tokens,
                original_refused=before[place].refused if place < len(before) else None,
                original_text=before[place].text if place < len(before) else None,
            )
            for place, outcome in enumerate(outcomes)
            if outcome.answered
        ]
    return responses


def prompts_of(job: Job, role: Role) -> list[str]:
    """The prompts whose answers are kept for `role`, in the order of the answers."""
    texts = PromptTexts.model_validate(job.prompts)
    by_role: dict[Role, list[str]] = {
        "search": texts.search_harmful,
        "heldout": texts.heldout_harmful,
        "over_refusal": texts.over_refusal,
    }
    return by_role[role]


@router.post(
    "/jobs/{job_id}/trials/{number}/pick",
    responses=errors(
        {403: NOT_YOURS, 404: NO_TRIAL, 409: "The trial has no scores yet, or is screened."}
    ),
)
def pick_trial(
    who: Writer, job_id: uuid.UUID, number: Number, pick: Pick | None = None
) -> TrialView:
    """Pick a trial, or take the pick back with `{"picked": false}`."""
    wanted = pick or Pick()
    with who.begin() as session:
        job = control.editable(session, who.user, job_id)
        row = control.pick(session, who.user, job, number, wanted.picked)
        front = frozenset(each.number for each in trials.front(session, job_id))
        session.refresh(row)
    who.doorbell.nudge(job_id)
    return view(job, row, front)
