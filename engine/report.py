"""How a long operation says where it is and learns that it should stop."""

from __future__ import annotations

from typing import Protocol

from jobs.spec.protocol import Scored


class Report(Protocol):
    """What long operations are handed. Each call raises `EngineError("stopped")` after a stop."""

    def progress(self, phase: str, done: float = 0, total: float = 0, text: str = "") -> None:
        """`done` of `total` units of `phase`; sent at most twice a second."""

    def log(self, text: str, level: str = "info") -> None:
        """A line for the task's log."""

    def partial(self, index: int, text: str = "", scored: Scored | None = None) -> None:
        """A piece of an answer, or one candidate's finished score."""


class Silent:
    """A `Report` that says nothing: for tests and for use by hand."""

    def progress(self, phase: str, done: float = 0, total: float = 0, text: str = "") -> None:
        """Say nothing."""

    def log(self, text: str, level: str = "info") -> None:
        """Say nothing."""

    def partial(self, index: int, text: str = "", scored: Scored | None = None) -> None:
        """Say nothing."""
