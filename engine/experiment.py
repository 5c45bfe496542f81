"""Runs of one decoder block on a random stream, with some of its candidates silent or speaking."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Iterator, MutableMapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from engine.candidates import Candidate, Speech, playing
from engine.stream import Key, Span, follow, free_of_matrices, listening, rows
from engine.writer import linear_width

# Blocks norm what they read, so their writers are as loud on a quiet stream: what is written then
# stands out, and bfloat16's 8 bits suffice to see it.
LOUDNESS = 0.005
OUTPUT: Key = ("", 0, "out", 0)


@dataclass(frozen=True)
class Call:
    """How the model called a block, and the stream that it was given, as it is laid out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: int | str  # of the stream in args or kwargs
    stream: Tensor
    tokens: int


@dataclass(frozen=True)
class Heard:
    """One run of the block: its output and, in order, what was stream-shaped on the way."""

    points: dict[Key, Tensor]
    stream: set[Key]
    whole: bool  # the output is nothing but the stream


def tolerance(dtype: torch.dtype) -> float:
    """The relative error up to which two outputs of a block are said to be equal."""
    return 5e-4 if dtype in (torch.float32, torch.float64) else 2e-2


class Experiment:
    """One block with the arguments that it was called with and a random stream."""

    def __init__(self, block: nn.Module, call: Call, layer: int, d: int) -> None:
        self.block, self.call, self.d = block, call, d
        self.tolerance = tolerance(call.stream.dtype)
        self.random = torch.Generator().manual_seed(layer)
        self.stream = self.noise()
        self.voices = [self.vector() for _ in range(2)]
        self.others = [
            found
            for value in [*call.args, *call.kwargs.values()]
            if value is not call.stream and (found := rows(value, call.tokens, d)) is not None
        ]

    def noise(self) -> Tensor:
        """A random stream; tokens of different size, so that a norm cannot pass for a factor."""
        like = rows(self.call.stream, self.call.tokens, self.d)
        assert like is not None
        sizes = torch.linspace(0.5, 2, self.call.tokens)
        axis = max(k for k, n in enumerate(self.call.stream.shape[:-1]) if n == self.call.tokens)
        shape = [1] * self.call.stream.dim()
        shape[axis] = self.call.tokens
        drawn = torch.randn(self.call.stream.shape, generator=self.random) * sizes.view(shape)
        return (LOUDNESS * drawn).to(self.call.stream.device, self.call.stream.dtype)

    def vector(self) -> Tensor:
        """v (d), no entry near 0, of mean 0 and rms 1: norms treat all such vectors alike."""
        signs = torch.randint(0, 2, (self.d,), generator=self.random) * 2 - 1
        v = signs * (0.6 + 0.8 * torch.rand(self.d, generator=self.random))
        v = v - v.mean()
        v = (v / v.square().mean().sqrt()).to(self.call.stream.dtype)
        return v.to(self.call.stream.device)

    def run(self, stream: Tensor, call: Call | None = None) -> Tensor:
        """The block's output (T, P, d) for another stream."""
        call = call or self.call
        args, kwargs = [*call.args], dict(call.kwargs)
        if isinstance(call.place, int):
            args[call.place] = stream.clone()
        else:
            kwargs[call.place] = stream.clone()
        found = rows(first(self.block(*args, **kwargs)), call.tokens, self.d)
        assert found is not None
        return found

    def hear(self, speech: Speech, loudness: float = 1.0, trace: bool = False) -> Heard:
        """Run the block while candidates speak; with `trace` tell where the stream is heard."""
        with playing(speech, loudness), listening(self.block, self.call.tokens, self.d) as sound:
            out = self.run(self.stream)
        points = {**sound.heard, OUTPUT: out}
        if not trace:
            return Heard(points, set(), False)
        span = Span(self.tolerance)
        for start in [rows(self.stream, self.call.tokens, self.d), *self.others]:
            assert start is not None
            span.add(start)
        for vector in _biases(self.block, self.d):
            span.add(vector.to(out).expand(self.call.tokens, 1, self.d))
        heard = follow(self.block, sound, span)
        whole = span.holds(out)
        return Heard(points, heard | {OUTPUT} if whole else heard, whole)

    def run_modules(self, among: Collection[Candidate]) -> set[Candidate]:
        """The candidates that a run of the block reaches."""
        reached: set[Candidate] = set()
        hooks = [
            m.register_forward_pre_hook(lambda *_, c=c: reached.add(c))
            for c in among
            for m in c.modules.values()
        ]
        try:
            self.run(self.stream)
        finally:
            for handle in hooks:
                handle.remove()
        return reached

    # --- one candidate ------------------------------------------------------------------------

    def gain(self, candidate: Candidate, silent: Speech) -> Tensor | None:
        """g (T, P, d) with which what the candidate says moves the stream; None if it does not."""
        base = self.hear({**silent, candidate: None}, trace=True)
        for loudness in (1.0, 1e3) if candidate.parameter else (1.0,):
            first_run = self.hear({**silent, candidate: self.voices[0]}, loudness)
            if self._moved(first_run, base, OUTPUT):
                break
        else:
            return None
        point = next(
            (
                k
                for k in base.points
                if k in base.stream and k in first_run.points and self._moved(first_run, base, k)
            ),
            None,
        )
        if point is None:
            return None
        second = self.hear({**silent, candidate: self.voices[1]}, loudness)
        if point not in second.points:
            return None
        one, two = (
            (run.points[point] - base.points[point]) / v.float()
            for run, v in zip((first_run, second), self.voices, strict=True)
        )
        # Where two norms follow one another, each v has a factor of its own per token.
        ratio = (one * two).sum(-1, keepdim=True) / two.square().sum(-1, keepdim=True)
        same = (one - ratio.nan_to_num() * two).norm() <= 5 * self.tolerance * one.norm()
        return one if bool(same) else None

    def _moved(self, run: Heard, base: Heard, key: Key) -> bool:
        a, b = run.points[key], base.points[key]
        return bool((a - b).norm() > self.tolerance * b.norm())

    def mixers(self, writers: Collection[Candidate]) -> set[Candidate]:
        """The writers that are told at the last token of tokens far before it, or of pictures.

        Token mixers (attention, convolution, state space) are, feed-forward layers are not, even
        those that see the token before (RWKV). All writers are silent, so that only what comes
        before each of them counts: queries, keys and values speak.
        """
        silent: Speech = dict.fromkeys(writers)
        loud = self.stream / LOUDNESS
        other = self.noise() / LOUDNESS
        axis = max(k for k, n in enumerate(other.shape[:-1]) if n == self.call.tokens)
        place = other.narrow(axis, self.call.tokens - 2, 2)
        place.copy_(loud.narrow(axis, self.call.tokens - 2, 2))
        heard = []
        for stream, call in ((loud, self.call), (other, self._elsewhere())):
            with playing(silent), _last_inputs(writers, self.call.tokens) as told:
                self.run(stream, call)
            heard.append(told)
        found: set[Candidate] = set()
        for c in writers:
            if c in heard[0] and c in heard[1]:
                one, two = heard[0][c], heard[1][c]
            else:  # it is given tokens in an order of its own: judge by what comes out
                others: Speech = {w: None for w in writers if w is not c}
                with playing(others):
                    one, two = (self.run(s)[-1] for s in (loud, other))
                with playing(silent):
                    two = two - (base := self.run(loud)[-1])
                    one = one - base
            if bool((one - two).norm() > 10 * self.tolerance * one.norm()):
                found.add(c)
        return found

    def _elsewhere(self) -> Call:
        """The call with other pictures and other keys and values of earlier blocks."""
        place, tokens = self.call.place, self.call.tokens

        def drawn(key: int | str, value: Any) -> Any:
            return value if key == place else _other(value, tokens)

        return replace(
            self.call,
            args=tuple(drawn(k, value) for k, value in enumerate(self.call.args)),
            kwargs={k: drawn(k, value) for k, value in self.call.kwargs.items()},
        )


