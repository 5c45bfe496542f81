"""The edit of one writer: ENGINE.md's table, as scalings and a rank-one term.

W (d, n) is a writer, v (d) a unit direction, λ its strength, N (d) the row norms, Ŵ = W/N,
u = vᵀŴ (n), t = vᵀW (n). Every mode is

    y' = s∘(W(c∘x)) + a (u·x) + bias

so a candidate is a few vectors and no weight is touched. `formula` is the slow twin.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.anatomy import Anatomy
from engine.directions import Directions
from engine.errors import EngineError
from jobs.spec.candidate import Candidate, EditMode

TINY = 1e-30
STRIP = 128  # rows of a large weight that are held in float64 at once


@dataclass(frozen=True)
class RankOne:
    """One writer's edit: s (d) or None for ones, c (n) or None for ones, a (d), u (n); float32."""

    s: Tensor | None
    c: Tensor | None
    a: Tensor
    u: Tensor


@dataclass(frozen=True)
class Edit:
    """One candidate's edit: an entry per writer, in the anatomy's order; None where λ = 0."""

    writers: tuple[RankOne | None, ...]


@dataclass(frozen=True)
class Basis:
    """What a writer's edits are made of, for all directions R (L, d); linear in v, float32.

    N (d)  row norms         columns (n)  column norms
    u (L, n)  R Ŵ            Wu (L, d)    Ŵ u, row k for direction k         t (L, n)  R W
    """

    N: Tensor
    columns: Tensor
    u: Tensor
    Wu: Tensor
    t: Tensor


def _norm(M: Tensor, dim: int) -> Tensor:
    """Euclidean norms along `dim`."""
    norms: Tensor = torch.linalg.vector_norm(M, dim=dim)
    return norms


def basis(W: Tensor, R: Tensor) -> Basis:
    """The basis of a weight W (d, n) for directions R (L, d); one pass over the weight."""
    W, R = W.float(), R.to(W.device, torch.float32)
    N, columns = _norm(W, 1), _norm(W, 0)
    t = R @ W
    unit_rows = W / N.clamp_min(TINY)[:, None]
    u = R @ unit_rows
    return Basis(N=N, columns=columns, u=u, Wu=u @ unit_rows.T, t=t)


def rank_one(
    mode: EditMode, lam: float, v: Tensor, N: Tensor, columns: Tensor, u: Tensor, Wu: Tensor,
    t: Tensor,
) -> RankOne:  # fmt: skip
    """One writer's edit from the vectors of its basis at v; O(d + n).

    none     W' = W − λ v tᵀ
    pre      W' = W − λ (N∘v) uᵀ
    full     W' = diag(s) W − λ (s∘N∘v) uᵀ,  s_i = 1/√(1 − 2λ v_i (Ŵ_i·u) + λ² v_i² ‖u‖²)
    columns  W' = (I − λ v vᵀ) W diag(c),    c_j = 1/√(1 − (2λ−λ²)(v·ŵ_j)²)
    """
    if mode == "none":
        return RankOne(None, None, -lam * v, t)
    if mode == "pre":
        return RankOne(None, None, -lam * N * v, u)
    if mode == "full":
        # float64: near λ v_i ‖u‖ = 1 the terms cancel.
        lv, uu = lam * v.double(), u.double().square().sum()
        s = (1 - 2 * lv * Wu.double() + lv.square() * uu).clamp_min(TINY).rsqrt().float()
        return RankOne(s, None, -lam * s * N * v, u)
    cosine = t.double() / columns.double().clamp_min(TINY)
    c = (1 - (2 * lam - lam * lam) * cosine.square()).clamp_min(1e-12).rsqrt().float()
    return RankOne(None, c, -lam * v, c * t)


