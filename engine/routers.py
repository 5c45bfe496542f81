"""Routers of mixtures of experts: their biases, and which experts harmful prompts choose.

Suppressing an expert is lowering its entry of the bias that its router adds to the scores before it
takes the best k: fewer tokens reach it, and no weight of it changes (SteerMoE, arXiv 2509.09660,
adds to the scores; a bias that the model has already holds the same, and can be exported).

A bias is found by what it does: among the vectors beside a stack of experts, the one of which an
entry far up makes every token choose that expert, and the same entry far down makes none.

Frequencies are taken at the tokens that all prompts end with (the template's and the response
prefix, at least the last one): there the whole request has been read and the answer begins, and the
words are the same on both sides, so that a difference of frequencies is one of harm and not one of
vocabulary or length.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from engine.anatomy import Anatomy, Writer
from engine.decode import Decoder
from engine.errors import EngineError
from engine.report import Report
from engine.routing import frequencies
from jobs.spec import candidate

FAR = 1e4  # beyond every score, within float16's range


@dataclass(frozen=True)
class Suppression:
    """What one router's bias loses: `bias` in the entries of `experts`, ascending."""

    experts: tuple[int, ...]
    bias: float

    def of(self, held: Tensor) -> Tensor:
        """The new bias, in the shape and dtype of the old one; float64, rounded once."""
        new = held.to(torch.float64, copy=True)
        new.view(-1)[list(self.experts)] -= self.bias
        return new.to(held.dtype)


@dataclass(frozen=True)
class Bias:
    """A vector of the model: the attribute `attribute` of `module`, whole name `name`."""

    name: str
    module: nn.Module
    attribute: str

    @property
    def held(self) -> Tensor:
        """Its data: (E) or (1, E), or longer where the router knows choices without an expert."""
        tensor: Tensor = getattr(self.module, self.attribute)
        return tensor.detach()


@dataclass(frozen=True, eq=False)
class Router:
    """A router that has a bias.

    chosen       k, experts per token
    difference   (E) frequency at harmful minus that at harmless prompts, -1..1, float64
    """

    bias: Bias
    layer: int
    chosen: int
    difference: Tensor

    def suppression(self, wanted: candidate.Router | None) -> Suppression | None:
        """What `wanted` is here; None where nothing changes.

        Only experts that harmful prompts choose more often, and so few that k others are left.
        """
        if wanted is None or wanted.bias == 0:
            return None
        ranked = self.difference.argsort(descending=True, stable=True).tolist()
        most = min(wanted.experts, max(0, len(ranked) - self.chosen))
        taken = sorted(e for e in ranked[:most] if self.difference[e] > 0)
        return Suppression(tuple(taken), wanted.bias) if taken else None


def find_routers(
    decoder: Decoder,
    anatomy: Anatomy,
    harmful: Sequence[list[int]],
    harmless: Sequence[list[int]],
    report: Report,
) -> tuple[Router, ...]:
    """The routers with a bias, from the token ids of both sides' prompts; one forward of each
    prompt, and two of a pair of them for each kind of vector that might be a bias.

    Raises `unsupported_architecture` where there is none.
    """
    stacks = [w for w in anatomy.writers if w.experts > 1]
    biases = _biases(decoder, anatomy, stacks, [harmful[0], harmless[0]], report)
    if not biases:
        fault = f"router: {anatomy.architecture} has no mixture of experts"
        if stacks:
            fault = (
                f"router: no mixture of experts of {anatomy.architecture} has a router with a "
                "bias that decides which experts are chosen"
            )
        mend = "Choose methods other than router for this model: mpoa edits the experts' weights."
        raise EngineError("unsupported_architecture", fault, mend)
    tail = shared_tail([*harmful, *harmless])
    bad, good = (frequencies(decoder, stacks, side, tail, report) for side in (harmful, harmless))
    found = tuple(
        Router(biases[w.name], w.layer, bad[w.name].chosen, bad[w.name].share - good[w.name].share)
        for w in stacks
        if w.name in biases
    )
    most = max(found, key=lambda router: float(router.difference.max()))
    report.log(
        f"routers: {len(found)} of {len(stacks)} mixtures of experts have a bias; watched at the "
        f"last {tail} tokens; harmful prompts choose expert {int(most.difference.argmax())} of "
        f"layer {most.layer} more often by {100 * float(most.difference.max()):.1f} points"
    )
    return found


