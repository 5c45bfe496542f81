"""How a worker's main process tells its pool child to hand the running task back.

Celery's warm shutdown waits for the running task, which here may take a day. A pipe carries the
news: one byte means "end soon", end of file means "the main process is dead". Writing a byte is
safe in a signal handler, a lock is not. The child never reads the byte, so it stays visible.
"""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

_ends: list[int] = []  # [read, write]; the child drops its copy of the write end
_told: list[int] = []  # signals that this process received while it worked


def lay() -> None:
    """Make the pipe; in the main process, before the pool is forked."""
    if not _ends:
        _ends.extend(os.pipe())


def pull() -> None:
    """Tell the pool child to end soon (signal handlers of the main process)."""
    if len(_ends) == 2:
        with suppress(OSError):
            os.write(_ends[1], b".")


def hold() -> None:
    """In the pool child: drop the write end, so that the main process's death is seen."""
    if len(_ends) == 2:
        os.close(_ends.pop())


def ending() -> bool:
    """Whether this process should hand back what it does and end."""
    return wait(0)


def wait(seconds: float) -> bool:
    """`ending()`, waiting at most `seconds` for it to become true."""
    if _told:
        return True
    return bool(select.select(_ends[:1], [], [], seconds)[0]) or bool(_told)


@contextmanager
def listening() -> Iterator[None]:
    """While a task runs, SIGTERM to this very process means `ending()` instead of death."""

    def told(signum: int, frame: FrameType | None) -> None:
        _told.append(signum)

    before = signal.signal(signal.SIGTERM, told)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
    if _told:
        raise SystemExit(0)