class EditBuilder:
    """Makes edits from candidates; each writer's weight is read once per kind of direction.

    A candidate then costs O(d + n) per writer. The bases take 4 L (d + 2n) bytes per writer.
    """

    def __init__(self, anatomy: Anatomy, directions: Directions) -> None:
        """`directions` must have been measured on the model of `anatomy`."""
        if directions.layers != anatomy.layers or directions.raw.shape[1] != anatomy.hidden:
            raise EngineError("bad_request", "the directions belong to another model")
        self.anatomy = anatomy
        self.directions = directions
        self._bases: dict[bool, list[Basis]] = {}

    def bases(self, projected: bool) -> list[Basis]:
        """The basis of every writer; computed at the first call for this kind."""
        if projected not in self._bases:
            rows = self.directions.table(projected)
            self._bases[projected] = [basis(w.weight(), rows) for w in self.anatomy.writers]
        return self._bases[projected]

    def build(self, candidate: Candidate) -> Edit:
        """The edit of `candidate`. Raises `bad_request` for an index beyond the layers."""
        mixture = self.directions.mixture(candidate)
        directions = self.directions.of(candidate)
        found: list[RankOne | None] = []
        for writer, b in zip(self.anatomy.writers, self.bases(candidate.projected), strict=True):
            lam = candidate.kernel(writer.component).weight(writer.layer)
            if lam == 0:
                found.append(None)
                continue
            rows = (writer.layer, writer.layer, 1.0, 0.0) if mixture is None else mixture
            low, high, wa, wb = rows
            u, Wu, t = (wa * m[low] + wb * m[high] for m in (b.u, b.Wu, b.t))
            v = directions[writer.layer].to(b.N.device)
            found.append(rank_one(candidate.mode, lam, v, b.N, b.columns, u, Wu, t))
        return Edit(tuple(found))


def formula(W: Tensor, v: Tensor, lam: float, mode: EditMode) -> Tensor:
    """W' (d, n) in float64 by the literal formula: the twin of `rank_one`."""
    W, v = W.double(), v.to(W.device, torch.float64)
    if mode == "none":
        return W - lam * torch.outer(v, v @ W)
    if mode == "columns":
        norms = _norm(W, 0)
        unit_columns = W / norms.clamp_min(TINY)
        turned = unit_columns - lam * torch.outer(v, v @ unit_columns)
        return norms * turned / _norm(turned, 0).clamp_min(TINY)
    N = _norm(W, 1)[:, None]
    unit_rows = W / N.clamp_min(TINY)
    turned = unit_rows - lam * torch.outer(v, v @ unit_rows)
    if mode == "pre":
        return N * turned
    return N * turned / _norm(turned, 1)[:, None].clamp_min(TINY)


def _strips(d: int, rows: int) -> list[slice]:
    return [slice(k, min(k + rows, d)) for k in range(0, d, rows)]


@dataclass(frozen=True)
class Sums:
    """One pass over a weight, all float64: N (d) row norms, squares (n) = columns², t, u (n)."""

    N: Tensor
    squares: Tensor
    t: Tensor
    u: Tensor


def sums(W: Tensor, v: Tensor, rows: int = STRIP) -> Sums:
    """The sums of W (d, n), any float dtype, for one v (d); a strip of float64 at a time."""
    v = v.to(W.device, torch.float64)
    d, n = W.shape
    N = torch.zeros(d, dtype=torch.float64, device=W.device)
    squares = torch.zeros(n, dtype=torch.float64, device=W.device)
    both = torch.zeros(2, n, dtype=torch.float64, device=W.device)
    for strip in _strips(d, rows):
        w = W[strip].double()
        square = w.square()
        N[strip] = square.sum(1).sqrt()
        squares += square.sum(0)
        both += torch.stack([v[strip], v[strip] / N[strip].clamp_min(TINY)]) @ w
    t, u = both
    return Sums(N, squares, t, u)


def rewrite(W: Tensor, v: Tensor, lam: float, mode: EditMode, rows: int = STRIP) -> Tensor:
    """`formula` for a large weight: float64 in strips of `rows` rows, the result in W's dtype.

    W (d, n) of any float dtype. Besides W and the result it needs a few strips of float64.
    """
    v = v.to(W.device, torch.float64)
    whole = sums(W, v, rows)
    kept = whole.squares - (2 * lam - lam * lam * v.square().sum()) * whole.t.square()
    c = (whole.squares / kept.clamp_min(1e-12 * whole.squares).clamp_min(TINY)).sqrt()
    new = torch.empty_like(W)
    for strip in _strips(W.shape[0], rows):
        w = W[strip].to(torch.float64, copy=True)  # changed in place below
        if mode in ("none", "columns"):
            w.addr_(v[strip], whole.t, alpha=-lam)
        else:  # N∘(Ŵ − λ v uᵀ) = W − λ (N∘v) uᵀ
            w.addr_(whole.N[strip] * v[strip], whole.u, alpha=-lam)
        if mode == "columns":
            w *= c
        elif mode == "full":
            w *= (whole.N[strip] / _norm(w, 1).clamp_min(TINY))[:, None]
        new[strip] = w.to(W.dtype)
    return new
