"""The page of one job, and its live part alone."""

from __future__ import annotations

import uuid
from typing import Any
from urllib.parse import urlencode

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from jobs import analysis, artifacts, comparison, control, events, listing, live, submit, trials
from jobs.problems import Problem
from jobs.spec.job import JobSpec
from jobs.tables import Trial
from web.render import page
from web.routes import evaluation
from web.session import Visit, visit
from web.views import artifacts as artifact_views
from web.views import formats, logs, methods, preflight, results, scores
from web.views import jobs as views
from web.views import trials as trial_views

router = APIRouter()
EVENTS_SHOWN = 40

#: What a page says after a form was posted; the address holds the key, never a text.
NOTICES = {
    "submitted": "Submitted. This page follows the job by itself.",
    "paused": "Pausing: the worker finishes its running trials and frees the device.",
    "resumed": "Resumed. Nothing that was scored is scored again.",
    "cancelled": "Cancelled. Finished trials and artifacts stay.",
    "more": "The budget was changed.",
    "picked": "Picked. Its files are kept.",
    "unpicked": "No longer picked.",
    "exported": "The export is queued. It runs beside the search, when a worker is free.",
    "benchmarked": "The benchmark is queued. It runs beside the job, when a worker is free.",
    "stopped": "Stopped. What was measured stays.",
    "asked": "Asked. The answer appears below when a worker has given it.",
}


@router.get("/jobs/{job_id}")
def show_job(
    request: Request,
    job_id: uuid.UUID,
    sort: str = "refusals",
    order: str = "asc",
    show: str = "all",
    role: str = "",
    only: str = "",
    page: int = 1,
    still: bool = False,
    done: str = "",
) -> HTMLResponse:
    """State, progress, result, plot, trials, artifacts and log of a job."""
    return job_page(
        request,
        job_id,
        sort=sort,
        order=order,
        show=show,
        role=role,
        only=only,
        at=page,
        still=still,
        notice=NOTICES.get(done, ""),
    )


@router.get("/jobs/{job_id}/live")
def show_live_part(
    request: Request,
    job_id: uuid.UUID,
    sort: str = "refusals",
    order: str = "asc",
    show: str = "all",
    role: str = "",
    only: str = "",
    page: int = 1,
) -> HTMLResponse:
    """What changes on the job's page, for the script that follows it."""
    return job_page(
        request, job_id, "", sort=sort, order=order, show=show, role=role, only=only, at=page
    )


def job_page(
    request: Request,
    job_id: uuid.UUID,
    template: str = "job.html",
    *,
    sort: str = "refusals",
    order: str = "asc",
    show: str = "all",
    role: str = "",
    only: str = "",
    at: int = 1,
    still: bool = False,
    notice: str = "",
    problem: Problem | None = None,
) -> HTMLResponse:
    """The job's page; `problem` is what went wrong with the form that was posted from it.

    `template` "" gives the live part alone.
    """
    sort = sort if sort in trial_views.KEYS else "refusals"
    order = "desc" if order == "desc" else "asc"
    show = "front" if show == "front" else "all"
    with visit(request) as here:
        context = _context(here, job_id, sort, order, show)
        live_part, query = "job_live.html", {"sort": sort, "order": order, "show": show}
        if context["job"].kind != "abliterate":
            row = control.visible(here.session, here.user, job_id)
            context |= evaluation.context(here.session, row, context["job"], role, only, at)
            live_part, query = "evaluation_live.html", {"role": role, "only": only, "page": str(at)}
    return page(
        request,
        template or live_part,
        here.user,
        status=problem.status if problem else 200,
        live_part=live_part,
        query=urlencode(query),
        sort=sort,
        order=order,
        show=show,
        still=still,
        notice=notice,
        problem=problem,
        **context,
    )


def _context(here: Visit, job_id: uuid.UUID, sort: str, order: str, show: str) -> dict[str, Any]:
    session = here.session
    row = control.visible(session, here.user, job_id)
    job = listing.summary(session, row, here.settings)
    all_trials = trials.list_trials(session, job_id, limit=10_000)
    front = frozenset(trial.number for trial in trials.front(session, job_id))
    lines = [trial_views.line(job_id, trial, front) for trial in all_trials]
    baseline = scores.score((job.baseline or {}).get("search"))
    chosen = _chosen(all_trials, job.best.number if job.best else None)
    recent = events.since(session, job_id, max(0, row.event_seq - 500))
    told = [views.happening(event) for event in recent if event.kind != "progress"]
    tasks = live.tasks(session, job_id)
    compared = JobSpec.model_validate(row.spec).methods
    of_lines = {item.method for item in lines}
    reports = comparison.compare(session, row) if len(compared) > 1 else []
    sides = methods.rows(job_id, reports)
    shown = [item for item in lines if show == "all" or item.front or item.picked]
    return {
        "job": job,
        "badge": views.badge(job.state, job.desired_state),
        "phase": views.phase(job),
        "announcement": views.announcement(job),
        "eta": formats.duration(job.eta_seconds) if job.eta_seconds is not None else "",
        "live": views.is_live(job) or any(t.state in ("ready", "running") for t in tasks),
        "chosen": chosen,
        "comparisons": scores.compare(job.baseline, chosen),
        "picked": [item for item in lines if item.picked],
        "methods": sides,
        "methods_several": methods.has_several(sides),
        "titles": {name: trial_views.method_title(name) for name in {*compared, *of_lines}},
        "marks": methods.marks(compared, of_lines),
        "searched": job.kind == "abliterate" and submit.searches(compared),
        "figures": results.of_trial(job.baseline, chosen) if chosen else [],
        "plot": trial_views.plot(lines, baseline, compared, width=760, height=400),
        "small_plot": trial_views.plot(lines, baseline, compared, width=356, height=330),
        "missing": trial_views.left_out(lines),
        "several": trial_views.has_several(lines),
        "columns": trial_views.columns(sort, order, trial_views.has_several(lines)),
        "lines": trial_views.ordered(shown, sort, order),
        "count": len(lines),
        "front_count": len(front),
        "artifacts": [artifact_views.view(a) for a in artifacts.list_for_job(session, job_id)],
        "submitted": views.settings_facts(job),
        "analysed": analysis.has_geometry(session, job_id),
        "anatomy": preflight.facts(row.prepared),
        "parts": preflight.parts(row.prepared),
        "missed": preflight.missed(row.prepared, compared),
        "warnings": preflight.warnings(row.prepared),
        "log": logs.tail(logs.newest(here.settings.logs, (task.id for task in tasks))),
        "logged": [task for task in tasks if task.kind != "chat"],
        "events": told[-EVENTS_SHOWN:][::-1],
        "may_edit": control.may_edit(here.user, row),
    }


def _chosen(rows: list[Trial], best: int | None) -> Trial | None:
    """The trial that stands for the job's result: the best pick, else the best of all."""
    picks = [row for row in rows if row.picked]
    if picks:
        return min(picks, key=lambda row: (row.refusals or 0, row.kl_first or 0.0))
    return next((row for row in rows if row.number == best), None)
