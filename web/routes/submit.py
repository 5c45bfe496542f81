"""The submit form: defaults, estimate, faults beside the fields."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, RedirectResponse
from pydantic import ValidationError
from starlette.responses import Response

from jobs import estimate, models, prompts, queue, submit
from jobs.estimate import Estimate
from jobs.problems import Problem, Unauthenticated
from jobs.settings import Settings
from jobs.spec.job import JobSpec, SamplerName
from jobs.spec.methods import METHODS, budget, share
from jobs.spec.scorers import ALWAYS, OBJECTIVES, SCORERS
from web import forms
from web.forms import Fields, text_of
from web.render import page
from web.session import visit
from web.views.jobs import KINDS

router = APIRouter()
#: What "Try the demo model" fills in: done in minutes on a laptop's processor.
DEMO = {
    "name": "My first job",
    "model": "demo",
    "quantization": "none",
    "trials": "60",
    "max_new_tokens": "40",
    "prompts.over_refusal": "demo-over-refusal",
}
SAMPLERS: list[tuple[SamplerName, str]] = [
    ("tpe", "TPE, the usual one"),
    ("nsga3", "NSGA-III, a genetic one"),
    ("cmaes", "CMA-ES, evolution of one Gaussian"),
    ("qnehvi", "qNEHVI, if the worker has BoTorch"),
]
ADVANCED = (
    "revision", "dtype", "device", "device_map", "allow_partial", "system_prompt",
    "startup_trials", "sampler", "screening", "warm_start", "objectives", "scorers", "judge",
    "max_new_tokens", "kl_tokens", "markers", "seed", "priority", "parallelism",
    "prompts.direction", "prompts.search", "prompts.heldout", "prompts.over_refusal",
    "prompts.texts", "private",
)  # fmt: skip


def defaults() -> dict[str, Any]:
    """The specification's own defaults, by field name."""
    plain = JobSpec.model_validate({"model": "demo"}).model_dump()
    values: dict[str, Any] = {}
    for name in (*forms.SELECTS, *forms.NUMBERS, *forms.TEXTS):
        value = plain["prompts"][name[8:]] if name.startswith("prompts.") else plain[name]
        values[name] = "" if value is None else str(value)
    values |= {name: plain[name] for name in (*forms.SWITCHES, *forms.GROUPS)}
    values |= {name: "\n".join(plain[name]) for name in forms.LINES}
    return values | {"model": ""}


@router.get("/jobs/new")
def show_form(request: Request, demo: bool = False, kind: str = "") -> HTMLResponse:
    """The form, with the demo model's values where that was asked for."""
    chosen = {"kind": kind} if kind in KINDS else {}
    return _form(request, defaults() | (DEMO if demo else {}) | chosen)


def _form(
    request: Request,
    values: Mapping[str, Any],
    *,
    errors: Mapping[str, str] | None = None,
    alert: str = "",
    found: Estimate | None = None,
    status: int = 200,
    key: str = "",
) -> HTMLResponse:
    errors, posted = dict(errors or {}), bool(key)
    with visit(request) as here:
        sets = prompts.list_sets(here.session, here.user)
    names = [each.name for each in sets]
    usual = defaults()
    return page(
        request,
        "submit.html",
        here.user,
        status=status,
        values=values,
        errors=errors,
        alert=alert,
        estimate=found,
        sets=[(each.name, each.count, each.note) for each in sets],
        unknown_sets={
            name: values[name]
            for name in forms.TEXTS
            if name.startswith("prompts.") and values[name] and values[name] not in names
        },
        models=local_models(here.settings),
        methods=METHODS,
        scorers=SCORERS,
        objectives=OBJECTIVES,
        samplers=SAMPLERS,
        # refusals and the two KLs are measured in any case, the harness where tasks are named
        further=[name for name in SCORERS if name not in ALWAYS and name != "harness"],
        shares=budget_words(values),
        # a filled-in form stays short; what somebody changed or must mend is shown
        kinds=KINDS,
        open_advanced=posted
        and any(name in errors or values[name] != usual[name] for name in ADVANCED),
        most_trials=here.settings.max_trials,
        writes=here.writes,
        key=key or str(uuid.uuid4()),
    )


def budget_words(values: Mapping[str, Any]) -> str:
    """What the chosen methods make of the budget, '' where the fields do not say it."""
    chosen = [name for name in METHODS if name in values["methods"]]
    trials = values["trials"].strip()
    if not chosen or not (trials.isascii() and trials.isdigit() and len(trials) < 6):
        return ""
    whole = budget(chosen, int(trials))
    shares = [share(chosen, whole, name) for name in chosen]
    if len(chosen) == 1:
        return f"{whole} trial{'s' if whole > 1 else ''}."
    words = ", ".join(
        f"{METHODS[name].title} {count}" for name, count in zip(chosen, shares, strict=True)
    )
    return f"{whole} trials: {words}."


def local_models(settings: Settings) -> list[str]:
    """Names that a job may use without the hub."""
    found = list(models.DEMOS)
    folder: Path | None = settings.models
    if folder is not None and folder.is_dir():
        found += sorted(p.parent.name for p in folder.glob("*/config.json"))
        found += sorted("/".join(p.parts[-3:-1]) for p in folder.glob("*/*/config.json"))
    return list(dict.fromkeys(found))


@router.post("/jobs/new")
def submit_form(request: Request, fields: Fields) -> Response:
    """Estimate or submit; either way a fault stands beside its field and the input is kept."""
    values = forms.kept(fields)
    settings: Settings = request.app.state.settings
    key = text_of(fields, "key")[:100] or str(uuid.uuid4())
    with visit(request) as here:  # nothing is looked up for who is not signed in
        devices = [worker.device for worker in queue.live_workers(here.session, settings)]
    try:
        spec = JobSpec.model_validate(forms.specification(values))
        if text_of(fields, "action") == "estimate":
            found = estimate.estimate(spec, settings, devices=devices)
            return _form(request, values, found=found, key=key)
        # The hub may take seconds: asked here, so that no transaction waits for it.
        models.check(spec.model, spec.revision, settings)
        submit.check_original(spec, settings)
        with visit(request) as here:
            job, created = submit.submit(
                here.session, here.user, spec, settings, idempotency_key=key
            )
            if not created and JobSpec.model_validate(job.spec) != spec:
                # The Back button shows the old form with its key: changed input is another job.
                job, _ = submit.submit(here.session, here.user, spec, settings)
            tasks = queue.claimable_of(here.session, job.id)
    except ValidationError as error:
        return _form(request, values, errors=forms.faults(error), status=422, key=key)
    except Unauthenticated:
        raise
    except Problem as problem:
        known = problem.field is not None and problem.field in values
        return _form(
            request,
            values,
            errors={problem.field: problem.detail} if known and problem.field else {},
            alert="" if known else problem.detail,
            status=problem.status,
            key=key,
        )
    request.app.state.doorbell.ring(tasks)
    return RedirectResponse(f"/jobs/{job.id}?done=submitted", status_code=303)
