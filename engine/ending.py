"""The end of the last block: its feed-forward computes each token by itself, and nobody asks for
those that the head does not read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from engine.anatomy import Anatomy


def feed_forward(anatomy: Anatomy) -> nn.Module | None:
    """The child of the last block that holds its feed-forward's writers and no attention's; None
    where no child does, or where one is a writer, whose input its edit must see. Whether it
    computes each token by itself is for the caller to try."""
    for child in anatomy.blocks[-1].children():
        inside = set(child.modules()) - {child}
        if {w.component for w in anatomy.writers if w.module in inside} == {"mlp"}:
            return child
    return None


@contextmanager
def only_last(module: nn.Module, keep: int) -> Iterator[None]:
    """Within it `module`, (B, T, d) to (B, T, d), computes the last `keep` tokens of each row; the
    others are 0. ValueError where it takes or gives anything else."""
    widths: list[int] = []

    def before(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        if not given or not isinstance(given[0], Tensor) or given[0].dim() != 3:
            raise ValueError("it takes no (B, T, d)")
        widths.append(given[0].shape[1])
        return given[0][:, -keep:].contiguous(), *given[1:]

    def after(_: nn.Module, given: tuple[Any, ...], output: Any) -> Tensor:
        if not isinstance(output, Tensor) or output.dim() != 3:
            raise ValueError("it gives no (B, T, d)")
        whole = output.new_zeros(len(output), widths.pop(), output.shape[2])
        whole[:, -keep:] = output
        return whole

    handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
