"""The log of one task: `<data>/logs/<task id>.log`, read by offset through the API."""

from __future__ import annotations

import datetime as dt
import threading
from pathlib import Path


class TaskLog:
    """Appends to one file from several threads.

    log.line("info", "text")   # 2026-01-31T12:00:00Z info text
    log.raw(b"...")            # what a library printed, as it is
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)
        self._lock = threading.Lock()

    def line(self, level: str, text: str) -> None:
        """One line with the time and a level."""
        now = dt.datetime.now(dt.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        self.raw(f"{now} {level} {text}\n".encode(errors="replace"))

    def raw(self, data: bytes) -> None:
        """Bytes as they are. A full disk loses log lines and nothing else."""
        with self._lock:
            if not self._file.closed:
                try:
                    self._file.write(data)
                except OSError:
                    return

    def close(self) -> None:
        """Later lines are dropped."""
        with self._lock:
            self._file.close()
