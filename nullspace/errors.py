"""What can go wrong between a client and its server, in words that people can act on."""

from __future__ import annotations

from typing import Any

import httpx

Json = dict[str, Any]


def sentences(what: Any, mend: Any) -> str:
    """What is wrong and its mend, with a full stop between them."""
    told, mend = str(what or "").strip(), str(mend or "").strip()
    stop = "." if told and mend and told[-1] not in ".!?:" else ""
    return f"{told}{stop} {mend}".strip()


class ClientError(Exception):
    """Something that was asked for did not work. `exit_code` is the command line's."""

    exit_code = 1


class Missing(ClientError):
    """There is no such thing."""

    exit_code = 5


class Unreachable(ClientError):
    """No server answers at the address."""

    exit_code = 3


class Refused(ClientError):
    """The server answered with a problem document (RFC 9457).

    status 401, 403    exit code 4: not signed in, not allowed
    status 404         exit code 5
    status 409         exit code 6: the state does not allow it
    status 422, 413    exit code 7: a field is wrong; `errors` names each
    status 429         exit code 8: a limit or a quota
    status 503, 507    exit code 9: the service or its disk is not able to
    """

    def __init__(self, status: int, title: str, detail: str, errors: list[Json]) -> None:
        self.status, self.title, self.detail, self.errors = status, title, detail, errors
        super().__init__(self._text())
        codes = {401: 4, 403: 4, 404: 5, 409: 6, 413: 7, 422: 7, 429: 8, 503: 9, 507: 9}
        self.exit_code = codes.get(status, 1)

    def _text(self) -> str:
        lines = []
        for error in self.errors:
            told = sentences(error.get("detail"), error.get("mend"))
            lines.append(f"{error.get('field', '')}: {told}")
        return "\n".join(lines) or self.detail or f"{self.status} {self.title}"


def refusal(response: httpx.Response) -> Refused:
    """The error that a response of status 400 or more stands for."""
    try:
        body = response.json()
    except ValueError:
        body = {}
    if not isinstance(body, dict) or "title" not in body:
        text = response.text.strip().splitlines()[:1]
        where = f"{response.request.url} answered {response.status_code}"
        detail = f"{where}: {text[0][:200] if text else response.reason_phrase}"
        return Refused(response.status_code, response.reason_phrase, detail, [])
    errors = [error for error in body.get("errors", []) if isinstance(error, dict)]
    return Refused(response.status_code, str(body["title"]), str(body.get("detail", "")), errors)


def unreachable(url: str, error: Exception) -> str:
    """The words for a server that does not answer at `url`."""
    reason = str(error) or type(error).__name__
    return (
        f"no Nullspace server answers at {url} ({reason}). Start one with `nullspace up`, or name "
        "another in NULLSPACE_URL"
    )
