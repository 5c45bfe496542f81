"""The edited writers' original weights: their tensors in the checkpoint, found and verified.

A stack of experts is one tensor there, or one per expert, which transformers stacks when it loads
(Mixtral, DeepSeek, Qwen-MoE). Either way each matrix is found alone, as an `Entry` of its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from engine.anatomy import Anatomy, Writer
from engine.change import Change, Update
from engine.checkpoint import FLOATS, Checkpoint, Entry
from engine.errors import EngineError
from engine.routers import Bias, Suppression

# nf4 differs from its original by about 0.09 of the norm, a wrong tensor by about 1.4.
ALIKE = 0.3
SAMPLE = 128  # rows of a matrix that are compared: a wrong tensor differs in every row


@dataclass(frozen=True)
class Edited:
    """One writer that is edited, and what is done to it.

    entries  its matrix in the checkpoint, or those of its experts, each (d, n) or (n, d); none
             of a packed checkpoint
    turned   transformers may transpose them in loading
    bias     its bias (d), where the change moves it
    """

    writer: Writer
    entries: tuple[Entry, ...]
    change: Change
    turned: bool = False
    bias: Entry | None = None

    def shift(self) -> Tensor | None:
        """What the change adds to the bias (d); None where it leaves it."""
        return None if isinstance(self.change, Update) else self.change.bias()


@dataclass(frozen=True)
class Lowered:
    """One router's bias that is lowered, and its tensor in the checkpoint."""

    bias: Bias
    entry: Entry
    suppression: Suppression


def edited_writers(
    checkpoint: Checkpoint, model: Any, anatomy: Anatomy, changes: Sequence[Change | None],
    packed: bool = False,
) -> list[Edited]:  # fmt: skip
    """The writers that are changed, in the anatomy's order; `changes` has an entry per writer.

    Of a `packed` checkpoint the loaded weights, dequantised, stand for the original ones.
    Raises unsupported_architecture where a writer has no tensors of its own in the checkpoint.
    """
    names = stored_names(checkpoint, model)
    found = []
    for writer, change in zip(anatomy.writers, changes, strict=True):
        if change is None:
            continue
        entries, turned = ((), False) if packed else locate(checkpoint, writer, names)
        one = Edited(writer, entries, change, turned)
        if one.shift() is not None and writer.hooked and f"{writer.name}.bias" in names:
            bias = names[f"{writer.name}.bias"].tensors[0]
            one = replace(one, bias=checkpoint.tensors[bias])
        found.append(one)
    return found


def lowered_biases(
    checkpoint: Checkpoint, model: Any, suppressions: Sequence[tuple[Bias, Suppression]]
) -> list[Lowered]:
    """The routers' biases that are lowered, with their tensors.

    Raises unsupported_architecture where a bias has no tensor of its own in the checkpoint.
    """
    names = stored_names(checkpoint, model)
    found = []
    for bias, suppression in suppressions:
        entries = [checkpoint.tensors[name] for name in names.get(bias.name, Stored()).tensors]
        if len(entries) != 1 or entries[0].numel != bias.held.numel():
            raise _refusal(bias.name, "the original safetensors hold no tensor of this bias")
        found.append(Lowered(bias, entries[0], suppression))
    return found


@dataclass
class Stored:
    """How a parameter or a buffer lies in a checkpoint: the names of its tensors, in the order of
    stacking, and whether transformers may transpose them in loading."""

    tensors: list[str] = field(default_factory=list)
    turned: bool = False


