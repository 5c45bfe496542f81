"""The output head: where it is, and what enters it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from engine.errors import EngineError


def head_of(model: Any) -> nn.Module:
    """The module that makes logits of states; a model around another one may not know of it.

    Raises EngineError("unsupported_architecture") where there is none.
    """
    for part in model.modules():
        if hasattr(part, "get_output_embeddings"):
            head = part.get_output_embeddings()
            if isinstance(head, nn.Module):
                return head
    raise EngineError(
        "unsupported_architecture",
        f"{type(model).__name__} has no output head (get_output_embeddings)",
        "Choose a decoder-only language model.",
    )


@contextmanager
def entering_head(model: Any, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the block, what enters the output head, (rows, t, d), is `change` of it."""

    def before(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return change(given[0]), *given[1:]

    handle = head_of(model).register_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()
