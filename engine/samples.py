"""What edits need to know of the prompts: taken once, when a model is prepared.

Affine edits need the harmless mean of each writer's output at the last prompt token, arbitrary-rank
ablation the inputs and outputs of both sides. Only modules that hooks can reach are sampled: a
stack of experts has no output of its own at a prompt's last token, but those of the experts that
the router chose. Suppressing experts needs to know which ones that are (`engine.routers`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from engine.anatomy import Anatomy, Writer
from engine.ara import Sample, condense
from engine.decode import Decoder
from engine.errors import EngineError
from engine.report import Report
from engine.routers import Bias, Router, Suppression, find_routers
from jobs.spec.candidate import Ablation, Ara

ROWS = 256  # prompts per side of which ARA knows inputs and outputs


@dataclass(frozen=True)
class Samples:
    """Of each writer in the anatomy's order; None for those that no hook reaches.

    means   (d) harmless mean of W x, without the bias, float32; None: not asked for
    ara     inputs and outputs; None: not asked for
    routers those that have a bias, each once; None: not asked for
    """

    means: tuple[Tensor | None, ...] | None = None
    ara: tuple[Sample | None, ...] | None = None
    routers: tuple[Router, ...] | None = None

    def suppressions(self, candidate: Ablation | Ara) -> tuple[Suppression | None, ...]:
        """What `candidate` does to each router of `routers`. Raises `bad_request` where it
        suppresses experts and the routers were not watched."""
        wanted = candidate.router if isinstance(candidate, Ablation) else None
        if wanted is not None and self.routers is None:
            raise EngineError(
                "bad_request",
                "router: which experts harmful prompts choose was not watched",
                "Say so when preparing.",
            )
        return tuple(router.suppression(wanted) for router in self.routers or ())

    def lowered(self, candidate: Ablation | Ara) -> list[tuple[Bias, Suppression]]:
        """The biases that `candidate` lowers; raises what `suppressions` raises."""
        each = zip(self.routers or (), self.suppressions(candidate), strict=True)
        return [(router.bias, s) for router, s in each if s is not None]


def reached(anatomy: Anatomy, candidate: Ablation | Ara) -> float:
    """Share of the writing parameters that the candidate's method can change, 0..1.

    Its layers and strengths do not count. Directional ablation reaches what `anatomy` covers; ARA
    and affine edits reach no stack of experts, which has no module whose output could be sampled.
    """
    if isinstance(candidate, Ara) or candidate.affine:
        return anatomy.coverage * _hooked_share(anatomy)
    return anatomy.coverage


def _hooked_share(anatomy: Anatomy) -> float:
    total = sum(prod(w.shape) for w in anatomy.writers)
    return sum(prod(w.shape) for w in anatomy.writers if w.hooked) / max(1, total)


def collect_samples(
    decoder: Decoder,
    anatomy: Anatomy,
    harmful: Sequence[list[int]],
    harmless: Sequence[list[int]],
    report: Report,
    affine: bool = False,
    ara: bool = False,
    allow_partial: bool = False,
    router: bool = False,
) -> Samples:
    """Samples from the token ids of both sides' prompts; nothing where neither is asked for.

    Writers that text does not run (Mllama's attention to pictures) have none either: they say
    nothing about these prompts.

    ARA's samples of the first ROWS prompts of a side take up to 8 ROWS (n + d + 4 ROWS) bytes of
    main memory per writer, 1.9 GB for a dense 8B model. Raises `unsupported_architecture` where a
    writer cannot be hooked: for affine always, for ARA without `allow_partial`; and for `router`
    where no router has a bias.
    """
    routers = find_routers(decoder, anatomy, harmful, harmless, report) if router else None
    if ara and any(not w.hooked for w in anatomy.writers):
        text = (
            f"ara: it reaches {anatomy.coverage * _hooked_share(anatomy):.1%} of the parameters "
            "that write to the residual stream; stacks of experts are left as they are"
        )
        if not allow_partial:
            mend = "Allow partial edits (allow_partial), or choose another method."
            raise EngineError("unsupported_architecture", text, mend)
        report.log(text, "warning")
    means: tuple[Tensor | None, ...] | None = None
    if affine:
        missed = [w.name for w in anatomy.writers if not w.hooked] + [
            w.name for w in anatomy.uncovered
        ]
        if missed:
            raise EngineError(
                "unsupported_architecture",
                f"affine: {missed[0]} and {len(missed) - 1} others are not matrices of their own: "
                "a bias on what a stack of experts adds up cannot be written into its weights",
                "Choose another method for this model.",
            )
        outputs = _read(decoder, anatomy, harmless, report, outputs_only=True)
        means = tuple(
            None if y is None else _without_bias(y[1].mean(0, dtype=torch.float64), w).float()
            for w, y in zip(anatomy.writers, outputs, strict=True)
        )
    if not ara:
        return Samples(means, routers=routers)
    bad = _read(decoder, anatomy, harmful[:ROWS], report)
    good = _read(decoder, anatomy, harmless[:ROWS], report)
    found: list[Sample | None] = []
    for place, (b, g) in enumerate(zip(bad, good, strict=True)):
        known = b is not None and g is not None
        found.append(condense(g[0], g[1], b[0], b[1], decoder.device) if known else None)  # type: ignore[index]
        bad[place] = good[place] = None  # the raw rows go as soon as they are condensed
        report.progress("samples", place + 1, len(bad))
    return Samples(means, tuple(found), routers)


Rows = tuple[Tensor, Tensor]  # inputs (N, n) and outputs (N, d), float32, on the CPU


@torch.inference_mode()
def _read(
    decoder: Decoder,
    anatomy: Anatomy,
    inputs: Sequence[list[int]],
    report: Report,
    outputs_only: bool = False,
) -> list[Rows | None]:
    """Every hooked writer's rows at the last token of each of `inputs`, in their order; None for
    those that are not run."""
    found: list[Rows | None] = [
        (torch.empty(len(inputs), 0 if outputs_only else w.n), torch.empty(len(inputs), w.d))
        if w.hooked
        else None
        for w in anatomy.writers
    ]

    def read(batch: list[int], ids: Tensor, mask: Tensor) -> None:
        with _watched(anatomy.writers, len(batch)) as seen:
            decoder.forward(ids, mask, 1)
        rows = torch.tensor(batch)
        for place, kept in enumerate(found):
            if place not in seen:
                found[place] = None
            elif kept is not None:
                x, y = seen[place]
                kept[1][rows] = y
                if not outputs_only:
                    kept[0][rows] = x

    decoder.original_batches(inputs, read, report, "writers' outputs")
    return found


@contextmanager
def _watched(writers: Sequence[Writer], rows: int) -> Iterator[dict[int, Rows]]:
    """Within the block, the last token's inputs and outputs of each hooked writer, by its place."""
    seen: dict[int, Rows] = {}

    def watch(place: int) -> Any:
        def hook(module: Any, args: tuple[Tensor, ...], y: Tensor) -> None:
            seen[place] = (_last(args[0], rows, place), _last(y, rows, place))

        return hook

    def _last(x: Tensor, rows: int, place: int) -> Tensor:
        if x.shape[0] % rows:
            raise EngineError(
                "unsupported_architecture",
                f"{writers[place].name} does not read one row a token",
                "Choose a method other than ara and affine for this model.",
            )
        return x.reshape(rows, -1, x.shape[-1])[:, -1].float().cpu()  # some get (rows · T, n)

    handles = [
        w.module.register_forward_hook(watch(place)) for place, w in enumerate(writers) if w.hooked
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _without_bias(mean: Tensor, writer: Writer) -> Tensor:
    bias = writer.bias()
    return mean if bias is None else mean - bias.detach().to("cpu", torch.float64)
