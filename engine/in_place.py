"""What no hook can edit: rewritten in place, restored by copy.

Stacks of experts, matrices that are parameters of something else, and the biases of routers. The
original is kept from the first edit on and copied back bit for bit, never computed back; the new
one is that which a merged export writes (`engine.change.rewrite`, `engine.routers.Suppression.of`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.change import Change, Projection, rewrite
from engine.errors import EngineError
from engine.memory import free_bytes
from engine.routers import Router, Suppression
from engine.writer import Writer

KEPT_SHARE = 0.25  # of a GPU's free memory that originals may take; beyond it the host keeps them


class Rewritten:
    """One writer's weight and the change that it holds now."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self._original: Tensor | None = None
        self._holds: Change | None = None
        self._whole = True  # False while a rewrite has not ended

    @property
    def held(self) -> Tensor:
        """The parameter's data, in its own layout."""
        parameter: Tensor = getattr(self.writer.module, self.writer.parameter)
        return parameter.detach()

    @torch.no_grad()
    def select(self, change: Change | None, place: torch.device) -> None:
        """Hold `change` of the original from now on; costs nothing where that is so already.

        `place` is where the original is kept from the first change on.
        """
        if isinstance(change, Projection) and change.mean is not None:
            raise EngineError(
                "unsupported_architecture",
                f"affine: {self.writer.name} is edited in place and has no bias of its own",
                "Choose a candidate that is not affine for this model.",
            )
        if self._whole and same(change, self._holds):
            return
        held = self.held
        if self._original is None:
            self._original = held.to(place, copy=True)
        self._whole = False
        if change is None or self._original.device != held.device:
            held.copy_(self._original)
        if change is not None:
            here = self._original if self._original.device == held.device else held
            rewrite(self.writer.oriented(here), change, out=self.writer.oriented(held))
        self._holds, self._whole = change, True

    def forget(self) -> None:
        """Give the original's memory back; the weight must hold the original."""
        self._original = None


class Suppressed:
    """One router's bias and the suppression that it holds now."""

    def __init__(self, router: Router) -> None:
        self.bias = router.bias
        self._original: Tensor | None = None
        self._holds: Suppression | None = None

    @torch.no_grad()
    def select(self, suppression: Suppression | None) -> None:
        """Hold the original with `suppression` from now on; None: the original."""
        if suppression == self._holds:
            return
        held = self.bias.held
        if self._original is None:
            self._original = held.clone()
        held.copy_(self._original if suppression is None else suppression.of(self._original))
        self._holds = suppression


def place_of(originals: list[Rewritten], device: torch.device) -> torch.device:
    """Where a device's originals are kept: there, or on the host where they are many."""
    size = sum(one.held.nbytes for one in originals if one.held.device == device)
    if device.type == "cpu" or size <= KEPT_SHARE * free_bytes(device):
        return device
    return torch.device("cpu")


def same(a: Change | None, b: Change | None) -> bool:
    """Whether two changes give the same weight."""
    if a is b:
        return True
    if isinstance(a, Projection) and isinstance(b, Projection):
        return (a.lam, a.mode) == (b.lam, b.mode) and torch.equal(a.V, b.V)
    return False