def shared_tail(inputs: Sequence[list[int]]) -> int:
    """How many tokens all of `inputs` end with; 1 at least."""
    return max(1, _agreeing(reversed(ids) for ids in inputs))


def _biases(
    decoder: Decoder,
    anatomy: Anatomy,
    stacks: Sequence[Writer],
    inputs: Sequence[list[int]],
    report: Report,
) -> dict[str, Bias]:
    """The bias of each stack's router, by the stack's name; vectors of one kind in one go.

    The last expert is tried: where a router knows choices without an expert, the first ones may
    stand for those too.
    """
    found: dict[str, Bias] = {}
    tail = min(map(len, inputs))
    for tried in _kinds(decoder.model, anatomy, stacks):
        tried = {stack: bias for stack, bias in tried.items() if stack.name not in found}
        shares = []
        for far in (FAR, -FAR) if tried else ():
            with _moved(tried.items(), far):
                shares.append(frequencies(decoder, [*tried], inputs, tail, report))
        for stack, bias in tried.items():
            ends = [float(each[stack.name].share[-1]) for each in shares if stack.name in each]
            if ends == [1.0, 0.0]:
                found[stack.name] = bias
    return found


def _kinds(
    model: nn.Module, anatomy: Anatomy, stacks: Sequence[Writer]
) -> list[dict[Writer, Bias]]:
    """What may be a router's bias, by its name without numbers; what is near to experts first."""
    paths = {id(module): name for name, module in model.named_modules()}
    kinds: dict[str, dict[Writer, Bias]] = {}
    near: dict[str, int] = {}
    for stack in stacks:
        block = anatomy.blocks[stack.layer]
        owner = stack.name.rpartition(".")[0].split(".")
        for path, module in block.named_modules(prefix=paths[id(block)]):
            parts = path.split(".")
            if parts[: len(owner)] == owner:
                continue
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            for attribute, tensor in own:
                if not (tensor.is_floating_point() and _fits(tensor, stack.experts)):
                    continue
                name = f"{path}.{attribute}"
                kind = re.sub(r"[0-9]+", "#", name)
                near[kind] = max(near.get(kind, 0), _agreeing([parts, owner]))
                kinds.setdefault(kind, {})[stack] = Bias(name, module, attribute)
    return [kinds[kind] for kind in sorted(kinds, key=lambda kind: -near[kind])]


def _fits(tensor: Tensor, experts: int) -> bool:
    """Whether a tensor is one vector with an entry per expert, and perhaps some more: for choices
    that no expert stands behind (LongCat's and Zaya's routers)."""
    return max(tensor.shape, default=0) == tensor.numel() and experts <= tensor.numel() <= (
        2 * experts
    )


@contextmanager
def _moved(tried: Iterable[tuple[Writer, Bias]], far: float) -> Iterator[None]:
    """Within the block, the last expert's entry of each vector is moved by `far`."""
    kept: dict[str, tuple[Tensor, Tensor]] = {}
    with torch.no_grad():
        for stack, bias in tried:
            if bias.name not in kept:
                kept[bias.name] = (bias.held, bias.held.clone())
                bias.held.view(-1)[stack.experts - 1] += far
    try:
        yield
    finally:
        with torch.no_grad():
            for held, original in kept.values():
                held.copy_(original)


def _agreeing(sequences: Iterable[Iterable[Any]]) -> int:
    """How many entries all sequences begin with."""
    columns = zip(*sequences, strict=False)
    return sum(1 for _ in takewhile(lambda column: len({*column}) == 1, columns))
