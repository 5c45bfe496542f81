"""The log of one task: `<data>/logs/<task id>.log`, read by offset through the API."""

from __future__ import annotations

import datetime as dt
import logging
import threading
from contextlib import suppress
from io import FileIO
from pathlib import Path

log = logging.getLogger(__name__)


class TaskLog:
    """Appends to one file from several threads.

    log.line("info", "text")   # 2026-01-31T12:00:00Z info text
    log.raw(b"...")            # what a library printed, as it is

    A full disk, or a folder that cannot be written, loses log lines and nothing else.
    """

    def __init__(self, path: Path) -> None:
        self._file: FileIO | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            log.warning("no log is kept: %s", error)
        self._lock = threading.Lock()

    def line(self, level: str, text: str) -> None:
        """One line with the time and a level."""
        now = dt.datetime.now(dt.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        self.raw(f"{now} {level} {text}\n".encode(errors="replace"))

    def raw(self, data: bytes) -> None:
        """Bytes as they are."""
        with self._lock:
            if self._file is not None:
                with suppress(OSError):
                    self._file.write(data)

    def close(self) -> None:
        """Later lines are dropped."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None