def _other(value: Any, tokens: int) -> Any:
    """An argument drawn anew where it does not go along with the block's own tokens."""
    if isinstance(value, MutableMapping):  # keys and values that blocks share
        changed = copy.copy(value)
        changed.update({k: _drawn(v) for k, v in value.items()})
        return changed
    told = isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 3
    return torch.randn_like(value) if told and tokens not in value.shape else value


def _drawn(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)([_drawn(v) for v in value])
    known = isinstance(value, Tensor) and value.is_floating_point()
    return torch.randn_like(value) if known else value


@contextlib.contextmanager
def _last_inputs(writers: Collection[Candidate], tokens: int) -> Iterator[dict[Candidate, Tensor]]:
    """What the writers are given at the last token."""
    told: dict[Candidate, Tensor] = {}

    def hook(candidate: Candidate) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
            given = args[0] if args else None
            if isinstance(given, Tensor) and tokens in given.shape[:-1]:
                axis = max(k for k, n in enumerate(given.shape[:-1]) if n == tokens)
                told[candidate] = given.select(axis, tokens - 1).float().clone()

        return keep

    hooks = [c.owner.register_forward_pre_hook(hook(c)) for c in writers]
    try:
        yield told
    finally:
        for handle in hooks:
            handle.remove()


def first(value: Any) -> Any:
    """The hidden states of a block's output."""
    return value[0] if isinstance(value, (tuple, list)) else value


def _biases(block: nn.Module, d: int) -> list[Tensor]:
    """The vectors (1, 1, d) that a module of the block adds beside its parts."""
    return [
        p.detach().reshape(1, 1, d)
        for module in block.modules()
        if not free_of_matrices(module) and linear_width(module) is None
        for name, p in module.named_parameters(recurse=False)
        if p.numel() == d and "bias" in name
    ]
