"""The edited writers' original weights: their tensors in the checkpoint, found and verified."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.anatomy import Anatomy, Writer
from engine.checkpoint import Checkpoint, Entry
from engine.directions import Directions
from engine.edit import STRIP
from engine.errors import EngineError
from jobs.spec.candidate import Candidate

# nf4 differs from its original by about 0.09 of the norm, a wrong tensor by about 1.4.
ALIKE = 0.3


@dataclass(frozen=True)
class Edited:
    """One writer that the candidate edits: its tensor in the checkpoint, v (d) and λ."""

    writer: Writer
    entry: Entry
    v: Tensor
    lam: float

    def oriented(self, tensor: Tensor) -> Tensor:
        """The stored tensor as W (d, n), or back: a view."""
        return self.writer.oriented(tensor)


def edited_writers(
    checkpoint: Checkpoint, anatomy: Anatomy, directions: Directions, candidate: Candidate
) -> list[Edited]:
    """The writers with λ ≠ 0, in the anatomy's order.

    Raises unsupported_architecture where a writer has no tensor of its own in the checkpoint.
    """
    table = directions.of(candidate)
    found = []
    for writer in anatomy.writers:
        lam = candidate.kernel(writer.component).weight(writer.layer)
        if lam != 0:
            found.append(Edited(writer, locate(checkpoint, writer), table[writer.layer], lam))
    return found


def locate(checkpoint: Checkpoint, writer: Writer) -> Entry:
    """The checkpoint's tensor of a writer, by name.

    Names in checkpoints may lack or have other prefixes than modules (`transformer.`, `model.`,
    `language_model.`): the longest common ending, at least from the layer number on, decides.
    """
    parts = [*writer.name.split("."), "weight"]
    number = max(i for i, part in enumerate(parts) if part == str(writer.layer))
    for start in range(number):
        tail = ".".join(parts[start:])
        hits = [n for n in checkpoint.tensors if n == tail or n.endswith("." + tail)]
        if len(hits) == 1:
            return checkpoint.tensors[hits[0]]
        if hits:
            break
    raise EngineError(
        "unsupported_architecture",
        f"{writer.name}: the original safetensors hold no tensor of this writer",
        "Export of this checkpoint's layout is not supported; search with another release of it.",
    )


def verified(checkpoint: Checkpoint, edited: Edited) -> Tensor:
    """The stored tensor, after a check that it is what the loaded model holds.

    Raises unsupported_architecture for a tensor of another shape or other content.
    """
    stored = checkpoint.read(edited.entry)
    writer = edited.writer
    loaded = writer.weight()
    original = edited.oriented(stored)
    if original.shape != loaded.shape:
        fault = f"has shape {list(original.shape)}, the model {list(loaded.shape)}"
    else:
        error = size = 0.0
        for rows in range(0, len(loaded), STRIP):
            there = loaded[rows : rows + STRIP]
            here = original[rows : rows + STRIP].to(there.device, torch.float32)
            error += float((here - there).square().sum())
            size += float(there.square().sum())
        if error <= ALIKE**2 * size:
            return stored
        fault = "holds other values than the loaded model"
    raise EngineError(
        "unsupported_architecture",
        f"{writer.name}: its tensor {edited.entry.name} {fault}",
        "Export of this checkpoint's layout is not supported; search with another release of it.",
    )


def originals(checkpoint: Checkpoint, edited: list[Edited]) -> Iterator[tuple[Edited, Tensor]]:
    """Each edited writer with its W (d, n) as stored; one tensor in memory at a time."""
    for one in edited:
        yield one, one.oriented(verified(checkpoint, one))
