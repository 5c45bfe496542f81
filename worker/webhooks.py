"""Delivers the messages that jobs.webhooks wrote (signatures: standardwebhooks.com).

A webhook's address comes from a user and is hostile: it is resolved once, private and special
ranges are refused, the connection goes to the address that was checked (no DNS rebinding),
redirects are not followed, and the whole exchange has an end.
"""

from __future__ import annotations

import asyncio
import base64
import datetime as dt
import hashlib
import hmac
import ipaddress
import json
import socket
import time
from urllib.parse import urlsplit

import httpx
from sqlalchemy.orm import Session

from jobs import webhooks
from jobs.tables import Webhook, WebhookDelivery

TIMEOUT_SECONDS = 5.0
# After that many failures the message is given up: 30 s, 1 min, 2 min ... about a day in all.
ATTEMPTS = 12
FIRST_RETRY_SECONDS = 30.0


class Refused(Exception):
    """The address may not be called, or does not answer in time."""


def deliver(session: Session) -> bool:
    """Send one message that is due; its row is locked meanwhile. False when none is due."""
    due = webhooks.due(session, limit=1)
    for delivery in due:
        hook = session.get_one(Webhook, delivery.webhook_id)
        delivery.attempts += 1
        try:
            delivery.status = post(hook.url, hook.secret, delivery)
            delivery.error = "" if delivery.status < 300 else f"answered {delivery.status}"
        except (Refused, httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            # ValueError: a host name that IDNA cannot encode
            delivery.status, delivery.error = None, f"{type(error).__name__}: {error}"[:500]
        _note(delivery)
    return bool(due)


def sign(secret: str, message_id: str, timestamp: int, body: bytes) -> str:
    """The header `webhook-signature`: v1, HMAC-SHA256 of "id.timestamp.body"."""
    raw = secret.removeprefix("whsec_")
    key = base64.urlsafe_b64decode(raw + "=" * (-len(raw) % 4))
    signed = f"{message_id}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()


def checked_address(host: str, port: int) -> str:
    """The first address of `host`; Refused if any of its addresses is not a public one."""
    found = [info[4][0] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    for address in found:
        parsed = ipaddress.ip_address(address)
        inner = getattr(parsed, "ipv4_mapped", None) or parsed
        if not inner.is_global or inner.is_multicast:
            raise Refused(f"{host} resolves to {address}, which is not a public address")
    return str(found[0])


def post(url: str, secret: str, delivery: WebhookDelivery) -> int:
    """POST one message; the status of the answer."""
    parts = urlsplit(url)
    if parts.scheme != "https" or not parts.hostname:
        raise Refused("only https addresses are called")
    port = parts.port or 443
    address = checked_address(parts.hostname, port)
    bracketed = f"[{address}]" if ":" in address else address
    now = int(time.time())
    body = json.dumps(
        {**delivery.body, "timestamp": dt.datetime.fromtimestamp(now, dt.timezone.utc).isoformat()}
    ).encode()
    headers = {
        "host": parts.hostname if port == 443 else f"{parts.hostname}:{port}",
        "content-type": "application/json",
        "webhook-id": str(delivery.id),
        "webhook-timestamp": str(now),
        "webhook-signature": sign(secret, str(delivery.id), now, body),
    }
    target = f"https://{bracketed}:{port}{parts.path or '/'}"
    if parts.query:
        target += f"?{parts.query}"
    return send(target, body, headers, parts.hostname)


def send(
    target: str, body: bytes, headers: dict[str, str], name: str, seconds: float = TIMEOUT_SECONDS
) -> int:
    """POST `body` to `target`, whose certificate must be for `name`: the status of the answer.

    A time-out of httpx begins anew with every byte, so a receiver that drips could hold the
    reconciler for ever: `seconds` bounds the whole exchange, and of the answer only the head is
    read. Refused when it takes longer.
    """

    async def exchange() -> int:
        async with (
            httpx.AsyncClient(timeout=seconds, follow_redirects=False, trust_env=False) as client,
            client.stream(
                "POST", target, content=body, headers=headers, extensions={"sni_hostname": name}
            ) as answer,
        ):
            return answer.status_code

    async def bounded() -> int:
        return await asyncio.wait_for(exchange(), seconds)

    try:
        return asyncio.run(bounded())
    except asyncio.TimeoutError:
        raise Refused(f"no answer within {seconds:g} s") from None


def _note(delivery: WebhookDelivery) -> None:
    now = dt.datetime.now(dt.timezone.utc)
    if not delivery.error:
        delivery.delivered_at, delivery.next_at = now, None
    elif delivery.attempts >= ATTEMPTS:
        delivery.next_at = None
    else:
        wait = FIRST_RETRY_SECONDS * 2 ** (delivery.attempts - 1)
        delivery.next_at = now + dt.timedelta(seconds=wait)
