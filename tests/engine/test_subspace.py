"""Subspaces of several directions against numpy, and planted ones that must be found."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.directions import measure
from engine.subspace import (
    interpolated,
    orthonormal,
    self_organising_map,
    singular,
    without,
)
from jobs.spec.candidate import Ablation, Recipe, constant


def projector(V: Tensor) -> Tensor:
    return V.double().T @ V.double()


def random(rows: int, d: int = 24, seed: int = 0) -> Tensor:
    return torch.randn(rows, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(directions: Tensor, sizes: list[float], rows: int = 400) -> Tensor:
    """States (rows, 2, d) that scatter widely along `directions`, little elsewhere."""
    spread = random(rows, len(directions), seed=3) * torch.tensor(sizes, dtype=torch.float64)
    scattered = spread @ directions + 0.01 * random(rows, directions.shape[1], seed=4)
    return scattered[:, None].expand(-1, 2, -1)


def test_orthonormal_rows_span_the_same_and_pass_over_dependent_ones() -> None:
    rows = random(4)
    rows[2] = 3 * rows[0] - rows[1]
    found = orthonormal(rows, 4)
    assert torch.allclose(found @ found.T, torch.diag(torch.tensor([1.0, 1, 1, 0])).double())
    assert torch.allclose(rows @ projector(found), rows)
    assert torch.allclose(found[0], rows[0] / rows[0].norm())
    assert not orthonormal(torch.zeros(2, 5), 2).any()


@pytest.mark.parametrize("shape", [(30, 24), (10, 24)])
def test_singular_vectors_are_numpys(shape: tuple[int, int]) -> None:
    D = random(*shape) * torch.logspace(0, -3, shape[1])
    right = np.linalg.svd(D.numpy(), full_matrices=False)[2]
    found = singular(D, 3).numpy()
    assert np.allclose(np.abs(np.diag(found @ right[:3].T)), 1, atol=1e-9)
    flat = torch.outer(torch.arange(1.0, 9).double(), random(1)[0])
    assert singular(flat, 3).shape == (1, 24)


@pytest.mark.parametrize("projection", ["none", "projected"])
def test_svd_keeps_the_difference_of_means_and_finds_planted_directions(projection: str) -> None:
    axes = orthonormal(random(4, seed=9), 4)
    harmful = planted(axes[:2], [3.0, 2.0]) + 6 * axes[2]
    harmless = 0.1 * random(300, seed=8)[:, None].expand(-1, 2, -1) + 4 * axes[3] + axes[2]
    recipe = Recipe.model_validate({"subspace": "svd", "count": 3, "projection": projection})
    single = recipe.model_copy(update={"subspace": "single", "count": 1})
    found = measure({-1: harmful}, {-1: harmless}, [recipe, single])
    V = found.axes(recipe).vectors[0].double()
    assert V.shape == (3, 24)
    assert torch.allclose(V @ V.T, torch.eye(3).double(), atol=1e-6)
    assert torch.allclose(V[0], found.axes(single).vectors[0, 0].double(), atol=1e-6)
    assert (axes[:2] @ projector(V)).norm(dim=1).min() > 0.99
    # The slow way: numpy's SVD of the deviations from the harmless mean.
    D = harmful[:, 0] - harmless[:, 0].mean(0)
    if projection == "projected":
        g = harmless[:, 0].mean(0)
        D = without(D, g / g.norm())
    D = without(D, V[0] / V[0].norm())
    right = torch.from_numpy(np.linalg.svd(D.numpy(), full_matrices=False)[2][:2].copy())
    assert torch.allclose(projector(V[1:]), projector(right), atol=1e-5)


def test_fewer_dimensions_than_asked_for_give_zero_rows() -> None:
    axes = orthonormal(random(2, seed=9), 2)
    harmful = (random(50, 1, seed=1) @ axes[:1] + axes[1])[:, None].expand(-1, 2, -1)
    harmless = torch.zeros(5, 2, 24)
    for kind in ("svd", "som"):
        recipe = Recipe.model_validate({"subspace": kind, "count": 4, "projection": "none"})
        V = measure({-1: harmful}, {-1: harmless}, [recipe]).axes(recipe).vectors[0].double()
        assert torch.allclose(projector(V), projector(axes), atol=1e-5)
        assert not V[2:].any()


def test_map_finds_planted_clusters_and_counts_their_samples() -> None:
    centers = 10 * orthonormal(random(3, seed=5), 3)
    sizes = [120, 60, 20]
    X = torch.cat([c + 0.05 * random(n, seed=n) for c, n in zip(centers, sizes, strict=True)])
    nodes, wins = self_organising_map(X)
    # Counts are those of the nearest node, found one by one.
    nearest = [min(range(9), key=lambda j: float((x - nodes[j]).norm())) for x in X]
    assert wins.tolist() == [nearest.count(j) for j in range(9)]
    # Every winning node lies within one cluster and wins samples of that one only.
    first = 0
    for center, size in zip(centers, sizes, strict=True):
        winners = set(nearest[first : first + size])
        assert int(wins[list(winners)].sum()) == size
        assert all((nodes[j] - center).norm() < 0.5 for j in winners)
        first += size


def test_map_does_not_depend_on_the_order_of_samples() -> None:
    X = random(80) * torch.logspace(0, -1, 24)
    nodes, wins = self_organising_map(X)
    again, counts = self_organising_map(X[torch.randperm(80)])
    # Principal components have no sign: the grid may come out mirrored.
    nearest = torch.cdist(nodes, again).argmin(1)
    assert torch.allclose(nodes, again[nearest], atol=1e-6)
    assert torch.equal(wins, counts[nearest])
    same = self_organising_map(X)
    assert torch.equal(nodes, same[0]) and torch.equal(wins, same[1])


def test_som_directions_point_at_the_most_winning_nodes() -> None:
    centers = 10 * orthonormal(random(2, seed=5), 2)
    X = torch.cat([centers[0] + 0.01 * random(90), centers[1] + 0.01 * random(30, seed=2)])
    recipe = Recipe(subspace="som", count=1, projection="none")
    both = Recipe(subspace="som", count=9, projection="none")
    found = measure({-1: X[:, None].expand(-1, 2, -1)}, {-1: torch.zeros(4, 2, 24)},
                    [recipe, both])  # fmt: skip
    v = found.axes(recipe).vectors[0, 0].double()
    assert v @ centers[0] / 10 > 0.999
    assert (centers @ projector(found.axes(both).vectors[0])).norm(dim=1).min() > 9.99


def test_interpolated_subspaces() -> None:
    A, B = (orthonormal(random(3, seed=s), 3) for s in (1, 2))
    turn = orthonormal(random(3, 3, seed=6), 3)
    assert torch.allclose(projector(interpolated(A, B, 0.0)), projector(A), atol=1e-12)
    assert torch.allclose(projector(interpolated(A, B, 1.0)), projector(B), atol=1e-12)
    # The bases that were handed in do not matter: signs, order, rotation.
    middle = interpolated(A, B, 0.3)
    assert torch.allclose(projector(interpolated(turn @ A, B, 0.3)), projector(middle), atol=1e-12)
    assert torch.allclose(middle @ middle.T, torch.eye(3).double(), atol=1e-12)
    # Half way is as far from A as from B, and nearer to each than they are to each other.
    half = projector(interpolated(A, B, 0.5))
    to_a, to_b = (half - projector(A)).norm(), (half - projector(B)).norm()
    assert to_a == pytest.approx(float(to_b), rel=1e-9)
    assert to_a < (projector(A) - projector(B)).norm()


def test_interpolation_in_a_plane_is_that_of_the_vectors() -> None:
    a, b = orthonormal(random(2), 2)
    for angle, f in itertools.product((0.3, 1.2), (0.25, 0.5)):
        turned = np.cos(angle) * a + np.sin(angle) * b
        shared = orthonormal(random(4, seed=7), 4)
        shared = orthonormal(without(without(shared, a), b), 1)
        found = interpolated(torch.stack([a, shared[0]]), torch.stack([shared[0], -turned]), f)
        v = (1 - f) * a + f * turned
        true = torch.stack([shared[0], v / v.norm()])
        assert torch.allclose(projector(found), projector(true), atol=1e-12)


def test_global_scope_with_several_directions() -> None:
    torch.manual_seed(0)
    bad, good = torch.randn(30, 5, 24), torch.randn(30, 5, 24) + 1
    for projection in ("projected", "biprojected"):
        recipe = Recipe.model_validate({"subspace": "svd", "count": 2, "projection": projection})
        found = measure({-1: bad}, {-1: good}, [recipe])
        axes = found.axes(recipe)
        candidate = Ablation(
            recipe=recipe, scope="global", index=1.25, attention=constant(), mlp=constant()
        )
        V = found.of(candidate).double()
        assert V.shape == (4, 2, 24)
        shared = interpolated(axes.vectors[1], axes.vectors[2], 0.25)
        for layer, rows in enumerate(V):
            assert torch.allclose(rows @ rows.T, torch.eye(2).double(), atol=1e-6)
            g = axes.good[layer].double()
            true = shared
            if projection == "biprojected":
                true = orthonormal(without(shared, g / g.norm()), 2)
                assert (rows @ g).abs().max() < 1e-5
            assert torch.allclose(projector(rows), projector(true), atol=1e-5)
