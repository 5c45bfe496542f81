"""The whole model with the edit, written matrix by matrix from the original safetensors.

Shapes and dtypes do not change, so each file keeps its header and its order of tensors; only the
bytes of what is edited are new. Peak memory is two matrices: one is made while one is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from engine.change import rewrite
from engine.checkpoint import INDEX, Checkpoint, Entry
from engine.errors import EngineError
from engine.export.folder import Folder, read_chunks
from engine.export.original import Edited, Lowered, original, original_bias
from engine.hub import is_plain
from engine.report import Report


@dataclass(frozen=True)
class Replacement:
    """New bytes for a part of a file: `make` gives them in the stored layout and dtype."""

    entry: Entry
    make: Callable[[], Tensor]


def write_merged(
    folder: Folder,
    checkpoint: Checkpoint,
    edited: list[Edited],
    lowered: list[Lowered],
    report: Report,
) -> None:
    """Write weights, index, configuration, tokenizer and processor files into `folder`.

    Raises unsupported_architecture for an affine edit of a writer without a bias to hold it.
    """
    source = checkpoint.folder
    parts = [part for one in edited for part in replacements(checkpoint, one)]
    parts += [Replacement(one.entry, partial(_lowered, checkpoint, one)) for one in lowered]
    plain = sorted(p for p in source.iterdir() if is_plain(p.name) and p.is_file())
    total = sum((source / name).stat().st_size for name in checkpoint.files)
    folder.need(total + sum(p.stat().st_size for p in plain))
    done = 0
    for name in checkpoint.files:
        own = sorted((p for p in parts if p.entry.file == name), key=lambda p: p.entry.begin)

        def chunks(name: str = name, own: list[Replacement] = own) -> Iterator[memoryview]:
            nonlocal done
            for chunk in _file(checkpoint, name, own):
                yield chunk
                done += len(chunk)
                report.progress("export", done, total, name)

        folder.write(name, chunks())
    if (source / INDEX).is_file():
        folder.copy(source / INDEX)
    for path in plain:
        folder.copy(path)


def replacements(checkpoint: Checkpoint, one: Edited) -> list[Replacement]:
    """The parts of the checkpoint that a writer's change replaces."""

    def matrix(k: int) -> Callable[[], Tensor]:
        return lambda: _matrix(checkpoint, one, k)

    found = [Replacement(entry, matrix(k)) for k, entry in enumerate(one.entries)]
    if one.shift() is None:
        return found
    if one.bias is None:
        raise EngineError(
            "unsupported_architecture",
            f"affine: {one.writer.name} has no bias, which a merged model needs to hold the "
            "harmless mean",
            "Export it with kind adapter, which brings biases of its own (lora_bias), or pick a "
            "candidate that is not affine.",
        )
    return [*found, Replacement(one.bias, lambda: _bias(checkpoint, one))]


def _file(checkpoint: Checkpoint, name: str, own: list[Replacement]) -> Iterator[memoryview]:
    """The bytes of one safetensors file, edited matrices replaced in their places."""
    path, position = checkpoint.folder / name, 0
    for part in own:
        yield from read_chunks(path, position, part.entry.begin)
        yield part.make().reshape(-1).view(torch.uint8).numpy().data
        position = part.entry.begin + part.entry.size
    yield from read_chunks(path, position)


def _matrix(checkpoint: Checkpoint, one: Edited, k: int) -> Tensor:
    """The new matrix; float64 arithmetic, rounded once to the stored dtype."""
    W = original(checkpoint, one, k)
    new = rewrite(W, one.change, out=W)
    if not all(bool(end.isfinite()) for end in new.aminmax()):
        raise EngineError(
            "engine_failed",
            f"{one.writer.name}: the edited weight overflows {one.entries[k].dtype}",
            "Pick a candidate with smaller weights.",
        )
    return new if new.is_contiguous() else new.T


def _bias(checkpoint: Checkpoint, one: Edited) -> Tensor:
    """The new bias (d), rounded once."""
    shift = one.shift()
    assert one.bias is not None and shift is not None
    bias = checkpoint.read(one.bias)
    return (bias.double() + shift.double().cpu()).to(bias.dtype)


def _lowered(checkpoint: Checkpoint, one: Lowered) -> Tensor:
    """A router's new bias, rounded once to the stored dtype."""
    return one.suppression.of(original_bias(checkpoint, one))
