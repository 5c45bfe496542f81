"""The page of one trial: what it is, what it scores, what it says; picking, exporting, trying."""

from __future__ import annotations

import uuid
from typing import Any, cast

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, RedirectResponse
from sqlalchemy.orm import Session
from starlette.responses import Response

from jobs import artifacts, benchmarks, chats, control, events, live, screening, trials, warm
from jobs.drawing import kernel
from jobs.problems import Invalid, Problem, Unauthenticated
from jobs.spec.candidate import Ablation, parse
from jobs.spec.job import JobSpec
from jobs.spec.methods import METHODS, MethodName
from jobs.states import ArtifactKind
from jobs.tables import Job, Task, Trial, User
from web.forms import Fields, text_of
from web.render import page
from web.routes.actions import Act, change
from web.routes.job import NOTICES
from web.session import Visit, visit
from web.views import artifacts as artifact_views
from web.views import edits, results, scores
from web.views import trials as views

router = APIRouter()
ANSWER_TOKENS = 200


@router.get("/jobs/{job_id}/trials/{number}")
def show_trial(
    request: Request,
    job_id: uuid.UUID,
    number: int,
    role: str = "",
    only: str = "",
    page: int = 1,
    done: str = "",
    still: bool = False,
) -> HTMLResponse:
    """Parameters, scores and answers of one trial."""
    return trial_page(
        request, job_id, number, role=role, only=only, at=page, notice=NOTICES.get(done, ""),
        still=still,
    )  # fmt: skip


@router.get("/jobs/{job_id}/trials/{number}/live")
def show_live_part(request: Request, job_id: uuid.UUID, number: int) -> HTMLResponse:
    """What changes on a trial's page: artifacts and answers to tried prompts."""
    return trial_page(request, job_id, number, template="trial_live.html")


def trial_page(
    request: Request,
    job_id: uuid.UUID,
    number: int,
    *,
    template: str = "trial.html",
    role: str = "",
    only: str = "",
    at: int = 1,
    notice: str = "",
    still: bool = False,
    problem: Problem | None = None,
    prompt: str = "",
) -> HTMLResponse:
    """The trial's page; `problem` is what went wrong with the form that was posted from it."""
    with visit(request) as here:
        job = control.visible(here.session, here.user, job_id)
        row = _row(here.session, job, number)
        context = _context(here, job, row, role, only == "refused", at)
    return page(
        request,
        template,
        here.user,
        status=problem.status if problem else 200,
        notice=notice,
        still=still,
        problem=problem,
        prompt=prompt,
        only="refused" if only == "refused" else "",
        base_url=here.settings.public_url.rstrip("/"),
        **context,
    )


def _row(session: Session, job: Job, number: int) -> Trial:
    # A number beyond PostgreSQL's bigint is as absent as any other.
    return trials.get(session, job.id, number if 0 <= number < 2**31 else -2)


def _context(
    here: Visit, job: Job, row: Trial, role: str, only_refused: bool, at: int
) -> dict[str, Any]:
    session = here.session
    candidate = parse(row.candidate) if row.candidate else None
    ablation = candidate if isinstance(candidate, Ablation) else None
    prepared = job.prepared or {}
    layers = int((prepared.get("anatomy") or {}).get("layers") or 0)
    said = trials.responses(session, job.id, row.number)
    roles = [each for each in scores.ROLES if each in said]
    chosen = next((each for each in roles if each == role), next(iter(roles), None))
    original = trials.responses(session, job.id, trials.ORIGINAL)
    front = frozenset(trial.number for trial in trials.front(session, job.id))
    made = [a for a in artifacts.list_for_job(session, job.id) if a.trial_number == row.number]
    tasks = live.tasks(session, job.id)
    waiting = [task for task in tasks if _waits(task, row.number)]
    asked = benchmarks.of_job(session, job.id, row.number)
    objectives = JobSpec.model_validate(job.spec).objectives
    better = screening.dominator(session, row, objectives)
    return {
        "job": job,
        "line": views.line(job.id, row, front),
        "row": row,
        "source": warm.source(job, row),
        "reason": views.reason(row, better, objectives),
        "better": better.number if better is not None else None,
        "facts": edits.parameter_facts(candidate) if candidate else [],
        "method": METHODS[cast(MethodName, row.method)],
        "strength": candidate is None or ablation is not None,
        "kernel": kernel.plot(ablation, layers) if ablation and layers else None,
        "weights": kernel.weights(ablation, layers) if ablation and layers else [],
        "comparisons": [
            each
            for each in scores.compare(prepared.get("baseline"), row)
            if each.edited or not row.screened  # which is not going to be measured on others
        ],
        "roles": [(each, scores.ROLES[each], len(said[each])) for each in roles],
        "answers": views.answers(
            chosen,
            views.prompts_of(job.prompts, chosen),
            original.get(chosen, []),
            said[chosen],
            only_refused=only_refused,
            page=at,
        )
        if chosen
        else None,
        "artifacts": [artifact_views.view(artifact) for artifact in made],
        "chats": _chats(session, job, row.number),
        "waiting": [prompt for task in waiting for prompt in task.payload.get("prompts", [])],
        "benchmarks": asked[::-1],
        "figures": results.of_trial(prepared.get("baseline"), row),
        "live": bool(waiting)
        or any(a.state in ("queued", "running") for a in made)
        or any(task.state in ("ready", "running") for task in asked),
        "may_edit": control.may_edit(here.user, job),
        "kinds": {kind: artifact_views.EXPLAINED[kind] for kind in artifacts.kinds(row.candidate)},
        "default_rank": artifacts.DEFAULT_RANK,
    }


