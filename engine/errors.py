"""Why a request failed, in a form that the person who waits can act on."""

from __future__ import annotations

from jobs.spec.protocol import Reason


class EngineError(Exception):
    """A typed failure. `mend` says what a person can do about it."""

    def __init__(self, reason: Reason, message: str, mend: str = "", detail: str = "") -> None:
        super().__init__(message)
        self.reason: Reason = reason
        self.message = message
        self.mend = mend
        self.detail = detail

    def __reduce__(self) -> tuple[type[EngineError], tuple[str, ...]]:
        """What a copy is made of, in another process too."""
        return EngineError, (self.reason, self.message, self.mend, self.detail)
