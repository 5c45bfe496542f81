"""Addresses that are told of a user's jobs, and the messages waiting for them.

The worker's reconciler delivers what `due` returns; the rows are written in the transaction of the
change that they tell of.
"""

from __future__ import annotations

import secrets
import uuid
from urllib.parse import urlsplit

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from jobs import audit
from jobs.problems import Invalid, NotFound
from jobs.tables import Job, User, Webhook, WebhookDelivery

KINDS = ("job.completed", "job.failed", "job.paused", "job.cancelled", "artifact.ready")


def create(
    session: Session, user: User, url: str, kinds: list[str] | None = None
) -> tuple[Webhook, str]:
    """A webhook and its secret (shown once to the owner). Invalid: not https, unknown kind."""
    try:
        parts = urlsplit(url)
        printable = url.isprintable() and len(url) <= 2000 and parts.port != 0
    except ValueError:
        raise Invalid("This is not an address.", field="url") from None
    if (
        not printable
        or parts.scheme != "https"
        or not parts.hostname
        or parts.username
        or parts.password
    ):
        raise Invalid("A webhook needs an https:// address without a user name.", field="url")
    for kind in kinds or []:
        if kind not in KINDS:
            raise Invalid(f"{kind!r} is none of {', '.join(KINDS)}.", field="kinds")
    secret = "whsec_" + secrets.token_urlsafe(32)
    hook = Webhook(owner_id=user.id, url=url, secret=secret, kinds=list(kinds or []))
    session.add(hook)
    session.flush()
    audit.record(session, user.id, "webhook.create", hook.id, host=parts.hostname)
    return hook, secret


def list_webhooks(session: Session, user: User) -> list[Webhook]:
    """The user's webhooks, oldest first."""
    return list(
        session.scalars(
            select(Webhook).where(Webhook.owner_id == user.id).order_by(Webhook.created_at)
        )
    )


def delete(session: Session, user: User, webhook_id: uuid.UUID) -> None:
    """Remove one of the user's webhooks. NotFound."""
    hook = session.get(Webhook, webhook_id)
    if hook is None or hook.owner_id != user.id:
        raise NotFound("There is no such webhook.")
    session.delete(hook)
    audit.record(session, user.id, "webhook.delete", webhook_id)


def enqueue(session: Session, job: Job, kind: str) -> None:
    """Write one message of `kind` for every webhook of the job's owner that wants it."""
    hooks = session.scalars(
        select(Webhook).where(Webhook.owner_id == job.owner_id, Webhook.disabled.is_(False))
    )
    for hook in hooks:
        if hook.kinds and kind not in hook.kinds:
            continue
        body = {
            "type": kind,
            "data": {"id": str(job.id), "name": job.name, "model": job.model, "state": job.state},
        }
        session.add(WebhookDelivery(webhook_id=hook.id, body=body))


def due(session: Session, limit: int = 50) -> list[WebhookDelivery]:
    """Messages whose time has come, locked for this transaction; others skip them."""
    return list(
        session.scalars(
            select(WebhookDelivery)
            .where(WebhookDelivery.delivered_at.is_(None), WebhookDelivery.next_at <= func.now())
            .order_by(WebhookDelivery.next_at)
            .limit(limit)
            .with_for_update(skip_locked=True)
        )
    )
