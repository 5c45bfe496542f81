"""How harmful and harmless prompts lie in the residual stream, layer by layer.

Everything is computed in float64 from the states from which directions are measured too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.directions import unit
from engine.report import Report
from jobs.spec.protocol import Geometry, LayerGeometry

POINTS = 64  # per side in the projections
SAMPLES = 256  # per side in the silhouette, whose distances are quadratic in them


def geometry(harmful: Tensor, harmless: Tensor, report: Report | None = None) -> Geometry:
    """From last-token residuals (N, L+1, d) of both sides: figures and a projection per layer."""
    layers = harmful.shape[1] - 1
    directions = [
        unit((harmful[:, s].double().mean(0) - harmless[:, s].double().mean(0))[None])[0]
        for s in range(1, layers + 1)
    ]
    figures, points = [], []
    for layer, r in enumerate(directions):
        if report is not None:
            report.progress("geometry", layer, layers)
        bad, good = harmful[:, layer + 1].double(), harmless[:, layer + 1].double()
        following = directions[layer + 1] if layer + 1 < layers else r
        figures.append(_figures(layer, bad, good, r, following))
        points.append(projection(bad[:POINTS], good[:POINTS], r))
    return Geometry(layers=figures, points=points)


def _figures(layer: int, bad: Tensor, good: Tensor, r: Tensor, following: Tensor) -> LayerGeometry:
    mean_bad, mean_good = bad.mean(0), good.mean(0)
    along_bad, along_good = bad @ r, good @ r
    spread = ((along_bad.var() + along_good.var()) / 2).sqrt()
    return LayerGeometry(
        layer=layer,
        norm_harmful=float(bad.norm(dim=-1).mean()),
        norm_harmless=float(good.norm(dim=-1).mean()),
        norm_difference=float((mean_bad - mean_good).norm()),
        cosine_means=float(unit(mean_bad) @ unit(mean_good)),
        cosine_direction_harmless=float(r @ unit(mean_good)),
        cosine_next=float(r @ following),
        separation=float((along_bad.mean() - along_good.mean()) / spread.clamp_min(1e-30)),
        silhouette=silhouette(bad[:SAMPLES], good[:SAMPLES]),
    )


def silhouette(one: Tensor, other: Tensor) -> float:
    """Mean silhouette coefficient of two clusters, Euclidean: −1..1 (Rousseeuw 1987, section 2).

    one (N, d), other (M, d). Per point (b − a)/max(a, b), a the mean distance to the other points
    of its own cluster, b to those of the other cluster; 0 for a cluster of one.
    """
    values = []
    for mine, theirs in ((one, other), (other, one)):
        if len(mine) == 1:
            values.append(torch.zeros(1, dtype=torch.float64))
            continue
        within = torch.cdist(mine, mine, compute_mode="donot_use_mm_for_euclid_dist")
        a = within.sum(1) / (len(mine) - 1)
        b = torch.cdist(mine, theirs, compute_mode="donot_use_mm_for_euclid_dist").mean(1)
        values.append((b - a) / torch.maximum(a, b).clamp_min(1e-30))
    return float(torch.cat(values).mean())


def projection(bad: Tensor, good: Tensor, r: Tensor) -> list[list[tuple[float, float]]]:
    """2-D points [harmful, harmless] of states (N, d): x along r (d), y along the first principal
    component of what is left without r, both from the common mean."""
    both = torch.cat([bad, good])
    both = both - both.mean(0)
    x = both @ r
    rest = both - x[:, None] * r
    _, _, components = torch.linalg.svd(rest, full_matrices=False)
    first = components[0]
    first = first * (1 if first[first.abs().argmax()] > 0 else -1)  # the SVD leaves the sign open
    found = [(_rounded(a), _rounded(b)) for a, b in zip(x, both @ first, strict=True)]
    return [found[: len(bad)], found[len(bad) :]]


def _rounded(value: Tensor) -> float:
    """Four digits: enough for a plot, and shorter as JSON."""
    return float(f"{float(value):.4g}")
