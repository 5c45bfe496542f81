"""The export task: files under a temporary name, synced, renamed, and only then announced."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from pathlib import Path
from typing import Any, cast

from sqlalchemy.orm import Session

from jobs import artifacts, lifecycle, trials
from jobs.spec.candidate import parse
from jobs.spec.methods import METHODS, MethodName
from jobs.spec.protocol import Export, Exported, Prepared
from jobs.spec.scores import Scores
from jobs.tables import Artifact, Trial
from jobs.trial_scores import search_scores
from worker.problems import EngineError
from worker.run import Run


def export(run: Run) -> None:
    """payload: {"artifact"}; the engine writes into `<artifacts>/.tmp-<id>-<token>`."""
    artifact_id = uuid.UUID(run.task.payload["artifact"])
    artifact, trial = run.write(lambda session: _begin(session, run, artifact_id))
    prepared = run.prepare()
    base = run.station.settings.artifacts
    temporary = base / f".tmp-{artifact_id}-{run.token}"
    try:
        _clear(base, artifact_id)
        temporary.mkdir(parents=True)
        request = Export(
            candidate=parse(trial.candidate),
            kind=artifact.kind,
            directory=str(temporary),
            rank=artifact.rank or artifacts.DEFAULT_RANK,
            card=card(run, prepared, trial),
        )
        exported = Exported.model_validate(run.ask(request).value)
        run.lease.check()
        _publish(temporary, artifacts.folder(run.station.settings, artifact_id))
    except OSError as error:
        raise _typed(error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    run.write(
        lambda session: artifacts.mark_ready(session, run.task, run.token, artifact_id, exported)
    )


def card(run: Run, prepared: Prepared, trial: Trial) -> dict[str, Any]:
    """What the model card states: the source, the edit, and every score with its interval."""
    search = None if trial.screened else search_scores(trial)  # no count of refusals then
    scores = {"search": search} if search is not None else {}
    for role, stored in (("heldout", trial.heldout), ("over_refusal", trial.over_refusal)):
        if stored is not None:
            scores[role] = Scores.model_validate(stored)
    return {
        "model": run.spec.model,
        "commit": prepared.commit or run.job.commit,
        "architecture": prepared.anatomy.architecture,
        "coverage": prepared.anatomy.coverage,
        "method": METHODS[cast(MethodName, trial.method)].title,
        "method_name": trial.method,
        "methods": run.spec.methods,
        "quantization": run.spec.quantization,
        "dtype": prepared.dtype,
        "max_new_tokens": run.spec.max_new_tokens,
        "job": str(run.job.id),
        "trial": trial.number,
        "trials": run.lease.write(lambda session: lifecycle.completed(session, run.job.id)),
        "seed": run.spec.seed,
        "prompts": run.spec.prompts.model_dump(mode="json"),
        "candidate": trial.candidate,
        "baseline": {role: _with_interval(value) for role, value in prepared.baseline.items()},
        "scores": {role: _with_interval(value) for role, value in scores.items()},
        "versions": prepared.versions,
    }


def _with_interval(scores: Scores) -> dict[str, Any]:
    low, high = scores.interval
    return {**scores.model_dump(mode="json"), "interval": [low, high]}


def _begin(session: Session, run: Run, artifact_id: uuid.UUID) -> tuple[Artifact, Trial]:
    artifact = artifacts.mark_running(session, run.task, run.token, artifact_id)
    return artifact, trials.get(session, run.job.id, artifact.trial_number)


def _clear(base: Path, artifact_id: uuid.UUID) -> None:
    """Remove what earlier tries left; this worker holds the lease, so nobody else writes there."""
    for left in [*base.glob(f".tmp-{artifact_id}-*"), base / str(artifact_id)]:
        if left.exists():
            shutil.rmtree(left)


def _publish(temporary: Path, final: Path) -> None:
    """Sync every file and folder, then rename. After that a power cut cannot undo it."""
    for folder, _, names in os.walk(temporary):
        for name in names:
            _sync(Path(folder) / name)
        _sync(Path(folder))
    temporary.rename(final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _typed(error: OSError) -> EngineError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return EngineError(
            "disk_full",
            f"the disk of the artifacts folder is full: {error.strerror}",
            "Free some space (old artifacts, caches) or give the data folder a larger disk.",
        )
    return EngineError(
        "engine_failed",
        f"the artifacts folder cannot be written: {error}",
        "The worker's user needs write access to NULLSPACE_DATA.",
    )
