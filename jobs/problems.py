"""What can be wrong with a request, independent of how it came in.

`api` turns these into RFC 9457 problem documents, `web` into messages beside the field.
"""

from __future__ import annotations


class Problem(Exception):
    """Base: `status` is the HTTP status, `title` the kind, `detail` the fault and its mend."""

    status = 400
    title = "Bad request"

    def __init__(self, detail: str, *, field: str | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.field = field


class Invalid(Problem):
    """A field holds what cannot be accepted."""

    status = 422
    title = "Invalid input"


class Unauthenticated(Problem):
    """No valid token or session."""

    status = 401
    title = "Not signed in"


class Forbidden(Problem):
    """Signed in, but not allowed."""

    status = 403
    title = "Not allowed"


class NotFound(Problem):
    """Not there, or not visible to this user."""

    status = 404
    title = "Not found"


class Conflict(Problem):
    """The thing is in a state in which this cannot be done."""

    status = 409
    title = "Conflict"


class TooMany(Problem):
    """A rate limit or a quota."""

    status = 429
    title = "Too many"


class NoSpace(Problem):
    """The disk is (nearly) full."""

    status = 507
    title = "Disk full"


class LeaseLost(Exception):
    """A fenced write matched no row: this worker no longer owns the task. Never retried."""
