"""The residual stream after every block at the last prompt tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engine.anatomy import Anatomy, accepts
from engine.errors import EngineError
from engine.loading.placement import input_device
from engine.memory import is_out_of_memory, release
from engine.report import Report


@torch.no_grad()
def collect(
    model: nn.Module,
    anatomy: Anatomy,
    inputs: list[list[int]],
    pad_id: int,
    report: Report,
    batch_size: int,
    positions: Sequence[int] = (-1,),
) -> dict[int, Tensor]:
    """h (N, L+1, d) by prompt position, float32 on the CPU: h[:, 0] enters block 0, h[:, l+1]
    leaves block l.

    positions   prompt tokens counted from the end, -1 the last; every prompt must reach there
    Hooks on the blocks: the last of Hugging Face's `hidden_states` has passed the final norm.
    Halves `batch_size` when the device is out of memory; raises `out_of_memory` at 1.
    """
    result = torch.empty(len(positions), len(inputs), anatomy.layers + 1, anatomy.hidden)
    order = sorted(range(len(inputs)), key=lambda i: len(inputs[i]))  # little padding
    done, size = 0, max(1, batch_size)
    while done < len(order):
        rows = order[done : done + size]
        states: Tensor | None
        try:
            states = _states(model, anatomy, [inputs[i] for i in rows], pad_id, positions)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                raise EngineError(
                    "out_of_memory",
                    "one prompt's forward pass does not fit into the device's memory",
                    "Use quantisation bnb_4bit, shorter prompts or a larger GPU.",
                ) from error
            size = max(1, size // 2)
            report.log(f"out of memory: going on with batches of {size}", "warning")
            states = None
        if states is None:
            release()  # outside of the handler: the traceback held the tensors of the batch
            continue
        result[:, torch.tensor(rows)] = states
        done += len(rows)
        report.progress("directions", done, len(order))
    return dict(zip(positions, result, strict=True))


def _states(
    model: nn.Module, anatomy: Anatomy, batch: list[list[int]], pad_id: int,
    positions: Sequence[int],
) -> Tensor:  # fmt: skip
    """h (P, B, L+1, d) of one left-padded batch."""
    width = max(len(ids) for ids in batch)
    ids = torch.tensor([[pad_id] * (width - len(row)) + row for row in batch])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch])
    device = input_device(model)
    arguments: dict[str, Any] = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    if accepts(model, "position_ids"):
        arguments["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0).to(device)
    if accepts(model, "logits_to_keep"):
        arguments["logits_to_keep"] = 1
    places = list(positions)
    kept: list[Tensor | None] = [None] * (anatomy.layers + 1)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream = args[0] if args else kwargs["hidden_states"]
        kept[0] = anatomy.stream_of(stream)[:, places].float().cpu()

    def after(layer: int) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            kept[layer + 1] = anatomy.stream_of(out)[:, places].float().cpu()

        return hook

    hooks: list[Any] = [anatomy.blocks[0].register_forward_pre_hook(before, with_kwargs=True)]
    hooks += [b.register_forward_hook(after(i)) for i, b in enumerate(anatomy.blocks)]
    try:
        model(**arguments, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    for layer in range(anatomy.layers):  # blocks that text does not run leave the stream alone
        if kept[layer + 1] is None:
            kept[layer + 1] = kept[layer]
    states = torch.stack([k for k in kept if k is not None], dim=1)  # (B, L+1, P, d)
    return states.permute(2, 0, 1, 3)
