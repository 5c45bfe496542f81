"""The geometry of states against plain numpy computations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from engine.geometry import geometry, silhouette


def states(seed: int = 0, bad: int = 30, good: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sides (N, 5, 12): alike at the embedding, further apart with every layer."""
    torch.manual_seed(seed)
    away = torch.arange(5.0)[:, None] * torch.randn(12)
    return torch.randn(bad, 5, 12) + away, torch.randn(good, 5, 12) + 0.3


def slow_silhouette(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """By the definition, point by point."""
    values = []
    for mine, theirs in ((one, other), (other, one)):
        for i, p in enumerate(mine):
            a = np.mean([np.linalg.norm(p - q) for j, q in enumerate(mine) if j != i])
            b = np.mean([np.linalg.norm(p - q) for q in theirs])
            values.append((b - a) / max(a, b))
    return float(np.mean(values))


def test_silhouette_is_the_definition() -> None:
    bad, good = states()
    for layer in (1, 4):
        one, other = bad[:, layer].double(), good[:, layer].double()
        assert silhouette(one, other) == pytest.approx(slow_silhouette(one.numpy(), other.numpy()))
    assert silhouette(torch.zeros(1, 3).double(), torch.ones(1, 3).double()) == 0.0


def test_figures_are_those_of_numpy() -> None:
    bad, good = states()
    found = geometry(bad, good)
    assert [one.layer for one in found.layers] == [0, 1, 2, 3]
    means = [(bad[:, s].double().numpy().mean(0), good[:, s].double().numpy().mean(0))
             for s in range(1, 5)]  # fmt: skip
    axes = [(b - g) / np.linalg.norm(b - g) for b, g in means]
    for layer, one in enumerate(found.layers):
        b, g = bad[:, layer + 1].double().numpy(), good[:, layer + 1].double().numpy()
        mean_bad, mean_good = means[layer]
        r = axes[layer]
        x, y = b @ r, g @ r
        following = axes[layer + 1] if layer < 3 else r
        expected = {
            "norm_harmful": np.linalg.norm(b, axis=1).mean(),
            "norm_harmless": np.linalg.norm(g, axis=1).mean(),
            "norm_difference": np.linalg.norm(mean_bad - mean_good),
            "cosine_means": mean_bad @ mean_good
            / np.linalg.norm(mean_bad) / np.linalg.norm(mean_good),
            "cosine_direction_harmless": r @ mean_good / np.linalg.norm(mean_good),
            "cosine_next": r @ following,
            "separation": (x.mean() - y.mean())
            / np.sqrt((x.var(ddof=1) + y.var(ddof=1)) / 2),
            "silhouette": slow_silhouette(b, g),
        }  # fmt: skip
        for name, value in expected.items():
            assert getattr(one, name) == pytest.approx(value, rel=1e-6, abs=1e-9), name
    assert found.layers[3].separation > found.layers[0].separation > 0


def test_projections_keep_what_separates() -> None:
    bad, good = states(bad=90)
    found = geometry(bad, good)
    assert len(found.points) == 4
    harmful, harmless = (np.array(side) for side in found.points[3])
    assert harmful.shape == (64, 2) and harmless.shape == (20, 2)  # at most 64 of a side
    apart = harmful[:, 0].mean() - harmless[:, 0].mean()
    shown = bad[:64, 4].double().numpy(), good[:, 4].double().numpy()
    r = (bad[:, 4].double().mean(0) - good[:, 4].double().mean(0)).numpy()
    r /= np.linalg.norm(r)
    assert apart == pytest.approx(shown[0].mean(0) @ r - shown[1].mean(0) @ r, rel=1e-3)
    # y is the principal component of the rest: its variance is the largest singular value's
    both = np.concatenate(shown)
    both -= both.mean(0)
    rest = both - np.outer(both @ r, r)
    largest = np.linalg.svd(rest, compute_uv=False)[0]
    y = np.concatenate([harmful[:, 1], harmless[:, 1]])
    assert np.linalg.norm(y) == pytest.approx(largest, rel=1e-3)
