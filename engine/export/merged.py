"""The whole model with the edit, written tensor by tensor from the original safetensors.

Shapes and dtypes do not change, so each file keeps its header and its order of tensors; only the
bytes of edited tensors are new. Peak memory is one tensor and its replacement.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from engine.checkpoint import INDEX, Checkpoint
from engine.edit import rewrite
from engine.errors import EngineError
from engine.export.folder import Folder, read_chunks
from engine.export.original import Edited, verified
from engine.hub import is_plain
from engine.report import Report
from jobs.spec.candidate import EditMode


def write_merged(
    folder: Folder, checkpoint: Checkpoint, edited: list[Edited], mode: EditMode, report: Report
) -> None:
    """Write weights, index, configuration and tokenizer files into `folder`."""
    source = checkpoint.folder
    plain = sorted(p for p in source.iterdir() if is_plain(p.name) and p.is_file())
    total = sum((source / name).stat().st_size for name in checkpoint.files)
    folder.need(total + sum(p.stat().st_size for p in plain))
    done = 0
    for name in checkpoint.files:
        own = {e.entry.begin: e for e in edited if e.entry.file == name}

        def chunks(name: str = name, own: dict[int, Edited] = own) -> Iterator[bytes | memoryview]:
            nonlocal done
            for chunk in _file(checkpoint, name, own, mode):
                yield chunk
                done += len(chunk)
                report.progress("export", done, total, name)

        folder.write(name, chunks())
    if (source / INDEX).is_file():
        folder.copy(source / INDEX)
    for path in plain:
        folder.copy(path)


def _file(
    checkpoint: Checkpoint, name: str, own: dict[int, Edited], mode: EditMode
) -> Iterator[bytes | memoryview]:
    """The bytes of one safetensors file, edited tensors replaced in their places."""
    path, position = checkpoint.folder / name, 0
    for begin in sorted(own):
        one = own[begin]
        yield from read_chunks(path, position, begin)
        yield _bytes(checkpoint, one, mode)
        position = begin + one.entry.size
    yield from read_chunks(path, position)


def _bytes(checkpoint: Checkpoint, one: Edited, mode: EditMode) -> memoryview:
    """The new tensor as stored; float64 arithmetic, rounded once to the stored dtype."""
    stored = verified(checkpoint, one)
    new = rewrite(one.oriented(stored), one.v, one.lam, mode)
    if not torch.isfinite(new.sum(dtype=torch.float64)):
        raise EngineError(
            "engine_failed",
            f"{one.writer.name}: the edited weight overflows {one.entry.dtype}",
            "Pick a candidate with smaller weights.",
        )
    back = one.oriented(new).contiguous()
    return memoryview(back.reshape(-1).view(torch.uint8).numpy().data)
