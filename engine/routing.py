"""Which experts of each mixture the tokens of prompts are sent to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engine.decode import Decoder
from engine.report import Report
from engine.writer import Writer


@dataclass(frozen=True)
class Choices:
    """How often each expert of a stack is chosen: `share` (E) of the tokens, float64; k."""

    share: Tensor
    chosen: int


@torch.inference_mode()
def frequencies(
    decoder: Decoder,
    stacks: Sequence[Writer],
    inputs: Sequence[list[int]],
    tail: int,
    report: Report,
) -> dict[str, Choices]:
    """The choices at the last `tail` tokens of `inputs`, by the stack's name; a stack that is told
    of none (text does not run it, or it takes every token) is left out."""
    counts: dict[str, Tensor] = {}
    widths: dict[str, int] = {}

    def read(batch: list[int], ids: Tensor, mask: Tensor) -> None:
        with _listening(stacks, len(batch)) as heard:
            decoder.forward(ids, mask, 1)
        for stack in stacks:
            if (index := heard.get(stack.name)) is None:
                continue
            last = index[:, -tail:].flatten()
            here = torch.bincount(last[last < stack.experts], minlength=stack.experts)
            widths[stack.name] = index.shape[-1]
            counts[stack.name] = counts.get(stack.name, 0) + here.cpu()

    decoder.original_batches(inputs, read, report, "routers")
    tokens = len(inputs) * tail
    return {name: Choices(hits.double() / tokens, widths[name]) for name, hits in counts.items()}


@contextmanager
def _listening(stacks: Sequence[Writer], rows: int) -> Iterator[dict[str, Tensor]]:
    """Within the block, the experts (rows, T, k) that each stack was told to use for each token.

    transformers hands a stack the whole numbers of the chosen experts, (rows · T, k). A choice of
    weight 0 is none and is told as E, beyond the experts.
    """
    heard: dict[str, Tensor] = {}

    def listen(stack: Writer) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim() > 1]
            index = next((v for v in given if v.dtype in (torch.int64, torch.int32)), None)
            if index is None or index.numel() % (rows * index.shape[-1]):
                return
            for weight in given:
                if weight.is_floating_point() and weight.shape == index.shape:
                    index = index.masked_fill(weight == 0, stack.experts)
            heard[stack.name] = index.reshape(rows, -1, index.shape[-1])

        return hook

    hooks = [w.module.register_forward_pre_hook(listen(w), with_kwargs=True) for w in stacks]
    try:
        yield heard
    finally:
        for handle in hooks:
            handle.remove()
