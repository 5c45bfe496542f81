"""Artifacts: the merged model, a PEFT adapter, their card, each file with its sha256."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from engine.anatomy import Anatomy
from engine.checkpoint import open_checkpoint
from engine.directions import Directions
from engine.errors import EngineError
from engine.export.adapter import Adapter, write_adapter
from engine.export.card import CardFacts, render
from engine.export.folder import Folder
from engine.export.merged import write_merged
from engine.export.original import edited_writers
from engine.load import Loaded
from engine.report import Report
from jobs.spec.protocol import Export, Exported
from jobs.spec.scores import Role, Scores

CARD = "README.md"
Measure = Callable[[Path], dict[Role, Scores]]


def write(
    loaded: Loaded,
    anatomy: Anatomy,
    directions: Directions,
    request: Export,
    report: Report,
    measure: Measure | None = None,
) -> Exported:
    """Write the artifact into `request.directory`.

    `measure` is called with that folder when all but the card is written; what it returns stands
    on the card and in the answer.

    Raises disk_full (nothing stays in the folder), unsupported_architecture for a checkpoint
    whose tensors are not the writers', bad_request for an adapter of an edit that edits nothing.
    """
    began = time.monotonic()
    checkpoint = open_checkpoint(loaded.source, loaded.name)
    edited = edited_writers(checkpoint, anatomy, directions, request.candidate)
    mode = request.candidate.mode
    adapter: Adapter | None = None
    with Folder(Path(request.directory)) as folder:
        if request.kind == "merged":
            write_merged(folder, checkpoint, edited, mode, report)
        elif not edited:
            raise EngineError(
                "bad_request",
                "candidate: it edits no layer, so there is no adapter to write",
                "Pick a candidate whose strength is not 0 everywhere.",
            )
        else:
            plain = request.kind == "lora"
            adapter = write_adapter(
                folder, checkpoint, edited, mode, plain, request.rank,
                loaded.name, loaded.commit, report,
            )  # fmt: skip
        measured = measure(folder.path) if measure else {}
        card = {**request.card, **({"measured": measured} if measured else {})}
        folder.write(CARD, [render(card, _facts(loaded, request, adapter)).encode()])
        files = folder.seal()
    return Exported(
        files=files,
        truncation_error=adapter.worst_error if adapter else None,
        measured=measured,
        seconds=time.monotonic() - began,
    )


def _facts(loaded: Loaded, request: Export, adapter: Adapter | None) -> CardFacts:
    return CardFacts(
        base=loaded.name,
        commit=loaded.commit,
        kind=request.kind,
        candidate=request.candidate,
        quantization=loaded.quantization,
        dtype=str(loaded.dtype).removeprefix("torch."),
        versions=loaded.versions,
        adapter=adapter,
    )
