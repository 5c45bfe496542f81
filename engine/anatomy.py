"""Which matrices write to the residual stream (ENGINE.md, "Anatomy").

Writers are found by structure (linear modules whose output is as wide as the stream) and confirmed
by what they do, one decoder block at a time, on random input: with every candidate's output held
at zero the block must be the identity, and a writer's output must appear in the block's output,
scaled or through a norm, and nowhere else. Whatever else writes, such as fused experts, breaks the
identity, so nothing is missed in silence.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import nn

from engine.errors import EngineError
from engine.probe import TOLERANCE, close, missing, probe, record_calls
from engine.writer import Writer
from jobs.spec.protocol import AnatomyReport, WriterReport

__all__ = ["Anatomy", "Writer", "accepts", "examine", "survey"]


@dataclass(frozen=True)
class Anatomy:
    """The decoder of a model. `uncovered` is empty for whatever `survey` returns."""

    architecture: str
    layers: int
    hidden: int
    writers: list[Writer]
    blocks: list[nn.Module]
    uncovered: list[WriterReport] = field(default_factory=list)

    @property
    def coverage(self) -> float:
        """Share of the writing parameters that edits reach, 0..1."""
        covered = sum(w.d * w.n for w in self.writers)
        missed = sum(prod(w.shape) for w in self.uncovered if w.shape)
        if covered + missed == 0 or (self.uncovered and missed == 0):
            return 0.0
        return covered / (covered + missed)

    def report(self) -> AnatomyReport:
        """Every writer, edited or not."""
        found = [
            WriterReport(
                name=w.name,
                layer=w.layer,
                component=w.component,
                shape=(w.d, w.n),
                reason=f"passes {w.via} before it is added" if w.via else "",
            )
            for w in self.writers
        ]
        return AnatomyReport(
            architecture=self.architecture,
            layers=self.layers,
            hidden=self.hidden,
            writers=sorted(found + self.uncovered, key=lambda w: w.layer),
            coverage=self.coverage,
        )


def survey(model: nn.Module) -> Anatomy:
    """`examine`, refusing a model whose writers are not all known.

    Raises `unsupported_architecture` with the list of what would have been left unedited.
    """
    anatomy = examine(model)
    if anatomy.uncovered:
        missed = [f"{w.name} {list(w.shape)}: {w.reason}" for w in anatomy.uncovered]
        more = f" and {len(missed) - 3} more" if len(missed) > 3 else ""
        raise EngineError(
            "unsupported_architecture",
            f"{anatomy.architecture}: the edit would reach only {anatomy.coverage:.1%} of the "
            f"parameters that write to the residual stream; missed: {'; '.join(missed[:3])}{more}",
            "Choose a dense decoder model; this one holds writers that no edit reaches yet.",
            "\n".join(missed),
        )
    return anatomy


@torch.no_grad()
def examine(model: nn.Module) -> Anatomy:
    """Find and probe the decoder blocks of a loaded model; costs about 10 passes of 8 tokens.

    Raises `unsupported_architecture` where no decoder blocks are found.
    """
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    architecture = type(model).__name__
    hidden = int(text.hidden_size)
    name, blocks = _decoder_blocks(model, int(text.num_hidden_layers), architecture)
    was_training = model.training
    model.eval()
    try:
        calls = record_calls(model, blocks, int(text.vocab_size))
        writers: list[Writer] = []
        uncovered: list[WriterReport] = []
        seen: set[int] = set()
        for layer, block in enumerate(blocks):
            prefix = f"{name}.{layer}"
            if id(block) in seen:
                uncovered.append(missing(prefix, layer, (), "the block is shared between layers"))
                continue
            seen.add(id(block))
            call = calls.get(id(block))
            if call is None:
                uncovered.append(missing(prefix, layer, (), "the block was not run"))
                continue
            found, missed = probe(block, call, prefix, layer, hidden)
            writers += found
            uncovered += missed
            after = calls.get(id(blocks[layer + 1])) if layer + 1 < len(blocks) else None
            if after is not None and not close(after.stream, call.output, TOLERANCE):
                uncovered.append(
                    missing(prefix, layer, (), "something writes between this block and the next")
                )
    finally:
        model.train(was_training)
    return Anatomy(architecture, len(blocks), hidden, writers, blocks, uncovered)


def accepts(model: nn.Module, argument: str) -> bool:
    """Whether the model's forward takes a keyword of this name."""
    return argument in inspect.signature(model.forward).parameters


def _decoder_blocks(model: nn.Module, layers: int, who: str) -> tuple[str, list[nn.Module]]:
    """The module list of `layers` decoder blocks, the outermost and largest there is."""
    get = getattr(model, "get_decoder", None)
    decoder = get() if callable(get) else None
    inside = {id(m) for m in decoder.modules()} if isinstance(decoder, nn.Module) else None
    lists = [
        (sum(p.numel() for p in m.parameters()), name, m)
        for name, m in model.named_modules()
        if isinstance(m, nn.ModuleList) and len(m) == layers and (inside is None or id(m) in inside)
    ]
    if not lists:
        raise EngineError(
            "unsupported_architecture",
            f"{who}: no list of {layers} decoder blocks was found",
            "Choose a decoder-only language model.",
        )
    _, name, found = max(lists, key=lambda entry: entry[0])
    return name, list(found)
