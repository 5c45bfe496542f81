"""Harmful and harmless prompts of one layer as points in the plane.

Both axes of a figure have the same unit, so that distances can be compared across; figures of two
layers have units of their own, because residuals grow with the layers. Each says its range.
"""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from jobs.drawing.axes import Axis, label, steps
from jobs.drawing.figure import Figure, Key, across, below, frame, legend

Points = Sequence[tuple[float, float]]
TEXT = (
    "One point per prompt. Across: along the difference of the means. Up: along the first "
    "principal component of the rest. Harmful: crosses. Harmless: dots."
)


def projection(layer: int, harmful: Points, harmless: Points) -> Figure:
    """One layer, with numbers on both axes."""
    left, right, top, base = 52, 412, 24, 384
    reach = _reach(harmful, harmless)
    ticks = steps(-reach, reach, 10)
    x, y = Axis(-reach, reach, left, right), Axis(-reach, reach, base, top)
    inside = [tick for tick in ticks if abs(tick) <= reach]
    parts = [across(y.at(tick), left, right, label(tick)) for tick in inside]
    for tick in inside:
        line = Markup('<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{}" y2="{}"/>')
        parts += [line.format(top, base, x=x.at(tick)), below(x.at(tick), base, label(tick))]
    parts.append(
        frame(
            left,
            right,
            top,
            base,
            "along the difference of the means →",
            "along the first principal component of the rest ↑",
        )
    )
    parts += [_dots(harmless, x, y), _crosses(harmful, x, y, 3.2)]
    keys = [Key(_crosses([(0, 0)], UNIT, FLAT, 3.2), "harmful"),
            Key(_dots([(0, 0)], UNIT, FLAT), "harmless")]  # fmt: skip
    known, height = legend(keys, left, base + 54, right - left)
    return Figure(
        "points", right + 8, base + 46 + height, f"Residuals after layer {layer}", TEXT,
        Markup("").join([*parts, known]),
    )  # fmt: skip


def small(layer: int, harmful: Points, harmless: Points) -> Figure:
    """One of many: the layer and the range of both axes, ±, stand above."""
    size, top = 150, 20
    reach = _reach(harmful, harmless)
    x, y = Axis(-reach, reach, 0, size), Axis(-reach, reach, top + size, top)
    body = Markup(
        '<text class="strong" x="0" y="13">layer {}</text>'
        '<text x="{s}" y="13" text-anchor="end">±{}</text>'
        '<path class="grid" d="M0 {m}H{s}M{h} {t}V{b}"/>{}{}'
        '<rect class="axis" x="0" y="{t}" width="{s}" height="{s}"/>'
    ).format(
        layer, f"{reach:.3g}", _dots(harmless, x, y), _crosses(harmful, x, y, 2.4),
        s=size, t=top, b=top + size, m=top + size // 2, h=size // 2,
    )  # fmt: skip
    return Figure("points", size, top + size, f"Residuals after layer {layer}", TEXT, body)


UNIT, FLAT = Axis(-1, 1, 0, 22), Axis(-1, 1, -1, 1)  # the middle of a key's sample


def _reach(harmful: Points, harmless: Points) -> float:
    """Half the range of both axes: the farthest coordinate and a little more."""
    return 1.06 * max((abs(v) for point in (*harmful, *harmless) for v in point), default=0) or 1.0


def _dots(points: Points, x: Axis, y: Axis) -> Markup:
    """A line of no length each: its round ends are the dot. A sixth of so many circles' text."""
    drawn = "".join(f"M{x.at(a):.1f} {y.at(b):.1f}h0" for a, b in points)
    return Markup('<path class="harmless" d="{}"/>').format(drawn)


def _crosses(points: Points, x: Axis, y: Axis, r: float) -> Markup:
    arms = f"m-{r} -{r}l{2 * r:g} {2 * r:g}m0 -{2 * r:g}l-{2 * r:g} {2 * r:g}"
    drawn = "".join(f"M{x.at(a):.1f} {y.at(b):.1f}{arms}" for a, b in points)
    return Markup('<path class="harmful" d="{}"/>').format(drawn)
