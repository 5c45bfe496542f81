"""Prompt sets: list, upload, look, delete."""

from __future__ import annotations

from collections import Counter
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, RedirectResponse
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.responses import Response

from jobs import prompts
from jobs.problems import Conflict, Invalid, Problem
from jobs.tables import PromptSet, User
from web.forms import Fields, text_of
from web.render import page
from web.session import Visit, visit

router = APIRouter()
SHOWN = 50


@router.get("/prompt-sets")
def show_sets(request: Request) -> HTMLResponse:
    """Every set, and the upload form."""
    with visit(request) as here:
        sets = prompts.list_sets(here.session, here.user)
    return _page(request, here, sets)


def _page(
    request: Request,
    here: Visit,
    sets: list[PromptSet],
    problem: Problem | None = None,
    values: dict[str, str] | None = None,
) -> HTMLResponse:
    return page(
        request,
        "prompt_sets.html",
        here.user,
        status=problem.status if problem else 200,
        sets=sets,
        splits={each.name: _splits(each) for each in sets},
        problem=problem,
        values=values or {"name": "", "note": ""},
        writes=here.writes,
        most=here.settings.upload_bytes,
        limits=(prompts.MIN_PROMPTS, prompts.MAX_PROMPTS),
    )


def _splits(found: PromptSet) -> dict[str, int]:
    """How many prompts of each split; {} for a set that is not split."""
    counted = Counter(line.get("split") for line in found.prompts)
    if set(counted) <= {None}:
        return {}
    counted["direction"] += counted.pop(None, 0)
    return {split: counted[split] for split in prompts.SPLITS}


@router.post("/prompt-sets")
async def upload_set(request: Request, fields: Fields) -> Response:
    """Read an uploaded file and keep it as a set."""
    file = fields.get("file")
    limit = request.app.state.settings.upload_bytes
    data, filename = b"", ""
    if isinstance(file, UploadFile):
        filename = file.filename or ""
        data = await file.read(limit + 1)
    # The database is not for the event loop's thread.
    return await run_in_threadpool(_upload, request, fields, data, filename, limit)


def _upload(request: Request, fields: FormData, data: bytes, filename: str, limit: int) -> Response:
    values = {"name": text_of(fields, "name").strip(), "note": text_of(fields, "note").strip()}
    failure: Problem | None = None
    try:
        with visit(request) as here:
            if not filename:
                raise Invalid("Choose a file.", field="file")
            if len(data) > limit:
                raise Invalid(f"The file is larger than {limit // 1_000_000} MB.", field="file")
            lines = prompts.parse(data, filename)
            prompts.create_set(here.session, here.user, values["name"], lines, values["note"])
    except (Invalid, Conflict) as problem:
        failure = problem
    if failure is not None:
        with visit(request) as here:
            sets = prompts.list_sets(here.session, here.user)
        return _page(request, here, sets, failure, values)
    return RedirectResponse(f"/prompt-sets/{quote(values['name'], safe='')}", status_code=303)


@router.get("/prompt-sets/{name}")
def show_set(request: Request, name: str, split: str = "", page_number: int = 1) -> HTMLResponse:
    """The prompts of a set, a page at a time."""
    with visit(request) as here:
        found = prompts.get_set(here.session, name)
        owner = here.session.get(User, found.owner_id) if found.owner_id else None
    return _set_page(request, here, found, owner, split, page_number)


def _set_page(
    request: Request,
    here: Visit,
    found: PromptSet,
    owner: User | None,
    split: str,
    page_number: int,
) -> HTMLResponse:
    splits = _splits(found)
    lines = [
        (place, line["prompt"], line.get("split") or ("direction" if splits else ""))
        for place, line in enumerate(found.prompts, start=1)
    ]
    chosen = split if split in splits else ""
    if chosen:
        lines = [line for line in lines if line[2] == chosen]
    pages = max(1, -(-len(lines) // SHOWN))
    number = min(max(1, page_number), pages)
    context: dict[str, Any] = {
        "lines": lines[(number - 1) * SHOWN : number * SHOWN],
        "total": len(lines),
        "pages": pages,
        "number": number,
        "splits": splits,
        "split": chosen,
        "owner": owner,
        "may_delete": here.user.role == "admin" or found.owner_id == here.user.id,
    }
    return page(request, "prompt_set.html", here.user, found=found, **context)


@router.get("/prompt-sets/{name}/delete")
def confirm_delete(request: Request, name: str) -> HTMLResponse:
    """Ask before a set is removed."""
    with visit(request) as here:
        found = prompts.get_set(here.session, name)
    return page(request, "delete_set.html", here.user, found=found)


@router.post("/prompt-sets/{name}/delete")
def delete_set(request: Request, name: str) -> Response:
    """Remove a set; jobs keep the texts they were submitted with."""
    with visit(request) as here:
        prompts.delete_set(here.session, here.user, name)
    return RedirectResponse("/prompt-sets", status_code=303)
