"""What might write in a block: linear modules and matrices held as parameters of anything else.

A candidate can be made silent, or made to say a vector: then each of its outputs is a multiple of
that vector, whatever its input. Linear modules are played by hooks on their outputs, parameters by
putting another tensor in their place for a while; no weight is ever written to.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engine.stream import free_of_matrices, is_matrix
from engine.writer import linear_width


@dataclass(frozen=True, eq=False)
class Candidate:
    """Modules of one kind, such as the `down_proj` of all experts of a list, or one parameter.

    key         the path with numbers left out: what it has in common with that of other layers
    modules     by their path in the block; the owner where a parameter is meant
    parameter   "" of linear modules
    d, n        of the matrix, or of each in a stack of `experts`
    """

    key: str
    modules: dict[str, nn.Module]
    d: int
    n: int
    parameter: str = ""
    experts: int = 0
    transposed: bool = False

    @property
    def owner(self) -> nn.Module:
        """The (first) module."""
        return next(iter(self.modules.values()))

    def saying(self, v: Tensor, loudness: float) -> Tensor:
        """The parameter with which every output is a multiple of v (d): v ⊗ random (n)."""
        held: Tensor = getattr(self.owner, self.parameter)
        length = held.shape[-2 if self.transposed else -1]
        drawn = torch.randn(length, generator=torch.Generator().manual_seed(length))
        a = (loudness * drawn).to(held.device, held.dtype)
        v = v.to(held.device, held.dtype)
        one = torch.outer(a, v) if self.transposed else torch.outer(v, a)
        return one.expand(self.experts, *one.shape) if held.dim() == 3 else one.view(held.shape)


def candidates(block: nn.Module, d: int) -> list[Candidate]:
    """Everything in a block that might write to a stream of width d, parameters first."""
    held = [
        found
        for name, module in block.named_modules()
        if linear_width(module) is None and not isinstance(module, nn.Embedding)
        for key, parameter in module.named_parameters(recurse=False)
        for found in _held(name, module, key, parameter, d)
    ]
    linear: dict[str, Candidate] = {}
    for name, module in block.named_modules():
        width = linear_width(module)
        if width is None or width[0] != d:
            continue
        key = f"{re.sub(r'[0-9]+', '#', name)} {width[1]}"
        linear.setdefault(key, Candidate(key, {}, d, width[1])).modules[name] = module
    return [*held, *linear.values()]


def unreadable(block: nn.Module, known: list[Candidate]) -> list[Candidate]:
    """The other matrices held as parameters, whose layout is unknown: they can only be silenced."""
    readable = {(id(c.owner), c.parameter) for c in known}
    return [
        Candidate(f"{name}.{key}".strip("."), {name: module}, 0, 0, key)
        for name, module in block.named_modules()
        if linear_width(module) is None and not free_of_matrices(module)
        for key, parameter in module.named_parameters(recurse=False)
        if is_matrix(parameter) and (id(module), key) not in readable
    ]


def _held(
    name: str, owner: nn.Module, key: str, parameter: Tensor, d: int
) -> Iterator[Candidate]:  # fmt: skip
    """The ways in which a parameter can be read as matrices of d rows; two where it is square."""
    if not parameter.is_floating_point() or not is_matrix(parameter) or key.endswith("bias"):
        return
    if free_of_matrices(owner):
        return  # a depthwise convolution
    path = f"{name}.{key}" if name else key
    # Stored (E, d, n) or (d, n); else (E, n, d), (n, d) or (E·n, d).
    ways = [t for t in (False, True) if parameter.shape[-1 if t else -2] == d]
    if getattr(owner, "is_transposed", False):
        ways.reverse()
    for transposed in ways if parameter.dim() in (2, 3) else []:
        rest = parameter.shape[-2 if transposed else -1]
        experts = parameter.shape[0] if parameter.dim() == 3 else 0
        if parameter.dim() == 2 and transposed:
            experts = _stacked(owner, rest)
        n = rest // experts if experts and parameter.dim() == 2 else rest
        yield Candidate(path, {name: owner}, d, n, key, experts, transposed)


def _stacked(owner: nn.Module, size: int) -> int:
    """E where the rows of a parameter are those of E matrices (DBRX), else 0."""
    for name, value in vars(owner).items():
        if name.endswith("num_experts") and isinstance(value, int) and value > 1:
            return value if size % value == 0 and size > value else 0
    return 0


def _zeros(like: Tensor) -> Tensor:
    """Zeros that, for a stack, hold memory for one matrix alone."""
    one = torch.zeros_like(like.data[0] if like.dim() == 3 else like.data)
    return one.expand(like.shape)


Speech = Mapping[Candidate, Tensor | None]  # what each says; None: nothing


@contextlib.contextmanager
def playing(speech: Speech, loudness: float = 1.0) -> Iterator[None]:
    """Let candidates be silent or say a vector while the context lasts."""
    hooks: list[Any] = []
    stored: list[tuple[Tensor, Tensor]] = []

    def put(parameter: Tensor, value: Tensor) -> None:
        stored.append((parameter, parameter.data))
        parameter.data = value

    def hook(said: Tensor | None) -> Any:
        def replace(module: nn.Module, args: Any, out: Any) -> Any:
            y = out[0] if isinstance(out, (tuple, list)) else out
            new = torch.zeros_like(y) if said is None else said.to(y).expand_as(y).contiguous()
            return type(out)([new, *out[1:]]) if isinstance(out, (tuple, list)) else new

        return replace

    try:
        for candidate, said in speech.items():
            if not candidate.parameter:
                for module in candidate.modules.values():
                    hooks.append(module.register_forward_hook(hook(said)))
                continue
            parameter = getattr(candidate.owner, candidate.parameter)
            put(parameter, _zeros(parameter) if said is None else candidate.saying(said, loudness))
            bias = getattr(candidate.owner, f"{candidate.parameter}_bias", None)
            if isinstance(bias, Tensor):
                put(bias, torch.zeros_like(bias))
        yield
    finally:
        for parameter, value in reversed(stored):
            parameter.data = value
        for handle in hooks:
            handle.remove()
