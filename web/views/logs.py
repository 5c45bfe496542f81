"""The end of a task's log."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from uuid import UUID

from web.views import formats

TAIL_BYTES = 24_000
TAIL_LINES = 120


def newest(folder: Path, tasks: Iterable[UUID]) -> Path | None:
    """The log that was written to last; None while there is none."""
    found = []
    for task in tasks:
        path = folder / f"{task}.log"
        try:
            found.append((path.stat().st_mtime, path))
        except OSError:
            continue
    return max(found)[1] if found else None


def tail(path: Path | None) -> list[str]:
    """The last whole lines, made harmless: no terminal codes, controls visible.

    A carriage return redraws a line (progress bars): only the last drawing is kept.
    """
    if path is None:
        return []
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - TAIL_BYTES))
            data = file.read(TAIL_BYTES)
    except OSError:
        return []
    lines = data.decode("utf-8", "replace").replace("\r\n", "\n").split("\n")
    if size > TAIL_BYTES:
        lines = lines[1:]
    kept = [formats.shown(line.rstrip("\r").rsplit("\r", 1)[-1]) for line in lines]
    while kept and not kept[-1]:
        kept.pop()
    return kept[-TAIL_LINES:]
