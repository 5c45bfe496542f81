"""Webhooks: addresses that are told when one's jobs end or artifacts are ready."""

from __future__ import annotations

import datetime as dt
import uuid

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from api.auth import Reader, Writer
from api.bodies import Body
from api.problems import errors
from jobs import webhooks

router = APIRouter(tags=["webhooks"])


class NewWebhook(Body):
    """An https address, and of which kinds of message it is told; all where none is named."""

    url: str = Field(max_length=2000)
    kinds: list[str] = Field(default_factory=list, max_length=20)


class WebhookView(BaseModel):
    """A webhook without its secret."""

    model_config = ConfigDict(from_attributes=True)

    id: uuid.UUID
    url: str
    kinds: list[str]
    disabled: bool
    created_at: dt.datetime


class NewWebhookView(WebhookView):
    """A new webhook. `secret` signs its messages (standard-webhooks); it is shown this once."""

    secret: str


@router.get("/webhooks")
def list_webhooks(who: Reader) -> list[WebhookView]:
    """One's own webhooks."""
    with who.begin() as session:
        return [
            WebhookView.model_validate(row) for row in webhooks.list_webhooks(session, who.user)
        ]


@router.post(
    "/webhooks",
    status_code=201,
    responses=errors({422: "Not an https address, or an unknown kind."}),
)
def create_webhook(who: Writer, new: NewWebhook) -> NewWebhookView:
    """Make a webhook. Its secret is in this answer and never again."""
    with who.begin() as session:
        row, secret = webhooks.create(session, who.user, new.url, new.kinds)
        session.refresh(row)
        return NewWebhookView(**WebhookView.model_validate(row).model_dump(), secret=secret)


@router.delete(
    "/webhooks/{webhook_id}", status_code=204, responses=errors({404: "No such webhook of yours."})
)
def delete_webhook(who: Writer, webhook_id: uuid.UUID) -> None:
    """Delete one of one's own webhooks."""
    with who.begin() as session:
        webhooks.delete(session, who.user, webhook_id)
