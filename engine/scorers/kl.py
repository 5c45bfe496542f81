"""How far an edit moves the model on harmless prompts: KL(original‖edited), in nats.

One forward gives both measures. The model reads a prompt and the first T − 1 tokens of the
original's own answer to it (teacher-forced), so T next-token distributions come out:

    kl_first = mean over prompts of KL at the first answer token
    kl_multi = mean over all T positions of all prompts (answers shorter than T count as they are,
               their end token included)

Of the original only the vectors that entered the output head are kept, (T, d) a prompt in the
model's dtype: T·d instead of T·V numbers. Its logits are made again in the forward of the edited
model, by appending those vectors to what enters the head, so that the head and whatever a model
does behind it (soft-capping, scaling) treat both alike. That loses nothing: the head is not edited,
and both sides of the divergence come from the same matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.decode import ORIGINAL, Answer, Decoder
from engine.ending import only_last
from engine.head import entering_head
from engine.memory import Shape, forward_row, free_bytes
from engine.report import Report
from engine.shared import begin, editable_cache, padded, rest
from jobs.spec.memory import KL_CHUNK, KL_SHARE, compared_rows, comparing_bytes

if TYPE_CHECKING:
    from engine.edit import Edit
    from engine.lower import States

WORST = 1e6  # nats; stands for a divergence that is not finite


@dataclass(frozen=True)
class Reference:
    """The original model on harmless prompts: what it read and what entered its head.

    inputs[p]   token ids: prompt p and the answer's tokens but the last of the T
    states[p]   (T_p, d) in the model's dtype, on the CPU
    """

    inputs: list[list[int]]
    states: list[Tensor]


@dataclass(frozen=True)
class Divergence:
    """Mean KL(original‖edited) in nats, at the first token and over all positions."""

    first: float
    multi: float


@torch.inference_mode()
def measure_reference(
    decoder: Decoder, prompts: Sequence[list[int]], answers: Sequence[Answer], tokens: int,
    report: Report,
) -> Reference:  # fmt: skip
    """Read the original's states over the first `tokens` tokens of its own `answers`."""
    inputs, counts = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        count = max(1, min(tokens, len(answer.tokens) + answer.ended))
        inputs.append(prompt + answer.tokens[: count - 1])
        counts.append(count)
    return reread(decoder, inputs, counts, report)


@torch.inference_mode()
def reread(
    decoder: Decoder, inputs: list[list[int]], counts: list[int], report: Report
) -> Reference:
    """The unedited states of `decoder`'s model at the last `counts[p]` tokens of `inputs[p]`."""
    states: dict[int, Tensor] = {}
    pending = sorted(range(len(inputs)), key=lambda place: -len(inputs[place]))
    while pending:
        # The same batches as in `divergences`, so that the original does not differ from itself.
        lengths = [len(inputs[place]) for place in pending]
        batch = pending[: decoder.together(lengths, _rows(decoder, inputs, counts))]
        with decoder.surviving(len(batch)):
            keep = max(counts[place] for place in batch)
            given, seen = [inputs[place] for place in batch], list[Tensor]()
            _read(decoder, given, [], [ORIGINAL] * len(given), keep, partial(_keep, seen))
            for place, row in zip(batch, seen[0], strict=True):
                states[place] = row[-counts[place] :].to("cpu", copy=True)
        pending = [place for place in pending if place not in states]
        report.progress("original distributions", len(states), len(inputs))
    return Reference(inputs, [states[place] for place in range(len(inputs))])


@torch.inference_mode()
def divergences(
    decoder: Decoder, reference: Reference, edits: Sequence[Edit], report: Report, phase: str
) -> list[Divergence]:
    """Of each of `edits`; of the model as it is (one divergence) where there are none."""
    inputs = reference.inputs
    counts = [len(states) for states in reference.states]
    found: dict[tuple[int, int], Tensor] = {}  # (prompt, edit) -> KL at each of its positions
    prompts = sorted(range(len(inputs)), key=lambda place: -len(inputs[place]))
    numbers = list(range(len(edits))) or [ORIGINAL]
    pending = [(place, number) for place in prompts for number in numbers]  # prompts share a batch
    total = len(pending)
    while pending:
        lengths = [len(inputs[place]) for place, _ in pending]
        batch = pending[: decoder.together(lengths, _rows(decoder, inputs, counts))]
        with decoder.surviving(len(batch)):
            found.update(zip(batch, _of_batch(decoder, reference, edits, batch), strict=True))
        pending = [pair for pair in pending if pair not in found]
        report.progress(phase, len(found), total)
    decoder.select([], [])  # no edit stays behind
    return [mean_divergence([found[place, number] for place in prompts]) for number in numbers]


