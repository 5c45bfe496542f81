"""The strength of an ablation over the layers."""

from __future__ import annotations

import math

from markupsafe import Markup

from jobs.drawing.axes import Axis, label
from jobs.drawing.figure import Figure, Key, across, below, frame, legend
from jobs.spec.candidate import Ablation

SIGNS = {
    "attention": Markup('<circle cx="{x:.1f}" cy="{y:.1f}" r="3.4"/>'),
    "mlp": Markup('<rect x="{a:.1f}" y="{b:.1f}" width="6" height="6"/>'),
}
WORDS = {"attention": "attention", "mlp": "MLP"}


def weights(candidate: Ablation, layers: int) -> list[tuple[int, float, float]]:
    """λ of every layer: (layer from 0, attention, MLP)."""
    return [
        (layer, candidate.attention.weight(layer), candidate.mlp.weight(layer))
        for layer in range(layers)
    ]


def plot(candidate: Ablation, layers: int, of: str = "") -> Figure:
    """λ over the layers: attention as circles on a solid line, MLP as squares on a dashed one.

    A dotted line stands where a direction for all layers was taken. `of` ends the title: " of …".
    """
    width, left, right, top, base = 360, 34, 348, 24, 166
    rows = weights(candidate, layers)
    peak = max([1.0, *(max(a, m) for _, a, m in rows)])
    x = Axis(0, max(layers - 1, 1), left + 8, right - 8)
    y = Axis(0, math.ceil(peak * 4) / 4, base, top)
    parts = [
        across(y.at(value), left, right, label(value))
        for value in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
        if value <= y.high
    ]
    step = max(1, math.ceil(layers / 8))
    parts += [below(x.at(layer), base, layer) for layer in range(0, layers, step)]
    keys = [Key(_sample(each), WORDS[each]) for each in WORDS]
    if candidate.scope == "global" and candidate.index is not None:
        line = Markup('<path class="direction" d="M{:.1f} {}V{}"/>')
        parts.append(line.format(x.at(candidate.index), top, base))
        keys.append(Key(line.format(11, -8, 8), "where the direction was taken"))
    for column, each in enumerate(WORDS, 1):
        places = [(x.at(row[0]), y.at(row[column])) for row in rows]
        path = "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in places)
        parts.append(Markup('<path class="curve {}" d="{}"/>').format(each, path))
        for (px, py), row in zip(places, rows, strict=True):
            parts.append(
                Markup('<g class="knot {}" data-layer="{}"><title>{}</title>{}</g>').format(
                    each, row[0], f"layer {row[0]}, {WORDS[each]}: λ {row[column]:.2f}",
                    _sign(each, px, py),
                )
            )  # fmt: skip
    parts.append(frame(left, right, top, base, "layer →", "strength λ"))
    known, height = legend(keys, left - 4, base + 54, width - left)
    return Figure(
        "kernel",
        width,
        base + 46 + height,
        f"Edit strength λ over the layers{of}",
        "Attention: circles on a solid line. MLP: squares on a dashed line.",
        Markup("").join([*parts, known]),
    )


def _sign(each: str, x: float, y: float) -> Markup:
    return SIGNS[each].format(x=x, y=y, a=x - 3, b=y - 3)


def _sample(each: str) -> Markup:
    return Markup('<path class="curve {0}" d="M0 0H22"/><g class="knot {0}">{1}</g>').format(
        each, _sign(each, 11, 0)
    )
