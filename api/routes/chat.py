"""Try a trial: one prompt, answered by a worker; the answer is an event of the job."""

from __future__ import annotations

import uuid

from fastapi import APIRouter
from pydantic import BaseModel, Field

from api.auth import Writer
from api.bodies import Body
from api.problems import errors
from api.routes.jobs import NOT_YOURS
from api.routes.trials import NO_TRIAL
from jobs import chats, control, queue

router = APIRouter(tags=["trials"])


class Chat(Body):
    """One prompt for a trial, or for the original model where `trial` is null."""

    prompt: str = Field(min_length=1, max_length=20_000)
    trial: int | None = Field(None, ge=0, lt=2**31)
    max_new_tokens: int = Field(200, ge=1, le=1000)


class ChatTask(BaseModel):
    """The task that will answer. Events of kind `chat` name it."""

    task: uuid.UUID


@router.post(
    "/jobs/{job_id}/chat",
    status_code=202,
    responses=errors(
        {
            403: NOT_YOURS,
            404: NO_TRIAL,
            409: "The trial is not complete, or the job is cancelled.",
            429: "Too many chats of this job wait for an answer.",
        }
    ),
)
def chat(who: Writer, job_id: uuid.UUID, said: Chat) -> ChatTask:
    """Ask a trial's model something. The answer comes over `GET /jobs/{job_id}/events`."""
    with who.begin() as session:
        job = control.editable(session, who.user, job_id)
        task = chats.request(
            session,
            who.user,
            job,
            said.prompt,
            number=said.trial,
            max_new_tokens=said.max_new_tokens,
        )
        tasks = queue.claimable_of(session, job_id)
        found = ChatTask(task=task.id)
    who.doorbell.ring(tasks)
    who.doorbell.nudge(job_id)
    return found
