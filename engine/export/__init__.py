"""Artifacts: the merged model, a PEFT adapter, their card, each file with its sha256."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from engine.anatomy import Anatomy
from engine.change import Change
from engine.checkpoint import open_checkpoint
from engine.errors import EngineError
from engine.export.adapter import Adapter, write_adapter
from engine.export.card import CardFacts, render
from engine.export.folder import Folder
from engine.export.merged import write_merged
from engine.export.original import edited_writers, lowered_biases
from engine.load import Loaded
from engine.loading.architecture import auto_class
from engine.report import Report
from engine.routers import Bias, Suppression
from jobs.spec.manifest import NAME as MANIFEST
from jobs.spec.protocol import Export, Exported, ExportedFile
from jobs.spec.scores import Role, Scores

CARD = "README.md"
Measure = Callable[[Path], dict[Role, Scores]]
Describe = Callable[[list[ExportedFile], dict[Role, Scores]], bytes]


def write(
    loaded: Loaded,
    anatomy: Anatomy,
    changes: Sequence[Change | None],
    request: Export,
    report: Report,
    measure: Measure | None = None,
    describe: Describe | None = None,
    suppressions: Sequence[tuple[Bias, Suppression]] = (),
) -> Exported:
    """Write the artifact into `request.directory`.

    `changes` has an entry per writer of the anatomy, `suppressions` the routers' biases that are
    lowered. `measure` is called with that folder when all but the card is written; what it returns
    stands on the card and in the answer. `describe` makes the manifest from the files so far and
    the scores.

    Raises disk_full (nothing stays in the folder), unsupported_architecture for a checkpoint
    whose tensors are not the writers' and for an adapter of lowered biases, bad_request for an
    adapter of an edit that edits nothing.
    """
    began = time.monotonic()
    checkpoint = open_checkpoint(loaded.source, loaded.name)
    if loaded.packed and request.kind == "merged":
        raise EngineError(
            "unsupported_architecture",
            f"{loaded.name} is quantised already ({loaded.packed}): its weights cannot be edited "
            "in place",
            "Export kind adapter, or search with the model's unquantised release.",
        )
    if suppressions and request.kind != "merged":
        raise EngineError(
            "unsupported_architecture",
            "router: an adapter cannot hold the bias of a router "
            f"({suppressions[0][0].name}), which this candidate lowers",
            "Export it with kind merged.",
        )
    edited = edited_writers(checkpoint, loaded.model, anatomy, changes, bool(loaded.packed))
    adapter: Adapter | None = None
    with Folder(Path(request.directory)) as folder:
        if request.kind == "merged":
            lowered = lowered_biases(checkpoint, loaded.model, suppressions)
            write_merged(folder, checkpoint, edited, lowered, report)
        elif not edited:
            raise EngineError(
                "bad_request",
                "candidate: it edits no layer, so there is no adapter to write",
                "Pick a candidate whose strength is not 0 everywhere.",
            )
        else:
            plain = request.kind == "lora"
            adapter = write_adapter(
                folder, checkpoint, edited, plain, request.rank,
                loaded.name, loaded.commit, any(w.experts for w in anatomy.writers), report,
            )  # fmt: skip
        measured = measure(folder.path) if measure else {}
        if describe is not None:
            folder.write(MANIFEST, [describe(list(folder.files.values()), measured)])
        card = {**request.card, **({"measured": measured} if measured else {})}
        facts = _facts(loaded, anatomy, changes, request, adapter, len(suppressions))
        folder.write(CARD, [render(card, facts).encode()])
        files = folder.seal()
    return Exported(
        files=files,
        truncation_error=adapter.worst_error if adapter else None,
        measured=measured,
        seconds=time.monotonic() - began,
    )


def _facts(
    loaded: Loaded,
    anatomy: Anatomy,
    changes: Sequence[Change | None],
    request: Export,
    adapter: Adapter | None,
    lowered: int,
) -> CardFacts:
    return CardFacts(
        base=loaded.name,
        commit=loaded.commit,
        kind=request.kind,
        candidate=request.candidate,
        quantization=loaded.quantization,
        dtype=str(loaded.dtype).removeprefix("torch."),
        versions=loaded.versions,
        adapter=adapter,
        edited=_edited(anatomy, changes, lowered),
        factory=auto_class(loaded.model.config, loaded.name).__name__,
    )


def _edited(anatomy: Anatomy, changes: Sequence[Change | None], lowered: int) -> str:
    """Such as "30 of 32 matrices, 24 of 24 stacks of 8 experts, biases of 24 routers"."""
    found: dict[int, list[bool]] = {}
    for writer, change in zip(anatomy.writers, changes, strict=True):
        found.setdefault(writer.experts, []).append(change is not None)
    parts = [
        f"{sum(which)} of {len(which)} "
        + (f"stacks of {experts} experts" if experts else "matrices")
        for experts, which in sorted(found.items())
    ]
    return ", ".join([*parts, *([f"biases of {lowered} routers"] if lowered else [])])
