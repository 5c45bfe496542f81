"""What an edit does to the weight of one writer: ENGINE.md's table, for k directions.

W (d, n) is a writer, V (k, d) orthonormal directions, λ the strength, N (d) the row norms,
Ŵ = W/N. `formula` is the literal definition in float64; `rewrite` is the same in strips, for large
weights and for stacks (E, d, n) of experts, each of which is a matrix of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from jobs.spec.candidate import EditMode

TINY = 1e-30
STRIP = 512 << 10  # bytes of a large weight that are held in float64 at once, on a CPU
BATCH = 256 << 20  # the same on a GPU, where many small steps cost more than memory


@dataclass(frozen=True)
class Projection:
    """Directional ablation: V (k, d), rows orthonormal or zero, float32.

    mean (k)   affine: what V y becomes instead of 0, times λ; a bias, the weight is not concerned
    """

    V: Tensor
    lam: float
    mode: EditMode
    mean: Tensor | None = None

    def bias(self) -> Tensor | None:
        """λ Vᵀ mean (d), which an affine edit adds to the output; None without one."""
        return None if self.mean is None else self.lam * (self.mean @ self.V)


@dataclass(frozen=True)
class Update:
    """W' = W + B A with B (d, q), A (q, n), float32: arbitrary-rank ablation."""

    B: Tensor
    A: Tensor


Change = Projection | Update


def norm(M: Tensor, dim: int) -> Tensor:
    """Euclidean norms along `dim`."""
    norms: Tensor = torch.linalg.vector_norm(M, dim=dim)
    return norms


def formula(W: Tensor, change: Change) -> Tensor:
    """W' (d, n) in float64 by the literal formula: the slow twin of `rewrite` and `edit.term`.

    none     W − λ Vᵀ(V W)
    pre      N∘(Ŵ − λ Vᵀ(V Ŵ))
    full     N∘rownorm(Ŵ − λ Vᵀ(V Ŵ))
    columns  column j: ‖w_j‖ · normalise((I − λ VᵀV) ŵ_j)
    """
    W = W.double()
    if isinstance(change, Update):
        return W + change.B.to(W.device, torch.float64) @ change.A.to(W.device, torch.float64)
    V, lam, mode = change.V.to(W.device, torch.float64), change.lam, change.mode
    if mode == "none":
        return W - lam * V.T @ (V @ W)
    if mode == "columns":
        norms = norm(W, 0)
        unit_columns = W / norms.clamp_min(TINY)
        turned = unit_columns - lam * V.T @ (V @ unit_columns)
        return norms * turned / norm(turned, 0).clamp_min(TINY)
    N = norm(W, 1)[:, None]
    unit_rows = W / N.clamp_min(TINY)
    turned = unit_rows - lam * V.T @ (V @ unit_rows)
    if mode == "pre":
        return N * turned
    return N * turned / norm(turned, 1)[:, None].clamp_min(TINY)


def rewrite(W: Tensor, change: Change, out: Tensor | None = None) -> Tensor:
    """`formula` for large weights: float64 a strip of rows at a time, rounded once to W's dtype.

    W (d, n) or a stack (E, d, n), any float dtype; `out` takes the result, else it is new. On the
    CPU a matrix gets the same bits alone and within a stack: both are one matrix at a time. A GPU
    takes as many matrices at once as fit into `BATCH` bytes of float64.
    """
    out = torch.empty_like(W) if out is None else out
    stack, target = (W, out) if W.dim() == 3 else (W[None], out[None])
    if W.device.type != "cpu":
        for few in strips(len(stack), max(1, BATCH // (8 * stack[0].numel()))):
            _rewrite(stack[few], change, target[few])
        return out
    with _single_threaded() as threads, ThreadPoolExecutor(threads) as pool:
        each = strips(len(stack), 1)
        list(pool.map(lambda one: _rewrite(stack[one], change, target[one]), each))
    return out


@contextmanager
def _single_threaded() -> Iterator[int]:
    """Single-threaded torch, and how many threads it may have.

    Its own threads meet after every small step: 50 times slower on a machine that is busy
    (measured on 2 cores). So each thread takes a matrix of its own.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


@torch.inference_mode()
def _rewrite(W: Tensor, change: Change, out: Tensor) -> None:
    """`rewrite` of a few matrices W (e, d, n) into `out`."""
    parts = strips(W.shape[1], _rows(W))
    if isinstance(change, Update):
        B, A = (M.to(W.device, torch.float64) for M in (change.B, change.A))
        for part in parts:
            out[:, part] = W[:, part].double() + B[part] @ A
        return
    V, lam, mode = change.V.to(W.device, torch.float64), change.lam, change.mode
    if mode in ("none", "columns"):
        squares, t = column_sums(W, V)
        # ‖w_j − λ Vᵀt_j‖² = ‖w_j‖² − 2λ‖t_j‖² + λ² t_jᵀ(V Vᵀ)t_j
        turned = (t * (2 * lam * t - lam * lam * (V @ V.T) @ t)).sum(1)
        kept = (squares - turned).clamp_min(1e-12 * squares).clamp_min(TINY)
        c = (squares / kept).sqrt()[:, None]
        for part in parts:
            w = W[:, part].to(torch.float64, copy=True)  # changed in place below
            w.baddbmm_(V[:, part].T.expand(len(W), -1, -1), t, alpha=-lam)
            out[:, part] = w.mul_(c) if mode == "columns" else w
        return
    N, u = row_sums(W, V)
    for part in parts:  # N∘(Ŵ − λ Vᵀu) = W − λ (N∘Vᵀ) u
        w = W[:, part].to(torch.float64, copy=True)
        w.baddbmm_(N[:, part, None] * V[:, part].T, u, alpha=-lam)
        if mode == "full":
            w.mul_((N[:, part] / norm(w, -1).clamp_min(TINY))[..., None])
        out[:, part] = w


def strips(size: int, most: int) -> list[slice]:
    """0..size in pieces of at most `most`."""
    return [slice(k, min(k + most, size)) for k in range(0, size, most)]


def _rows(W: Tensor) -> int:
    """Rows of matrices W (..., d, n) whose float64 stays in a CPU's cache, or within `BATCH`."""
    budget = BATCH if W.device.type == "cuda" else STRIP
    return max(1, budget // (8 * W.shape[-1] * W[..., 0, 0].numel()))


def row_sums(W: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """N (..., d) row norms and u = V Ŵ (..., k, n) of W (..., d, n), V (k, d); float64.

    One pass, a strip of float64 at a time.
    """
    V = V.to(W.device, torch.float64)
    N = torch.empty(W.shape[:-1], dtype=torch.float64, device=W.device)
    u = N.new_zeros(*W.shape[:-2], len(V), W.shape[-1])
    for part in strips(W.shape[-2], _rows(W)):
        w = W[..., part, :].double()
        N[..., part] = norm(w, -1)
        u += (V[:, part] / N[..., None, part].clamp_min(TINY)) @ w
    return N, u


def column_sums(W: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """Squared column norms (..., n) and t = V W (..., k, n) of W (..., d, n), V (k, d); float64.

    One pass, a strip of float64 at a time.
    """
    V = V.to(W.device, torch.float64)
    squares = torch.zeros(*W.shape[:-2], W.shape[-1], dtype=torch.float64, device=W.device)
    t = squares.new_zeros(*W.shape[:-2], len(V), W.shape[-1])
    for part in strips(W.shape[-2], _rows(W)):
        w = W[..., part, :].double()
        t += V[:, part] @ w
        squares += w.square().sum(-2)
    return squares, t
