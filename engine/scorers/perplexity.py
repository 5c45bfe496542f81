"""Perplexity on texts that the job names: exp of the mean negative log-likelihood of a token."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.memory import FLOAT32, Shape, fitting_rows, forward_row, free_bytes
from engine.report import Report
from engine.scorers.ratio import ratio
from jobs.spec.scores import Value

if TYPE_CHECKING:
    from engine.decode import Decoder

WINDOW = 1024  # tokens that are read at once; the first of them is given, not scored
CHUNK = 1 << 24  # logits that are held in float32 at once


def windows(tokenizer: Any, texts: Iterable[str], context: int | None) -> list[list[int]]:
    """Token ids of the texts in pieces of at most `WINDOW` and `context` tokens.

    Pieces do not overlap; each text begins with what the tokenizer puts before a text.
    """
    size = min(WINDOW, context or WINDOW)
    found = []
    for text in texts:
        ids = list(tokenizer(text)["input_ids"])
        found += [piece for k in range(0, len(ids), size) if len(piece := ids[k : k + size]) > 1]
    return found


@torch.inference_mode()
def perplexity(decoder: Decoder, pieces: Sequence[list[int]], report: Report) -> Value:
    """exp(mean NLL in nats) of the model with the edit that `decoder` has selected for every row.

    The interval takes the pieces as independent samples (a ratio estimate, see `ratio`);
    n counts scored tokens.
    """
    losses: dict[int, float] = {}
    pending = sorted(range(len(pieces)), key=lambda place: -len(pieces[place]))
    while pending:
        batch = pending[: _rows(decoder, len(pieces[pending[0]]))]
        with decoder.surviving(len(batch)):
            found = _losses(decoder, [pieces[place] for place in batch])
            losses |= zip(batch, found, strict=True)
        pending = [place for place in pending if place not in losses]
        report.progress("perplexity", len(losses), len(pieces))
    return _value([(losses[place], len(pieces[place]) - 1) for place in range(len(pieces))])


def _losses(decoder: Decoder, batch: Sequence[list[int]]) -> list[float]:
    """Of each piece, summed over its tokens but the first."""
    ids, mask = decoder.padded(batch)
    logits = decoder.forward(ids, mask, ids.shape[1]).logits
    return [
        _loss(logits[row, -len(piece) : -1], ids[row, -len(piece) + 1 :])
        for row, piece in enumerate(batch)
    ]


def _rows(decoder: Decoder, tokens: int) -> int:
    """Rows of one forward, all of whose logits are wanted."""
    shape = Shape.of(decoder.model.config, decoder.model.dtype.itemsize)
    free = free_bytes(decoder.device) - FLOAT32 * max(CHUNK, shape.vocabulary)
    fit = fitting_rows(free, forward_row(shape, tokens, tokens), decoder.device)
    return max(1, min(fit, decoder.batch_size // 8))


def _loss(logits: Tensor, targets: Tensor) -> float:
    """Summed negative log-likelihood, nats, of targets (t) under logits (t, V); float32 chunks."""
    rows = max(1, CHUNK // logits.shape[-1])
    total = 0.0
    for k in range(0, len(targets), rows):
        log_p = logits[k : k + rows].float().log_softmax(-1)
        total -= float(log_p.gather(-1, targets[k : k + rows, None]).sum(dtype=torch.float64))
    return total


def _value(pieces: Sequence[tuple[float, int]]) -> Value:
    losses, counts = [loss for loss, _ in pieces], [count for _, count in pieces]
    mean, error = ratio(losses, counts)
    if error is None:
        return Value(value=math.exp(mean), n=sum(counts))
    low, high = math.exp(mean - error), math.exp(mean + error)
    return Value(value=math.exp(mean), low=low, high=high, n=sum(counts))