def _of_batch(
    decoder: Decoder, reference: Reference, edits: Sequence[Edit], batch: list[tuple[int, int]]
) -> list[Tensor]:
    """KL at each position of each (prompt, edit): float64 vectors on the CPU."""
    distinct = list(dict.fromkeys(place for place, _ in batch))
    originals = [reference.states[place] for place in distinct]
    keep = max(map(len, originals))
    inputs = [reference.inputs[place] for place, _ in batch]

    def append(states: Tensor) -> Tensor:
        """(rows, ≥ keep, d) -> (rows + prompts, keep, d): the originals below, aligned right."""
        below = states.new_zeros(len(originals), keep, states.shape[-1])
        for row, original in zip(below, originals, strict=True):
            row[-len(original) :] = original.to(states.device)
        return torch.cat([states[:, -keep:], below])

    logits = _read(decoder, inputs, edits, [number for _, number in batch], keep, append).logits
    below = {place: len(batch) + number for number, place in enumerate(distinct)}
    counts = [len(reference.states[place]) for place, _ in batch]
    # places of (row, position) pairs in the flattened logits, all rows at once
    width = logits.shape[1]
    behind = [range(width - count, width) for count in counts]
    ours = [row * width + at for row, places in enumerate(behind) for at in places]
    theirs = [
        below[place] * width + at
        for (place, _), places in zip(batch, behind, strict=True)
        for at in places
    ]
    flat = logits.flatten(0, 1)
    return list(torch.split(divergence(flat, flat, theirs, ours), counts))


def _read(
    decoder: Decoder,
    inputs: Sequence[list[int]],
    edits: Sequence[Edit],
    numbers: Sequence[int],
    keep: int,
    entering: Callable[[Tensor], Tensor],
) -> Any:
    """The forward of `inputs` under the edits `numbers`, with logits of the last `keep` positions;
    `entering` changes what enters the head, (rows, ≥ keep, d).

    What all begin with is read once, and blocks that are known to do what they do in the original
    are left out.
    """
    used = [edits[number] for number in set(numbers) if number != ORIGINAL]
    station, states = _kept(decoder, inputs, used)
    ids, mask = decoder.padded(inputs)
    begun, held = None, 0
    if editable_cache(decoder, ids.shape[1]) is not None:
        most = min(map(len, inputs)) - keep
        begun = begin(decoder, inputs, edits, numbers, most, station, states)
    if begun is None:
        decoder.select(edits, list(numbers))
    else:
        held = begun.held
        ids, mask = rest(ids, mask, held)
    passing: AbstractContextManager[None] = nullcontext()
    if station and decoder.lower is not None:
        passing = decoder.lower.skipping(station, padded([one[held:] for one in states]))
    ending = only_last(decoder.ending, keep) if decoder.ending is not None else nullcontext()
    with entering_head(decoder.model, entering), passing, ending:
        return decoder.forward(ids, mask, keep, None if begun is None else begun.cache)


def _kept(
    decoder: Decoder, inputs: Sequence[list[int]], edits: Sequence[Edit]
) -> tuple[int, list[States]]:
    """The block at which a forward of `inputs` may begin, and what enters it in the original; 0
    where that is not known of all."""
    station = 0 if decoder.lower is None or not edits else decoder.lower.station(edits)
    if decoder.lower is None or not station:
        return 0, []
    known = [decoder.lower.states(ids, station) for ids in inputs]
    states = [one for one in known if one is not None]
    return (station, states) if len(states) == len(known) else (0, [])


def divergence(
    original: Tensor,
    edited: Tensor,
    first: Sequence[int] | None = None,
    second: Sequence[int] | None = None,
) -> Tensor:
    """KL(original‖edited) of each row of logits (rows, V): (rows), float64, nats, on the CPU.

    first, second   the rows of each that are compared; all, if not given

    In float64, since in float32 the rounding of one logarithm moves all terms of a row alike, by
    1e-7 nats: as much as a small edit. A chunk of rows at a time: copies of all logits would be the
    memory peak.
    """
    rows = max(1, KL_CHUNK // original.shape[-1])
    first = range(len(original)) if first is None else first
    second = range(len(edited)) if second is None else second
    sums = []
    for start in range(0, len(first), rows):
        ours = edited[list(second[start : start + rows])].double()
        theirs = original[list(first[start : start + rows])].double()
        log_p, log_q = theirs.log_softmax(-1), ours.log_softmax(-1)
        # not log_p.exp(), which takes ten times as long where it underflows
        p = theirs.softmax(-1)
        # 0·log 0 = 0, also where both are -inf
        terms = torch.where(p > 0, p * (log_p - log_q), 0.0)
        sums.append(terms.sum(-1).clamp(min=0).cpu())
    return torch.cat(sums)


def mean_divergence(per_prompt: list[Tensor]) -> Divergence:
    """The mean at the first position, and over all positions of all prompts."""
    first = torch.stack([values[0] for values in per_prompt]).mean().item()
    multi = torch.cat(per_prompt).mean().item()
    return Divergence(_bounded(first), _bounded(multi))


def _bounded(value: float) -> float:
    """A model whose logits are not finite has no divergence; it must still compare as the worst."""
    return min(value, WORST) if math.isfinite(value) else WORST


def _rows(decoder: Decoder, inputs: Sequence[list[int]], counts: Sequence[int]) -> int:
    """Rows of one forward: the original's logits come on top of the edited ones."""
    shape = Shape.of(decoder.model.config, _width(decoder.model))
    row = forward_row(shape, max(map(len, inputs)), 2 * max(counts))
    rows = compared_rows(shape, max(counts))
    compared = comparing_bytes(rows * max(counts), shape.vocabulary)
    free = free_bytes(decoder.device) // decoder.sharing - compared
    return max(1, min(decoder.batch_size, rows, int(free * KL_SHARE) // row))


def _width(model: Any) -> int:
    """Bytes of one number of the residual stream."""
    return int(model.dtype.itemsize)


def _keep(seen: list[Tensor], states: Tensor) -> Tensor:
    """Keep all states; let the head compute one position only."""
    seen.append(states)
    return states[:, -1:]
