"""First-token refusal log-odds: how likely an answer begins as the original's refusals do.

Arditi et al. 2024 (arXiv 2406.11717), section 2.3 and appendix B: with R the tokens that refusals
begin with and p the distribution of the first answer token,

    log-odds = log Σ_{t∈R} p_t − log(1 − Σ_{t∈R} p_t)

One forward a prompt, nothing is decoded.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.report import Report
from jobs.spec.scores import Value, Z

if TYPE_CHECKING:
    from engine.decode import Answer, Decoder
    from engine.edit import Edit

COVER = 0.95  # of the refusals begin with one of the tokens that count


def refusal_tokens(refusals: Sequence[Answer]) -> tuple[int, ...]:
    """The first tokens of most of these answers, the most frequent first; () without refusals."""
    firsts = Counter(answer.tokens[0] for answer in refusals if answer.tokens)
    found: list[int] = []
    covered = 0
    for token, times in sorted(firsts.items(), key=lambda item: (-item[1], item[0])):
        if covered >= COVER * firsts.total():
            break
        found.append(token)
        covered += times
    return tuple(found)


def log_odds(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    """log-odds (rows), float64, nats, of first-token logits (rows, V)."""
    log_p = logits.double().log_softmax(-1)
    chosen = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    chosen[list(tokens)] = True
    inside = log_p.masked_fill(~chosen, -math.inf).logsumexp(-1)
    outside = log_p.masked_fill(chosen, -math.inf).logsumexp(-1)  # log(1 − P) without cancellation
    return inside - outside


@torch.inference_mode()
def per_prompt(
    decoder: Decoder, prompts: Sequence[list[int]], tokens: Sequence[int], report: Report
) -> Tensor:
    """The log-odds (N), float64, of each prompt under the edit that `decoder` has selected for all.

    tokens: `refusal_tokens` of the original.
    """
    found: dict[int, float] = {}
    pending = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    while pending:
        batch = pending[: decoder.batch_size]
        with decoder.surviving(len(batch)):
            odds = _of_batch(decoder, [prompts[place] for place in batch], tokens)
            found |= zip(batch, odds, strict=True)
        pending = [place for place in pending if place not in found]
        report.progress("log-odds", len(found), len(prompts))
    return torch.tensor([found[place] for place in range(len(prompts))], dtype=torch.float64)


def _of_batch(
    decoder: Decoder, batch: Sequence[list[int]], tokens: Sequence[int]
) -> list[float]:  # fmt: skip
    ids, mask = decoder.padded(batch)
    return log_odds(decoder.forward(ids, mask, 1).logits[:, -1], tokens).tolist()


def value(
    decoder: Decoder,
    prompts: Sequence[list[int]],
    tokens: Sequence[int],
    edit: Edit | None,
    report: Report,
) -> Value:
    """Mean log-odds over `prompts` with its 95 % interval (normal), of one edit."""
    with decoder.edited(edit):
        each = per_prompt(decoder, prompts, tokens, report)
    n, mean = len(each), float(each.mean())
    error = Z * float(each.std()) / math.sqrt(n) if n > 1 else None
    if error is None:
        return Value(value=mean, n=n)
    return Value(value=mean, low=mean - error, high=mean + error, n=n)