def _waits(task: Task, number: int) -> bool:
    return (
        task.kind == "chat"
        and task.state in ("ready", "running")
        and task.payload.get("number") == number
    )


def _chats(session: Session, job: Job, number: int) -> list[dict[str, Any]]:
    """Answers to tried prompts, newest first."""
    recent = events.since(session, job.id, max(0, job.event_seq - 2000), limit=2000)
    return [
        answer
        for event in reversed(recent)
        if event.kind == "chat" and event.payload.get("number") == number
        for answer in event.payload.get("answers", [])
    ][:10]


def changed(
    request: Request, job_id: uuid.UUID, number: int, act: Act, done: str, prompt: str = ""
) -> Response:
    """`act` on the job, then the trial's page: with a notice, or with what was wrong."""
    try:
        change(request, job_id, act)
    except Unauthenticated:
        raise
    except Problem as problem:
        if problem.status == 404:
            raise
        return trial_page(request, job_id, number, problem=problem, prompt=prompt)
    target = {
        "exported": "#artifacts", "asked": "#try", "benchmarked": "#benchmarks",
        "stopped": "#benchmarks",
    }.get(done, "")  # fmt: skip
    return RedirectResponse(f"/jobs/{job_id}/trials/{number}?done={done}{target}", status_code=303)


@router.post("/jobs/{job_id}/trials/{number}/pick")
def pick(request: Request, job_id: uuid.UUID, number: int, fields: Fields) -> Response:
    """Pick the trial, or take that back."""
    wanted = text_of(fields, "picked") != "no"

    def act(session: Session, user: User, job: Job) -> None:
        _row(session, job, number)
        control.pick(session, user, job, number, wanted)

    return changed(request, job_id, number, act, "picked" if wanted else "unpicked")


@router.post("/jobs/{job_id}/trials/{number}/artifacts")
def export(request: Request, job_id: uuid.UUID, number: int, fields: Fields) -> Response:
    """Ask for files of the trial."""
    kind, rank = text_of(fields, "kind"), text_of(fields, "rank").strip()

    def act(session: Session, user: User, job: Job) -> None:
        _row(session, job, number)
        if rank and kind == "lora" and not (rank.isascii() and rank.isdigit() and len(rank) < 6):
            raise Invalid("A rank is a whole number from 1 to 1024.", field="rank")
        artifacts.request(
            session, user, job, number, cast(ArtifactKind, kind),
            int(rank) if rank and kind == "lora" else None,
        )  # fmt: skip

    return changed(request, job_id, number, act, "exported")


@router.post("/jobs/{job_id}/trials/{number}/chat")
def ask(request: Request, job_id: uuid.UUID, number: int, fields: Fields) -> Response:
    """Let the trial's model answer a prompt."""
    prompt = text_of(fields, "prompt").replace("\r\n", "\n")

    def act(session: Session, user: User, job: Job) -> None:
        _row(session, job, number)
        chats.request(session, user, job, prompt, number=number, max_new_tokens=ANSWER_TOKENS)

    return changed(request, job_id, number, act, "asked", prompt)


@router.post("/jobs/{job_id}/trials/{number}/benchmarks")
def benchmark(request: Request, job_id: uuid.UUID, number: int, fields: Fields) -> Response:
    """Run harness tasks on the trial."""
    tasks, limit = text_of(fields, "tasks").split(), text_of(fields, "limit").strip()

    def act(session: Session, user: User, job: Job) -> None:
        _row(session, job, number)
        if limit and not (limit.isascii() and limit.isdigit() and len(limit) < 7):
            raise Invalid("Write the number of samples in digits.", field="limit")
        benchmarks.request(session, user, job, number, tasks, int(limit) if limit else None)

    return changed(request, job_id, number, act, "benchmarked")


@router.post("/jobs/{job_id}/trials/{number}/benchmarks/{task_id}/stop")
def stop(request: Request, job_id: uuid.UUID, number: int, task_id: uuid.UUID) -> Response:
    """Call a benchmark off."""

    def act(session: Session, user: User, job: Job) -> None:
        benchmarks.stop(session, user, job, task_id)

    return changed(request, job_id, number, act, "stopped")
