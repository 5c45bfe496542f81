"""Arbitrary-rank ablation in the span of the inputs (ENGINE.md, "ARA").

For one writer W (d, n), with its inputs X and outputs Y at the last prompt token of N_g harmless
and N_b harmful prompts, minimise over W'

    p · mean (X_g W'ᵀ − Y_g)² + q · { kNN_k(X_b W'ᵀ, Y_g) − ω · kNN_k(X_b W'ᵀ, Y_b) }

kNN_k(A, B) = mean over the rows of A of the mean of the k least Euclidean distances to rows of B.

A gradient in W' is a sum of outer products of an output's difference to some row of Y with a row
of X. So every iterate is W' = W + Pᵀ K Q, with the rows of Q (m, n) an orthonormal basis of the
span of [X_g; X_b] and those of P (r, d) one of the differences between rows of [Y_g; Y_b]: what is
searched is K (r, m), both at most N_g + N_b, whatever the model's width. Distances and means are
those of the whole space, W itself is never needed, and Pᵀ K Q is the adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from engine.change import Update
from jobs.spec.candidate import Ara

OUTER, INNER, HISTORY = 5, 20, 10  # LBFGS: outer steps, iterations of each, vectors remembered
# Share of the whole fall that an outer step must bring for another one to begin. With 0 it takes
# twice the time; on the demo model the edits are then other, not better ones.
STEADY = 0.05
FARTHEST = 10.0  # largest change of the outputs, in units of their own spread
SMOOTH = 1e-4  # distances are √(δ² + ε²), ε in units of the spread: a gradient also at 0
NULL = 1e-6  # singular values of a span below this share of the largest are no direction of it
ENERGY = 0.99  # of ‖K‖²: what the effective rank holds


@dataclass(frozen=True)
class Sample:
    """One writer's inputs X = Z Q and outputs Y = c + T P, float32 on the CPU.

    Z_good (N_g, m), Z_bad (N_b, m), Q (m, n);  T_good (N_g, r), T_bad (N_b, r), P (r, d);
    rows of Q and of P orthonormal, c some row of d numbers that no distance depends on.
    """

    Z_good: Tensor
    Z_bad: Tensor
    T_good: Tensor
    T_bad: Tensor
    Q: Tensor
    P: Tensor

    @property
    def bytes(self) -> int:
        """Main memory that it takes."""
        parts = (self.Z_good, self.Z_bad, self.T_good, self.T_bad, self.Q, self.P)
        return sum(part.numel() * part.element_size() for part in parts)

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Sample:
        """The sample elsewhere."""
        return Sample(*(part.to(device, dtype) for part in vars(self).values()))


@dataclass(frozen=True)
class Solution:
    """The change of one writer, and what the optimisation says of it.

    before, after   the objective at W and at the change, before it is truncated
    effective       how many singular values hold ENERGY of ‖K‖²; 0 where nothing changes
    error           ‖K − its truncation‖ / ‖K‖
    bounded         false where the objective fell without end or was not finite: then the change
                    is the best iterate before that
    """

    update: Update
    before: float
    after: float
    effective: int
    error: float
    bounded: bool


def condense(
    X_good: Tensor, Y_good: Tensor, X_bad: Tensor, Y_bad: Tensor, device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Sample:  # fmt: skip
    """The sample of inputs (N, n) and outputs (N, d) of both sides; bases made in float64."""
    count = len(X_good)
    Z, Q = _span(torch.cat([X_good, X_bad]).to(device, torch.float64))
    Y = torch.cat([Y_good, Y_bad]).to(device, torch.float64)
    T, P = _span(Y - Y.mean(0))
    host = torch.device("cpu")
    return Sample(Z[:count], Z[count:], T[:count], T[count:], Q, P).to(host, dtype)


def _span(X: Tensor) -> tuple[Tensor, Tensor]:
    """Z (N, m) and Q (m, n) with X = Z Q, rows of Q an orthonormal basis of the rows of X."""
    basis, R = torch.linalg.qr(X.T)
    left, values, _ = torch.linalg.svd(R, full_matrices=False)
    held = values > NULL * values.max().clamp_min(1e-300)
    Q = (basis @ left[:, held]).T
    return X @ Q.T, Q


def nearest(A: Tensor, B: Tensor, k: int, smooth: float) -> tuple[Tensor, Tensor]:
    """kNN_k(A, B) and its gradient in A: (), (N_A, r).

    The neighbours are found by one product; their distances are then taken from differences, which
    do not cancel.
    """
    k = min(k, len(B))
    squares = B.square().sum(1) - 2 * A @ B.T  # ‖a − b‖² − ‖a‖²
    difference = A[:, None] - B[squares.topk(k, dim=1, largest=False).indices]  # (N_A, k, r)
    distance = (difference.square().sum(-1) + smooth * smooth).sqrt()
    gradient = (difference / distance[..., None]).sum(1) / (k * len(A))
    return distance.mean(), gradient


def objective(sample: Sample, candidate: Ara) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """K (r, m) -> the loss () and its gradient (r, m)."""
    s, p, q, omega = sample, candidate.preserve, candidate.steer, candidate.overshoot
    entries = len(s.T_good) * s.P.shape[1]  # the mean is over all d outputs
    smooth = SMOOTH * _spread(s)

    def of(K: Tensor) -> tuple[Tensor, Tensor]:
        moved = s.Z_good @ K.T
        outputs = s.T_bad + s.Z_bad @ K.T
        loss, gradient = p * moved.square().sum() / entries, 2 * p / entries * moved.T @ s.Z_good
        to_good, pull = nearest(outputs, s.T_good, candidate.neighbours, smooth)
        to_bad, push = nearest(outputs, s.T_bad, candidate.neighbours, smooth)
        loss = loss + q * (to_good - omega * to_bad)
        return loss, gradient + q * (pull - omega * push).T @ s.Z_bad

    return of


def solve(sample: Sample, candidate: Ara, device: torch.device | None = None) -> Solution:
    """The change of one writer under `candidate`: a function of the two alone, so repeatable.

    LBFGS with strong Wolfe line search from K = 0, at most OUTER steps of INNER iterations. The
    result is the best finite iterate whose outputs stay within FARTHEST spreads of the original's:
    for ω > 1 the objective may have no minimum.
    """
    s = sample.to(device or sample.Q.device, sample.Q.dtype)
    of, limit = objective(s, candidate), FARTHEST * _spread(s) * len(s.T_bad) ** 0.5
    K = torch.zeros(len(s.P), len(s.Q), dtype=s.Q.dtype, device=s.Q.device, requires_grad=True)
    start = float(of(K.detach())[0])
    best, least, bounded = K.detach().clone(), start, True

    def closure() -> Tensor:
        nonlocal best, least
        value = K.detach()
        loss, K.grad = of(value)
        far = float((s.Z_bad @ value.T).norm())
        # A line search may look beyond the limit and come back, but not from this far.
        if not (torch.isfinite(loss) and far <= 10 * limit):
            raise _Endless
        if float(loss) < least and far <= limit:
            best, least = value.clone(), float(loss)
        return loss

    search = torch.optim.LBFGS(
        [K], lr=1.0, max_iter=INNER, history_size=HISTORY, line_search_fn="strong_wolfe"
    )
    for _ in range(OUTER if K.numel() else 0):
        before = least
        try:
            search.step(closure)  # type: ignore[no-untyped-call]
        except _Endless:
            bounded = False
            break
        bounded = float((s.Z_bad @ K.detach().T).norm()) <= limit
        if not bounded or before - least <= STEADY * (start - least):
            break
    update, effective, error = truncated(s, best, candidate.rank)
    return Solution(update, start, least, effective, error, bounded)


class _Endless(Exception):
    """The objective falls without end in the direction that is searched, or is not finite."""


def truncated(sample: Sample, K: Tensor, rank: int | None) -> tuple[Update, int, float]:
    """The update Pᵀ K Q at its `rank` largest singular values, its effective rank and its error.

    rank None: all singular values above rounding. A change of zero has rank 0.
    """
    left, values, right = torch.linalg.svd(K.double().cpu(), full_matrices=False)
    energy = values.square()
    total = float(energy.sum())
    held = int((values > NULL * values.max()).sum()) if total > 0 else 0
    kept = held if rank is None else min(rank, held)
    root = values[:kept].sqrt()
    P, Q = sample.P.double().cpu(), sample.Q.double().cpu()
    B, A = P.T @ (left[:, :kept] * root), (root[:, None] * right[:kept]) @ Q
    update = Update(B.float(), A.float())
    if held == 0:  # nothing to change, or nothing to learn from
        return update, 0, 0.0
    effective = 1 + int((energy.cumsum(0) < ENERGY * total).sum())
    return update, effective, (float(energy[kept:].sum()) / total) ** 0.5


def summary(solutions: Sequence[Solution | None]) -> tuple[str, Literal["info", "warning"]]:
    """One line for the log about all writers of a candidate, and its level."""
    known = [s for s in solutions if s is not None]
    if not known:
        return "ara: no writer lies in these layers", "info"
    ranks = sorted(s.effective for s in known)
    fell = sum(s.before - s.after for s in known) / len(known)
    text = (
        f"ara: {len(known)} writers, objective fell by {fell:.3g} on average, 99 % of the change "
        f"in rank {ranks[0]} to {ranks[-1]}, truncation error at most "
        f"{max(s.error for s in known):.2%}"
    )
    if endless := sum(not s.bounded for s in known):
        text += f"; {endless} have no minimum within {FARTHEST:g} spreads: the best there is used"
    return text, "warning" if endless else "info"


def _spread(s: Sample) -> float:
    """Root mean square length of the outputs around their mean."""
    return float(torch.cat([s.T_good, s.T_bad]).square().sum(1).mean().sqrt())
