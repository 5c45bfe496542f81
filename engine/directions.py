"""Directions of refusal in the residual stream (ENGINE.md, "Directions").

Arditi et al. 2024 (arXiv 2406.11717): difference of means. Lai 2025, "projected abliteration": the
part along the harmless mean is taken out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import EngineError
from jobs.spec.candidate import Candidate


def unit(v: Tensor) -> Tensor:
    """`v` (..., d) scaled to length 1; a zero vector stays zero."""
    length: Tensor = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
    return v / length.clamp_min(1e-30)


@dataclass(frozen=True)
class Directions:
    """Unit vectors (L+1, d), float32, one per residual state; state 0 is the embedding.

    raw        r_l = normalise(mean_bad h_l − mean_good h_l)
    projected  normalise(r_l − (r_l·g_l) g_l), g_l = normalise(mean_good h_l)
    good_mean  mean_good h_l, not normalised
    """

    raw: Tensor
    projected: Tensor
    good_mean: Tensor

    @property
    def layers(self) -> int:
        """L, the number of decoder blocks."""
        return self.raw.shape[0] - 1

    def table(self, projected: bool) -> Tensor:
        """The vectors (L, d) after each block: row l is r_{l+1}."""
        return (self.projected if projected else self.raw)[1:]

    def mixture(self, candidate: Candidate) -> tuple[int, int, float, float] | None:
        """How a global direction is made of two rows (a, b) of `table`: wa·r_a + wb·r_b.

        v = normalise((1−f) r_{⌊i⌋+1} + f r_{⌊i⌋+2}), f = i − ⌊i⌋. None for scope `per_layer`.
        """
        if candidate.scope == "per_layer":
            return None
        i = candidate.index
        if i is None or not 0 <= i <= self.layers - 1:
            raise EngineError(
                "bad_request",
                f"index: {i} is not a layer index of a model with {self.layers} layers",
                f"Give a number from 0 to {self.layers - 1}, or use scope per_layer.",
            )
        low = math.floor(i)
        high = min(low + 1, self.layers - 1)
        f = i - low
        rows = self.table(candidate.projected)
        length = float(torch.linalg.vector_norm((1 - f) * rows[low] + f * rows[high]))
        length = max(length, 1e-30)
        return low, high, (1 - f) / length, f / length

    def of(self, candidate: Candidate) -> Tensor:
        """v (L, d) of every layer's writers under `candidate`."""
        rows = self.table(candidate.projected)
        mixture = self.mixture(candidate)
        if mixture is None:
            return rows
        low, high, wa, wb = mixture
        return (wa * rows[low] + wb * rows[high]).expand(self.layers, -1)


def measure(harmful: Tensor, harmless: Tensor) -> Directions:
    """Directions from last-token residuals (N, L+1, d) of both sides; means in float64.

    Raises `bad_prompts` where the two means coincide after any block, and `engine_failed`
    where the states hold NaN.
    """
    bad = harmful.mean(dim=0, dtype=torch.float64)
    good = harmless.mean(dim=0, dtype=torch.float64)
    if not (torch.isfinite(bad).all() and torch.isfinite(good).all()):
        raise EngineError(
            "engine_failed",
            "the model's hidden states hold NaN or infinity",
            "Choose dtype bfloat16 or float32.",
        )
    # State 0 is the last token's embedding: the template ends alike for all prompts, so it may
    # be zero there; blocks 1..L must differ.
    if not (torch.linalg.vector_norm(bad - good, dim=-1)[1:] > 0).all():
        raise EngineError(
            "bad_prompts",
            "harmful and harmless prompts give the same hidden states",
            "The two direction prompt sets must differ; check that they are not the same file.",
        )
    r = unit(bad - good)
    g = unit(good)
    projected = unit(r - (r * g).sum(-1, keepdim=True) * g)
    return Directions(raw=r.float(), projected=projected.float(), good_mean=good.float())
