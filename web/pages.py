"""All pages, in one router. They use `jobs/` as the API does, and nothing of the API."""

from __future__ import annotations

from fastapi import APIRouter

from web.routes import (
    account,
    actions,
    artifact,
    geometry,
    job,
    job_list,
    prompt_sets,
    signin,
    submit,
    tokens,
    trial,
    workers,
)

router = APIRouter(include_in_schema=False)
for part in (signin, job_list, submit, job, geometry, actions, trial, artifact, prompt_sets,
             workers, tokens, account):  # fmt: skip
    router.include_router(part.router)
