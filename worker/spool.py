"""Scores that are finished but not yet written, because the database is away.

One file per trial, `<data>/spool/<job>-<number>.json`. A score is a pure function of the candidate,
so whoever gets the slot next may use it instead of scoring again: the file outlives the lease.
"""

from __future__ import annotations

import logging
import os
import uuid
from pathlib import Path

from pydantic import BaseModel, ValidationError

from jobs.spec.candidate import Candidate
from jobs.spec.protocol import Scored

log = logging.getLogger(__name__)


class Spooled(BaseModel):
    """A score and what it is the score of."""

    candidate: Candidate
    scored: Scored


def keep(folder: Path, job_id: uuid.UUID, number: int, spooled: Spooled) -> None:
    """Write a score aside. A full disk loses time, never a trial, so it is only logged."""
    path = _path(folder, job_id, number)
    partial = path.with_suffix(f".{os.getpid()}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with partial.open("w") as file:
            file.write(spooled.model_dump_json())
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    except OSError as error:
        log.warning("a score could not be spooled: %s", error)


def take(folder: Path, job_id: uuid.UUID, number: int, candidate: Candidate) -> Scored | None:
    """The spooled score of exactly this candidate, if there is one."""
    try:
        spooled = Spooled.model_validate_json(_path(folder, job_id, number).read_bytes())
    except (OSError, ValidationError):
        return None
    return spooled.scored if spooled.candidate == candidate else None


def drop(folder: Path, job_id: uuid.UUID, number: int) -> None:
    """Forget a score that has been written to the database."""
    try:
        _path(folder, job_id, number).unlink(missing_ok=True)
    except OSError as error:
        log.warning("a spooled score could not be removed: %s", error)


def _path(folder: Path, job_id: uuid.UUID, number: int) -> Path:
    return folder / f"{job_id}-{number}.json"
