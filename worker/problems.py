"""Why a task stops before its end."""

from __future__ import annotations

from typing import Any, Literal

from jobs.spec.protocol import Error, Reason

Cause = Literal["lost", "pause", "cancel", "shutdown"]


class EngineError(Exception):
    """The engine's typed answer. `mend` says what a person can do about it."""

    def __init__(self, reason: Reason, message: str, mend: str = "", detail: str = "") -> None:
        super().__init__(message)
        self.reason: Reason = reason
        self.message = message
        self.mend = mend
        self.detail = detail

    @classmethod
    def of(cls, answer: Error) -> EngineError:
        """The exception for an `Error` message."""
        return cls(answer.reason, answer.message, answer.mend, answer.detail)

    def facts(self) -> dict[str, Any]:
        """What is kept in the `error` columns: {"reason", "message", "mend"}."""
        return {"reason": self.reason, "message": self.message, "mend": self.mend}


class EngineDied(EngineError):
    """The engine process ended without an answer. The message names the signal or status."""

    def __init__(self, how: str, last_lines: list[str]) -> None:
        super().__init__(
            "engine_died",
            f"the engine process ended unexpectedly ({how})",
            "If it was killed for memory choose bnb_4bit or a smaller model; the task's log has "
            "its last words. Then resume the job.",
            "\n".join(last_lines),
        )


class Interrupted(Exception):
    """The task must stop now, though nothing is wrong with it.

    lost      the lease is over: kill the engine, write nothing
    pause     its owner pauses the job
    cancel    its owner cancels it
    shutdown  this worker was told to end: hand the lease back at once
    """

    def __init__(self, cause: Cause) -> None:
        super().__init__(cause)
        self.cause: Cause = cause
