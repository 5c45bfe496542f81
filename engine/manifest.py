"""Writes down what an artifact's bytes depend on (`jobs.spec.manifest`)."""

from __future__ import annotations

import hashlib
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from engine.checkpoint import open_checkpoint
from engine.export.folder import read_chunks
from engine.machine import machine
from engine.preparation import Ready
from engine.report import Report
from jobs.spec.manifest import NAME, Manifest, Source, hashes, without_prompts
from jobs.spec.protocol import Export, ExportedFile
from jobs.spec.scores import Role, Scores

_HASH = re.compile(r"[0-9a-f]{64}")
LEFT_OUT = ("README.md", "SHA256SUMS", NAME)


def manifest(
    ready: Ready,
    request: Export,
    files: list[ExportedFile],
    measured: dict[Role, Scores],
    report: Report,
) -> Manifest:
    """The manifest of an artifact whose `files` are written."""
    loaded, prepared = ready.loaded, ready.prepared
    return Manifest(
        nullspace=_own_version(),
        source=Source(
            model=loaded.name, commit=loaded.commit, files=_sources(loaded.source, report)
        ),
        settings=without_prompts(ready.request, prepared.batch_size),
        dtype=prepared.dtype,
        response_prefix=prepared.response_prefix,
        template=ready.formatter.settings,
        prompts=hashes(ready.request.prompts),
        sets=request.card.get("prompts"),
        candidate=request.candidate,
        kind=request.kind,
        rank=request.rank,
        versions=prepared.versions,
        machine=machine(loaded.device, loaded.device_name),
        measured=measured,
        files=[file for file in files if file.name not in LEFT_OUT],
    )


def _own_version() -> str:
    try:
        return version("nullspace")
    except PackageNotFoundError:
        return "unknown"


def _sources(folder: Path, report: Report) -> list[ExportedFile]:
    """The weight files with their hashes."""
    found = []
    for name in open_checkpoint(folder, folder.name).files:
        path = folder / name
        sha256 = _sha256(path, report)
        found.append(ExportedFile(name=name, size=path.stat().st_size, sha256=sha256))
    return found


def _sha256(path: Path, report: Report) -> str:
    """A file's hash; the hub's cache names its files by it, so that they need not be read."""
    blob = path.resolve()
    if blob.parent.name == "blobs" and _HASH.fullmatch(blob.name):
        return blob.name
    digest, done, size = hashlib.sha256(), 0, path.stat().st_size
    for chunk in read_chunks(path):
        digest.update(chunk)
        done += len(chunk)
        report.progress("manifest", done, size, path.name)
    return digest.hexdigest()
