"""What counts as the residual stream, and what is heard of it while a block runs.

A block may carry one stream or several (hyper-connections, AltUp), norm it (post-norm), scale it
per channel, or mix its streams with a number per token. None of these can hold a matrix that
writes. So the stream of a token is a span of vectors: those that enter the block, and whatever
modules without a matrix make of vectors in that span.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from engine.writer import linear_width


def rows(value: Any, tokens: int, d: int) -> Tensor | None:
    """A tensor as (T, P, d), float32, a copy: P streams of T tokens; None where it is no stream.

    Layouts: (T, d), (1, T, d), (T, 1, d), (1, T, P, d), (P, 1, T, d) and (1, T, P·d).
    """
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() < 2:
        return None
    lead = value.shape[:-1]
    if value.shape[-1] % d or value.numel() == 0 or tokens not in lead:
        return None
    axis = max(k for k, size in enumerate(lead) if size == tokens)
    copy = value.detach().to(torch.float32, copy=True)
    return copy.movedim(axis, 0).reshape(tokens, -1, d)


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether two streams are equal but for an error of `tolerance` of b's norm."""
    return a.shape == b.shape and bool((a - b.to(a.device)).norm() <= tolerance * b.norm())


class Span:
    """Per token, the vectors spanned by all that was added; an orthonormal basis (T, m, d)."""

    def __init__(self, tolerance: float) -> None:
        """`tolerance`: the relative error up to which a vector is said to lie in the span."""
        self.tolerance = tolerance
        self._basis: Tensor | None = None

    def outside(self, vectors: Tensor) -> Tensor:
        """The part of `vectors` (T, P, d) that is orthogonal to the span."""
        if self._basis is None:
            return vectors
        basis = self._basis.to(vectors.device)
        for _ in range(2):  # twice is enough (Kahan, Parlett)
            vectors = vectors - (vectors @ basis.mT) @ basis
        return vectors

    def holds(self, vectors: Tensor) -> bool:
        """Whether `vectors` (T, P, d) lie in the span; zero does."""
        size = vectors.norm()
        return bool(size.isfinite() and self.outside(vectors).norm() <= self.tolerance * size)

    def add(self, vectors: Tensor) -> None:
        """Widen the span by `vectors` (T, P, d); a quarter of the space is left, to tell by."""
        for p in range(vectors.shape[1]):
            new = vectors[:, p : p + 1]
            if self._basis is not None and self._basis.shape[1] >= new.shape[-1] * 3 // 4:
                return
            rest = self.outside(new)
            size = rest.norm(dim=-1, keepdim=True)
            fresh = size > self.tolerance / 10 * new.norm(dim=-1, keepdim=True)
            if bool(fresh.any()):
                unit = torch.where(fresh, rest / size.clamp_min(1e-30), 0.0)
                known = [] if self._basis is None else [self._basis.to(unit.device)]
                self._basis = torch.cat([*known, unit], dim=1)


Key = tuple[str, int, str, int]  # module, how often it was called before, "in" or "out", which


@dataclass
class Sound:
    """All stream-shaped tensors that go into and come out of the modules of a block, in order."""

    heard: dict[Key, Tensor] = field(default_factory=dict)
    inputs: dict[Key, list[Key]] = field(default_factory=dict)  # of each output


@contextlib.contextmanager
def listening(block: nn.Module, tokens: int, d: int) -> Iterator[Sound]:
    """Record what the modules of a block are given and give, while the context lasts."""
    sound = Sound()
    calls: dict[str, int] = {}
    entered: dict[str, list[Key]] = {}

    def before(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[name] = calls.get(name, -1) + 1
            entered[name] = []
            for k, value in enumerate([*args, *kwargs.values()]):
                if (found := rows(value, tokens, d)) is not None:
                    key = (name, calls[name], "in", k)
                    sound.heard[key] = found
                    entered[name].append(key)

        return hook

    def after(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            for k, value in enumerate(out if isinstance(out, (tuple, list)) else [out]):
                if (found := rows(value, tokens, d)) is not None:
                    key = (name, calls[name], "out", k)
                    sound.heard[key] = found
                    sound.inputs[key] = entered[name]

        return hook

    hooks: list[Any] = []
    for name, module in block.named_modules():
        if name:
            hooks.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
            hooks.append(module.register_forward_hook(after(name)))
    try:
        yield sound
    finally:
        for hook in hooks:
            hook.remove()


def is_matrix(parameter: Tensor) -> bool:
    """Whether a parameter has at least two dimensions that are not 1."""
    return sum(size > 1 for size in parameter.shape) >= 2


def free_of_matrices(module: nn.Module) -> bool:
    """Whether nothing in a module can mix channels: norms, scales, depthwise convolutions."""
    return not any(
        linear_width(m) is not None  # whose weight may be packed into a vector
        or (
            any(is_matrix(p) for p in m.parameters(recurse=False))
            and not (isinstance(m, nn.Conv1d) and m.groups == m.in_channels)
        )
        for m in module.modules()
    )


def follow(block: nn.Module, sound: Sound, span: Span) -> set[Key]:
    """The keys at which the stream was heard; `span` is widened on the way.

    Whatever modules without a matrix make of the stream alone is the stream again, and so is the
    stream times a vector that a module holds beside its parts (Doge's residual weights).
    """
    free = {name for name, module in block.named_modules() if free_of_matrices(module)}
    scales = [
        p.detach().flatten().float()
        for name, module in block.named_modules()
        if name not in free
        for key, p in module.named_parameters(recurse=False)
        if not is_matrix(p) and p.dim() and "bias" not in key
    ]
    found: set[Key] = set()
    for key, value in sound.heard.items():
        inputs = sound.inputs.get(key)
        if inputs and key[0] in free and all(span.holds(sound.heard[k]) for k in inputs):
            span.add(value)
        if span.holds(value) and bool(value.any()):
            found.add(key)
            for scale in scales:
                if scale.numel() == value.shape[-1] and key[2] == "in":
                    span.add(value * scale.to(value.device))
    return found