def stored_names(checkpoint: Checkpoint, model: Any) -> dict[str, Stored]:
    """The tensors of each parameter and buffer of the loaded model.

    By transformers' own rules of loading: it renames, adds or drops prefixes, and stacks experts.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        Transpose,
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    rules = getattr(model, "_weight_conversions", None) or get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    turning = {
        pattern
        for rule in converters
        for pattern in rule.source_patterns
        if any(isinstance(step, Transpose) for step in rule.operations)
    }
    parameters = dict(model.named_parameters(remove_duplicate=False))
    parameters |= dict(model.named_buffers(remove_duplicate=False))
    found: dict[str, Stored] = defaultdict(Stored)
    for stored in sorted(checkpoint.tensors, key=dot_natural_key):
        name, pattern = rename_source_key(
            stored, renamings, converters, model.base_model_prefix, parameters
        )
        found[name].tensors.append(stored)
        found[name].turned |= pattern in turning
    return found


def locate(
    checkpoint: Checkpoint, writer: Writer, names: Mapping[str, Stored]
) -> tuple[tuple[Entry, ...], bool]:
    """The checkpoint's matrix of a writer, or the matrices of its experts in their order; and
    whether they may be transposed."""
    key = f"{writer.name}.weight" if writer.parameter == "weight" else writer.name
    known = names.get(key, Stored())
    entries = [checkpoint.tensors[name] for name in known.tensors]
    count, size = max(1, writer.experts), writer.d * writer.n
    if len(entries) == 1 and entries[0].numel == count * size:
        whole = entries[0]
        shape, nbytes = (size // whole.shape[-1], whole.shape[-1]), whole.size // count
        entries = [
            replace(whole, shape=shape, begin=whole.begin + k * nbytes, size=nbytes)
            for k in range(count)
        ]
    if len(entries) == count and all(e.numel == size for e in entries):
        return tuple(entries), known.turned
    fault = "hold no tensor of this writer"
    if entries:
        first = entries[0]
        fault = f"hold {len(entries)} tensors for it, such as {first.name} {list(first.shape)}"
    raise _refusal(writer.name, f"the original safetensors {fault}")


def original(checkpoint: Checkpoint, edited: Edited, k: int) -> Tensor:
    """Matrix `k` of a writer as stored, W (d, n), a view in the stored layout.

    Raises unsupported_architecture for a tensor that is not what the loaded model holds.
    """
    writer = edited.writer
    if not edited.entries:
        return writer.weight()[k] if writer.experts else writer.weight()
    entry = edited.entries[k]
    stored = checkpoint.read(entry)
    step = max(1, writer.d // SAMPLE)
    loaded = _loaded(writer, k, slice(None, None, step))
    layouts = (stored.T, stored) if writer.transposed else (stored, stored.T)
    for W in layouts if edited.turned else layouts[:1]:
        if W.shape == (writer.d, writer.n):
            here = W[::step].to(loaded.device, torch.float32)
            if (here - loaded).norm() <= ALIKE * loaded.norm():
                return W
    fault = "holds other values than the loaded model"
    if {*stored.shape} != {writer.d, writer.n}:
        fault = f"has shape {list(stored.shape)}, the model {[writer.d, writer.n]}"
    raise _refusal(writer.name, f"its tensor {entry.name} {fault}")


def original_bias(checkpoint: Checkpoint, lowered: Lowered) -> Tensor:
    """A router's bias as stored.

    Raises unsupported_architecture for a tensor that is not what the loaded model holds.
    """
    stored, held = checkpoint.read(lowered.entry), lowered.bias.held.float().cpu().flatten()
    if (stored.flatten().float() - held).norm() > ALIKE * held.norm():
        raise _refusal(
            lowered.bias.name,
            f"its tensor {lowered.entry.name} holds other values than the loaded model",
        )
    return stored


def _loaded(writer: Writer, k: int, rows: slice) -> Tensor:
    """Rows of the loaded matrix `k`, float32."""
    held: Tensor = getattr(writer.module, writer.parameter)
    if held.dtype not in FLOATS.values():
        return writer.weight()[rows]
    W = writer.oriented(held.detach())
    return (W[k] if writer.experts else W)[rows].float()


def _refusal(name: str, fault: str) -> EngineError:
    return EngineError(
        "unsupported_architecture",
        f"{name}: {fault}",
        "Export of this checkpoint's layout is not supported; search with another release of it.",
    )
