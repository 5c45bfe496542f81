"""Files that crashed workers left behind."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from jobs.settings import Settings

TEMPORARY_DAYS = 1.0  # no export writes for longer without touching its folder
SPOOL_DAYS = 7.0


def prune(settings: Settings) -> list[Path]:
    """Remove half-written artifacts and spooled scores that nobody came back for."""
    removed = []
    for path in _older(settings.artifacts, ".tmp-*", TEMPORARY_DAYS):
        shutil.rmtree(path, ignore_errors=True)
        removed.append(path)
    for path in _older(settings.spool, "*", SPOOL_DAYS):
        path.unlink(missing_ok=True)
        removed.append(path)
    return removed


def _older(folder: Path, pattern: str, days: float) -> list[Path]:
    before = time.time() - days * 86_400
    return [path for path in folder.glob(pattern) if path.lstat().st_mtime < before]
