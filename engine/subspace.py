"""Several directions at once: spans of singular vectors or of the nodes of a self-organising map.

An edit takes a whole subspace out, so only the span of V matters; rows are orthonormal, and zero
where a subspace has fewer dimensions than were asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.change import norm

DEPENDENT = 1e-7  # what is left of a row outside of the rows before it, below which it adds nothing
GRID = 3  # side of the map: 9 nodes
EPOCHS = 60
RADIUS = (1.5, 0.3)  # of the neighbourhood, in steps of the grid: first and last epoch


def without(V: Tensor, g: Tensor) -> Tensor:
    """V (..., d) without its part along the unit (or zero) vector g (d)."""
    return V - (V @ g)[..., None] * g


def orthonormal(rows: Tensor, count: int) -> Tensor:
    """(count, d): Gram and Schmidt over `rows` (m, d) in their order, float64.

    A row that depends on those before it is passed over; zero rows where fewer than `count` remain.
    """
    basis = rows.new_zeros(count, rows.shape[1], dtype=torch.float64)
    found = 0
    for row in rows.double():
        rest = row
        for _ in range(2):  # twice is enough (Kahan)
            rest = rest - basis[:found].T @ (basis[:found] @ rest)
        length = norm(rest, 0)
        if found < count and length > DEPENDENT * norm(row, 0):
            basis[found] = rest / length
            found += 1
    return basis


def singular(D: Tensor, count: int) -> Tensor:
    """The `count` leading right singular vectors of D (N, d) as rows, float64; fewer by its rank.

    By the eigenvectors of the smaller of D Dᵀ and Dᵀ D.
    """
    wide = D.shape[0] <= D.shape[1]
    squares, vectors = torch.linalg.eigh(D @ D.T if wide else D.T @ D)
    order = torch.arange(len(squares) - 1, -1, -1)[:count]
    order = order[squares[order] > DEPENDENT**2 * squares[-1]]
    rows = vectors[:, order].T
    return orthonormal(rows @ D if wide else rows, len(rows))


def self_organising_map(X: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes (GRID², d), float64, and how many of the samples X (N, d) each of them wins.

    The batch map (Kohonen 2013, "Essentials of the self-organizing map"): it starts as a grid in
    the plane of the two principal components and each epoch sets every node to the mean of all
    samples, weighted by a Gaussian of the distance on the grid between the node and the sample's
    winner. No random number and no order of samples is in it.
    """
    X = X.double()
    steps = torch.arange(GRID, dtype=torch.float64) - (GRID - 1) / 2
    places = torch.cartesian_prod(steps, steps)  # (nodes, 2)
    deviations = X - X.mean(0)
    plane = singular(deviations, 2)
    spread = (deviations @ plane.T).std(0, correction=0) / ((GRID - 1) / 2)
    nodes = X.mean(0) + places[:, : len(plane)] * spread @ plane
    between = torch.cdist(places, places).square()
    for epoch in range(EPOCHS):
        radius = RADIUS[0] * (RADIUS[1] / RADIUS[0]) ** (epoch / (EPOCHS - 1))
        weights = (-between / (2 * radius * radius)).exp()[:, _winners(X, nodes)]  # (nodes, N)
        # A node so far from all winners that its weights vanish stays where it is.
        total = weights.sum(1, keepdim=True)
        nodes = torch.where(total > 1e-12, weights @ X / total.clamp_min(1e-300), nodes)
    return nodes, torch.bincount(_winners(X, nodes), minlength=len(nodes))


def _winners(X: Tensor, nodes: Tensor) -> Tensor:
    """The nearest node of each sample: ‖x − c‖² − ‖x‖² is one product."""
    return (nodes.square().sum(1) - 2 * X @ nodes.T).argmin(1)


def interpolated(A: Tensor, B: Tensor, f: float) -> Tensor:
    """The subspace at share f of the way from A to B, both (k, d), rows orthonormal or zero.

    The bases are turned to their principal vectors (Björck and Golub 1973): a_i·b_j = 0 for i ≠ j
    and ≥ 0 for i = j, so pairs are mixed with the right sign and remain orthogonal. float64.
    """
    A, B = A.double(), B.double()
    left, _, right = torch.linalg.svd(A @ B.T)
    mixed = (1 - f) * left.T @ A + f * right @ B
    return orthonormal(mixed, len(A))
