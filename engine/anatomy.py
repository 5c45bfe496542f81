"""Which matrices write to the residual stream (ENGINE.md, "Anatomy").

Writers are found by what they do, one decoder block at a time, on random input: what a writer says
moves the stream by just that, and with exactly the writers silent the block leaves the stream what
it was. Whatever else writes breaks that identity, so nothing is missed in silence.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from engine.blocks import accepts, find
from engine.errors import EngineError
from engine.experiment import first
from engine.probe import missing, probe
from engine.writer import Writer
from jobs.spec.protocol import AnatomyReport, WriterReport

__all__ = ["Anatomy", "Writer", "accepts", "examine", "survey"]


@dataclass(frozen=True)
class Anatomy:
    """The decoder of a model.

    blocks     every module once, in the order of their first run; a shared one has its first layer
    uncovered  the writers that no edit reaches
    streams    where a block's output holds several streams: the axis, -1 for (B, T, P·d)
    """

    architecture: str
    layers: int
    hidden: int
    writers: list[Writer]
    blocks: list[nn.Module]
    uncovered: list[WriterReport] = field(default_factory=list)
    streams: int | None = None

    def stream_of(self, value: Any) -> Tensor:
        """The stream (B, T, d) in what a block takes as its stream or gives.

        Of several streams it is their mean (hyper-connections write to all of them), or the first
        where they are the outermost axis: AltUp computes on that one (arXiv 2301.13310).
        """
        states: Tensor = first(value)
        if self.streams is None:
            return states
        if self.streams == 0:
            return states[0]
        if self.streams == -1:
            states = states.reshape(*states.shape[:-1], -1, self.hidden)
        return states.mean(dim=2)

    def shares(self) -> dict[str, float]:
        """What part of the writing parameters each kind of writer holds, 0..1.

        The kinds are attention, mlp, experts (stacks and lists of them) and missed.
        """
        sizes: dict[str, int] = {}
        for w in self.writers:
            kind = "experts" if w.experts or ".experts." in w.name else str(w.component)
            sizes[kind] = sizes.get(kind, 0) + prod(w.shape)
        for report in self.uncovered:
            sizes["missed"] = sizes.get("missed", 0) + (prod(report.shape) if report.shape else 0)
        whole = sum(sizes.values())
        return {kind: size / whole for kind, size in sizes.items()} if whole else {}

    @property
    def coverage(self) -> float:
        """Share of the writing parameters that edits reach, 0..1."""
        covered = sum(prod(w.shape) for w in self.writers)
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
                shape=w.shape,
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
            shares=self.shares(),
        )


def survey(model: nn.Module, allow_partial: bool = False) -> Anatomy:
    """`examine`, refusing a model whose writers are not all known.

    Raises `unsupported_architecture` with the list of what would have been left unedited. With
    `allow_partial` that list is only in the report, as long as there is something to edit.
    """
    anatomy = examine(model)
    if anatomy.uncovered and not (allow_partial and anatomy.writers):
        missed = [f"{w.name} {list(w.shape)}: {w.reason}" for w in anatomy.uncovered]
        more = f" and {len(missed) - 3} more" if len(missed) > 3 else ""
        raise EngineError(
            "unsupported_architecture",
            f"{anatomy.architecture}: the edit would reach only {anatomy.coverage:.1%} of the "
            f"parameters that write to the residual stream; missed: {'; '.join(missed[:3])}{more}",
            "Set `allow_partial` to edit the rest, or choose another model.",
            "\n".join(missed),
        )
    return anatomy


@torch.no_grad()
def examine(model: nn.Module) -> Anatomy:
    """Find and probe the decoder blocks of a loaded model; costs about 20 passes of 11 tokens.

    Raises `unsupported_architecture` where no decoder blocks are found.
    """
    was_training = model.training
    model.eval()
    try:
        found = find(model)
        writers: list[Writer] = []
        uncovered: list[WriterReport] = []
        readers: set[str] = set()
        idle: list[tuple[int, str, str]] = []
        expected: dict[type[nn.Module], frozenset[str]] = {}
        for layer, (name, block) in enumerate(zip(found.names, found.modules, strict=True)):
            call = found.calls.get(id(block))
            if call is None:
                uncovered.append(missing(name, layer, (), "the block was not run"))
                continue
            result = probe(block, call, name, layer, found.hidden, expected.get(type(block)))
            expected[type(block)] = result.keys
            writers += result.writers
            uncovered += result.missed
            readers |= result.readers
            idle += [(layer, key, path) for key, paths in result.idle.items() for path in paths]
        for name, reason in found.gaps:
            layer = found.names.index(name) if name in found.names else len(found.names) - 1
            uncovered.append(missing(name, layer, (), reason))
        for layer, key, path in idle:
            if key not in readers:  # keys and values that a layer takes from another
                uncovered.append(missing(path, layer, (), "it may write, but text does not run it"))
    finally:
        model.train(was_training)
    return Anatomy(
        type(model).__name__,
        len(found.modules),
        found.hidden,
        writers,
        found.modules,
        uncovered,
        found.streams,
    )
