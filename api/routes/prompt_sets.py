"""Prompt sets: upload a file or send a list; look; delete."""

from __future__ import annotations

import datetime as dt
import json
import uuid
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response
from pydantic import BaseModel, Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile

from api.auth import Reader, Writer
from api.bodies import Body
from api.problems import errors
from jobs import prompts
from jobs.problems import Invalid
from jobs.tables import PromptSet

router = APIRouter(tags=["prompt sets"])
Name = Annotated[str, Path(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
NO_SET = "No such prompt set."


class PromptLine(Body):
    """One prompt. `split` is its role; without it the job deals the prompts out itself."""

    prompt: str = Field(min_length=1, max_length=20_000)
    split: str | None = Field(None, description="direction, search or heldout")


class NewPromptSet(Body):
    """A prompt set sent as JSON. A file is sent as multipart/form-data: name, note, file."""

    name: str = Field(description="lower-case letters, digits, '.', '_' and '-'")
    note: str = Field("", max_length=2000)
    prompts: list[str | PromptLine] = Field(min_length=1, max_length=20_000)


class PromptSetView(BaseModel):
    """A prompt set without its prompts."""

    id: uuid.UUID
    name: str
    note: str
    count: int
    sha256: str
    mine: bool
    created_at: dt.datetime


class PromptSetDetail(PromptSetView):
    """A prompt set with its prompts."""

    prompts: list[PromptLine]


def view(row: PromptSet, user_id: uuid.UUID) -> PromptSetView:
    """A row of the table `prompt_sets` as the API shows it."""
    return PromptSetView(
        id=row.id,
        name=row.name,
        note=row.note,
        count=row.count,
        sha256=row.sha256,
        mine=row.owner_id == user_id,
        created_at=row.created_at,
    )


BODIES: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["name", "file"],
                    "properties": {
                        "name": {"type": "string"},
                        "note": {"type": "string"},
                        "file": {
                            "type": "string",
                            "contentMediaType": "application/octet-stream",
                            "description": ".txt (one a line), .jsonl, .json or .csv, UTF-8",
                        },
                    },
                }
            },
            "application/json": {"schema": NewPromptSet.model_json_schema()},
        },
    }
}


async def new_set(request: Request) -> tuple[str, str, bytes, str]:
    """(name, note, file, file's name) of an upload or a JSON body."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        async with request.form(max_files=1, max_fields=10) as form:
            return await _uploaded(form)
    if kind != "application/json":
        raise Invalid(
            "Send multipart/form-data with name and file, or application/json.",
            field="Content-Type",
        )
    try:
        body = NewPromptSet.model_validate_json(await request.body())
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(str(part) for part in fault["loc"]) or "body"
        raise Invalid(f"{place}: {fault['msg']}", field=place) from error
    lines = [
        {"prompt": each} if isinstance(each, str) else each.model_dump(exclude_none=True)
        for each in body.prompts
    ]
    return body.name, body.note, json.dumps(lines).encode(), "prompts.json"


async def _uploaded(form: FormData) -> tuple[str, str, bytes, str]:
    name, note, file = form.get("name"), form.get("note", ""), form.get("file")
    unknown = sorted(set(form) - {"name", "note", "file"})
    if unknown:
        raise Invalid("Unknown field. Send name, note and file.", field=unknown[0])
    if not isinstance(name, str) or not isinstance(note, str):
        raise Invalid("Send the set's name as a field `name`.", field="name")
    if not isinstance(file, UploadFile):
        raise Invalid("Send the prompts as a file in the field `file`.", field="file")
    return name, note, await file.read(), file.filename or "prompts.txt"


@router.post(
    "/prompt-sets",
    status_code=201,
    openapi_extra=BODIES,
    responses=errors(
        {
            409: "The name is taken.",
            413: "The file is larger than the operator allows.",
            422: "Not UTF-8 (the byte is named), fewer than 8 prompts, a prompt too long, …",
        }
    ),
)
async def create_prompt_set(who: Writer, request: Request, response: Response) -> PromptSetView:
    """Upload prompts: a file as multipart/form-data, or a list as JSON."""
    name, note, data, filename = await new_set(request)
    return await run_in_threadpool(_store, who, name, note, data, filename, response)


def _store(
    who: Writer, name: str, note: str, data: bytes, filename: str, response: Response
) -> PromptSetView:
    lines = prompts.parse(data, filename)
    with who.begin() as session:
        row = prompts.create_set(session, who.user, name, lines, note)
        session.refresh(row)
        found = view(row, who.user.id)
    response.headers["Location"] = f"/api/v1/prompt-sets/{found.name}"
    return found


@router.get("/prompt-sets")
def list_prompt_sets(who: Reader) -> list[PromptSetView]:
    """All prompt sets that jobs can name."""
    with who.begin() as session:
        return [view(row, who.user.id) for row in prompts.list_sets(session, who.user)]


@router.get("/prompt-sets/{name}", responses=errors({404: NO_SET}))
def show_prompt_set(who: Reader, name: Name) -> PromptSetDetail:
    """A prompt set with its prompts."""
    with who.begin() as session:
        row = prompts.get_set(session, name)
        lines = [PromptLine.model_validate(line) for line in row.prompts]
        return PromptSetDetail(**view(row, who.user.id).model_dump(), prompts=lines)


@router.delete(
    "/prompt-sets/{name}",
    status_code=204,
    responses=errors({403: "Another member's set, or a built-in one.", 404: NO_SET}),
)
def delete_prompt_set(who: Writer, name: Name) -> None:
    """Delete a prompt set. Jobs keep the prompts that they were submitted with."""
    with who.begin() as session:
        prompts.delete_set(session, who.user, name)
