"""The geometry of a job's residuals as its page shows it."""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from jobs.drawing import lines, points
from jobs.drawing.figure import Figure
from jobs.spec.protocol import Geometry, LayerGeometry
from web.views import formats


@dataclass(frozen=True)
class Row:
    """One layer of the table. `next` is a dash after the last layer, which has none.

    separates, groups: whether no other layer has more separation, or a larger silhouette
    """

    layer: int
    harmful: str
    harmless: str
    difference: str
    means: str
    direction: str
    next: str
    separation: str
    silhouette: str
    separates: bool
    groups: bool


@dataclass(frozen=True)
class Plane:
    """One layer's projection, and the address of a large one."""

    href: str
    figure: Figure


def rows(found: Geometry) -> list[Row]:
    """The table."""
    widest = max(found.layers, key=lambda one: one.separation).layer
    tightest = max(found.layers, key=lambda one: one.silhouette).layer
    last = found.layers[-1].layer
    return [_row(one, one.layer == last, widest, tightest) for one in found.layers]


def _row(one: LayerGeometry, last: bool, widest: int, tightest: int) -> Row:
    return Row(
        layer=one.layer,
        harmful=norm(one.norm_harmful),
        harmless=norm(one.norm_harmless),
        difference=norm(one.norm_difference),
        means=cosine(one.cosine_means),
        direction=cosine(one.cosine_direction_harmless),
        next=formats.DASH if last else cosine(one.cosine_next),
        separation=norm(one.separation),
        silhouette=cosine(one.silhouette),
        separates=one.layer == widest,
        groups=one.layer == tightest,
    )


def cosine(value: float) -> str:
    """A number within −1..1: cosine(-0.1234) # '−0.123'."""
    return f"{value:.3f}".replace("-", "−")


def norm(value: float) -> str:
    """Three digits, whole from 1000 on: norm(12.04) # '12.0'."""
    if value >= 1000:
        return formats.number(round(value))
    return f"{value:#.3g}".rstrip(".").replace("-", "−")


def charts(found: Geometry) -> dict[str, Figure]:
    """The lines over the layers."""
    return {
        "cosines": lines.cosines(found.layers),
        "norms": lines.norms(found.layers),
        "separations": lines.separations(found.layers),
    }


def planes(job_id: uuid.UUID, found: Geometry) -> list[Plane]:
    """A small projection of every layer."""
    base = f"/api/v1/jobs/{job_id}/geometry"
    return [
        Plane(f"{base}/{one.layer}.svg", points.small(one.layer, *sides))
        for one, sides in zip(found.layers, found.points, strict=True)
    ]
