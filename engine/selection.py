"""A single-pass edit chosen as the original paper chooses it (Arditi et al. 2024, section 2.3, C).

The candidate directions are the differences of means at the last few prompt positions and after
the blocks of the first 80 % of the depth. Each is measured on validation prompts, by forwards of
the prompt alone:

    log_odds   of a refusal at the first answer token, harmful prompts, ablated: the least wins
    kl         KL(original‖ablated) of the first answer token, harmless prompts: at most the limit
    induced    log-odds, harmless prompts, the difference of means added to the residual stream
               after its own layer: above 0, or it is not refusal

What differs from the paper: it takes the direction out of the residual stream after every
component, ours out of what the writers write, so that the token embedding's part remains; and its
layers are counted before a block, ours after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from engine.edit import EditBuilder
from engine.errors import EngineError
from engine.report import Report
from engine.scorers.kl import Reference, divergences
from engine.scorers.log_odds import per_prompt
from jobs.spec.candidate import Ablation, Recipe, constant
from jobs.spec.protocol import Choice, Select, Selected

if TYPE_CHECKING:
    from engine.preparation import Ready

DEPTH = 0.8  # share of the layers whose directions are looked at
VALIDATION = 32  # prompts per side, as in the paper


def ablation(position: int, layer: int) -> Ablation:
    """The edit of one choice: its direction out of every writer, λ = 1, norms not kept."""
    return Ablation(
        mode="none",
        recipe=Recipe(projection="none", position=position),
        scope="global",
        index=float(layer),
        attention=constant(),
        mlp=constant(),
    )


def select(ready: Ready, request: Select, report: Report) -> Selected:
    """The best direction, and all that were looked at, best first.

    Where none passes, the first of those within the KL limit is chosen, or else the one with the
    least KL, with a warning. Raises `bad_prompts` where the original refuses nothing, and
    `bad_request` for positions whose recipes were not prepared.
    """
    role, tokens = ready.roles["search"], ready.baseline.further.openings
    if not tokens or role.reference is None:
        raise EngineError(
            "bad_prompts",
            "the original refuses none of the prompts: there is no refusal to measure",
            "Choose harmful prompts that this model refuses.",
        )
    harmful, harmless = role.harmful[:VALIDATION], role.harmless[:VALIDATION]
    first = Reference(harmless, [states[:1] for states in role.reference.states[:VALIDATION]])
    decoder, directions, layers = ready.decoder, ready.directions, ready.anatomy.layers
    # as in preparing: which rows share a batch must not depend on the requests before this one
    decoder.reserve(max(map(len, harmful + harmless)), ready.request.max_new_tokens)
    depth = [layer for layer in range(layers) if layer < DEPTH * layers]
    choices: list[Choice] = []
    for place, position in enumerate(request.positions):
        axes = directions.axes(Recipe(projection="none", position=position))
        builder = EditBuilder(ready.anatomy, directions)  # its bases go with it
        for layer in depth:
            report.progress("selection", place * len(depth) + layer,
                            len(request.positions) * len(depth))  # fmt: skip
            direction = axes.vectors[layer, 0]
            if not direction.any():
                continue  # the prompts are still alike there
            edit = builder.build(ablation(position, layer))
            with decoder.edited(edit):
                remaining = float(per_prompt(decoder, harmful, tokens, report).mean())
            (moved,) = divergences(decoder, first, [edit], report, "divergence")
            with _added(ready.anatomy.blocks[layer], axes.gap[layer] * direction):
                induced = float(per_prompt(decoder, harmless, tokens, report).mean())
            kept = moved.first <= request.kl_limit and induced > 0
            choices.append(
                Choice(position=position, layer=layer, log_odds=remaining, kl=moved.first,
                       induced=induced, kept=kept)
            )  # fmt: skip
    if not choices:
        raise EngineError("bad_prompts", "harmful and harmless prompts have no different states")
    choices.sort(key=lambda c: _rank(c, request.kl_limit))
    best = choices[0]
    report.log(
        f"{sum(c.kept for c in choices)} of {len(choices)} directions pass; position "
        f"{best.position}, layer {best.layer}: log-odds {best.log_odds:.2f}, KL {best.kl:.3g}, "
        f"induced {best.induced:.2f}",
        "info" if best.kept else "warning",
    )
    return Selected(candidate=ablation(best.position, best.layer), choices=choices)


def _rank(choice: Choice, kl_limit: float) -> tuple[int, float]:
    """Kept ones by log-odds; then those that only do not induce; then the others by KL."""
    if choice.kept:
        return 0, choice.log_odds
    if choice.kl <= kl_limit:
        return 1, choice.log_odds
    return 2, choice.kl


@contextmanager
def _added(block: nn.Module, vector: Tensor) -> Iterator[None]:
    """Within the block, `vector` (d) is added to the residual stream after `block`, everywhere."""

    def after(module: nn.Module, args: Any, out: Any) -> Any:
        stream = out[0] if isinstance(out, (tuple, list)) else out
        moved = stream + vector.to(stream.device, torch.float32).to(stream.dtype)
        return type(out)((moved, *out[1:])) if isinstance(out, (tuple, list)) else moved

    handle = block.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()
