"""Plots of scores as SVG text. Pure: numbers in, escaped markup out; the style sheet colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from jobs.drawing.axes import Axis

# Corners of the marks of compared methods, in radii from the middle; () is a circle. No diamond:
# that is a held-out score.
SHAPES: tuple[tuple[tuple[float, float], ...], ...] = (
    (),
    ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    ((0, -1.2), (1.15, 0.85), (-1.15, 0.85)),
    ((0, 1.2), (1.15, -0.85), (-1.15, -0.85)),
    ((-0.4, -1.1), (0.4, -1.1), (0.4, -0.4), (1.1, -0.4), (1.1, 0.4), (0.4, 0.4), (0.4, 1.1),
     (-0.4, 1.1), (-0.4, 0.4), (-1.1, 0.4), (-1.1, -0.4), (-0.4, -0.4)),
    ((0, -1.15), (1.1, -0.35), (0.7, 0.95), (-0.7, 0.95), (-1.1, -0.35)),
    ((-0.6, -1.05), (0.6, -1.05), (1.2, 0), (0.6, 1.05), (-0.6, 1.05), (-1.2, 0)),
)  # fmt: skip
COLOURS = 5
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class HeldOut:
    """The same candidate on held-out prompts. `low` and `high` are its interval, shares 0..1."""

    refusals: int
    total: int
    kl: float | None
    low: float
    high: float
    title: str


@dataclass(frozen=True)
class Mark:
    """One trial in the plane: KL divergence in nats against refusals out of `total`.

    `series`: which of several compared methods it is of; None where there is one.
    """

    number: int
    refusals: int
    total: int
    kl: float
    href: str
    title: str
    front: bool = False
    picked: bool = False
    heldout: HeldOut | None = None
    series: int | None = None


@dataclass(frozen=True)
class Baseline:
    """What the original model refuses."""

    refusals: int
    total: int


def decades(values: Sequence[float]) -> tuple[int, int]:
    """The powers of ten that hold all positive `values`, two decades at least, nine at most."""
    positive = [value for value in values if value > 0 and math.isfinite(value)]
    if not positive:
        return -4, 0
    low = math.floor(math.log10(min(positive)))
    high = math.ceil(math.log10(max(positive)))
    if high - low < 2:
        high = low + 2
    return max(low, high - 9), high


def count_ticks(total: int) -> list[int]:
    """Round whole numbers from 0 to `total`, six at most; `total` is always the last one."""
    if total <= 0:
        return [0]
    step = 1
    for step in (m * 10**e for e in range(9) for m in (1, 2, 5)):
        if total / step <= 5:
            break
    ticks = list(range(0, total + 1, step))
    if ticks[-1] != total:
        # A label needs room: drop the last round one where it would touch the total.
        if total - ticks[-1] < step / 2:
            ticks.pop()
        ticks.append(total)
    return ticks


def power(exponent: int, plain: bool) -> str:
    """A tick label: power(-2, True) # '0.01', power(-5, False) # '10⁻⁵'."""
    if plain:
        return f"{10.0**exponent:g}"
    return "10" + str(exponent).translate(_SUPERSCRIPT)


def staircase(points: Sequence[tuple[float, float]], end: float) -> str:
    """Path of the best y reached up to each x: `points` in pixels, sorted by x, up to `end`."""
    if not points:
        return ""
    x, y = points[0]
    steps = [f"M{x:.1f} {y:.1f}"]
    for nx, ny in points[1:]:
        steps.append(f"H{nx:.1f}V{ny:.1f}")
    steps.append(f"H{end:.1f}")
    return "".join(steps)


def pareto(
    marks: Sequence[Mark],
    baseline: Baseline | None,
    *,
    width: int = 760,
    height: int = 400,
    label: str = "Refusals against KL divergence",
) -> Markup:
    """Refusals (up) against KL on a logarithmic scale (right), one link per trial.

    Lower left is better. Trials off the front are drawn first, so that nothing covers the front.
    A KL of 0 lies at the left edge. Only front points can be reached with the Tab key: the table
    beside the plot holds every trial.
    """
    left, right, top, bottom = 46, 14, 22, 46
    totals = [mark.total for mark in marks] + ([baseline.total] if baseline else [])
    total = max(totals, default=100)
    kls = [mark.kl for mark in marks]
    kls += [mark.heldout.kl for mark in marks if mark.heldout and mark.heldout.kl is not None]
    low, high = decades(kls)
    x = Axis(low, high, left + 8, width - right)
    y = Axis(0, max(total, 1), height - bottom - 8, top)

    def log(kl: float) -> float:
        return x.at(math.log10(kl)) if kl > 0 else x.at(low)

    def scaled(refusals: int, of: int) -> float:
        return y.at(refusals / of * total if of else 0)

    parts = [_grid(x, y, low, high, total, width, height, left, right, top, bottom)]
    if baseline is not None:
        by = scaled(baseline.refusals, baseline.total)
        parts.append(
            Markup(
                '<line class="baseline" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>'
                '<text class="baseline-label" x="{}" y="{:.1f}" text-anchor="end">'
                "original refuses {} of {}</text>"
            ).format(
                left, width - right, by, by, width - right, by + 15 if by < top + 12 else by - 6,
                baseline.refusals, baseline.total,
            )
        )  # fmt: skip
    front = sorted((mark for mark in marks if mark.front), key=lambda m: (m.kl, -m.refusals))
    places = [(log(mark.kl), scaled(mark.refusals, mark.total)) for mark in front]
    if places:
        parts.append(
            Markup('<path class="front-line" d="{}"/>').format(staircase(places, width - right))
        )
    for mark in front:
        if mark.heldout is not None:
            hx = log(mark.kl if mark.heldout.kl is None else mark.heldout.kl)
            parts.append(_heldout(mark, mark.heldout, hx, y, total))
    ordered = sorted(marks, key=lambda m: (m.picked, m.front, -m.number))
    parts += [_point(mark, log(mark.kl), scaled(mark.refusals, mark.total)) for mark in ordered]
    return Markup(
        '<svg class="plot" viewBox="0 0 {w} {h}" width="{w}" height="{h}" role="group" '
        'aria-label="{label}" preserveAspectRatio="xMidYMid meet">{body}</svg>'
    ).format(w=width, h=height, label=label, body=Markup("").join(parts))


def _grid(
    x: Axis, y: Axis, low: int, high: int, total: int,
    width: int, height: int, left: int, right: int, top: int, bottom: int,
) -> Markup:  # fmt: skip
    parts = []
    base = height - bottom
    plain = low >= -4 and high <= 4
    for exponent in range(low, high + 1):
        px = x.at(exponent)
        anchor = "end" if exponent == high else "middle"
        parts.append(
            Markup(
                '<line class="grid" x1="{:.1f}" x2="{:.1f}" y1="{}" y2="{}"/>'
                '<text class="tick" x="{:.1f}" y="{}" text-anchor="{}">{}</text>'
            ).format(px, px, top, base, px, base + 17, anchor, power(exponent, plain))
        )
        if exponent < high and high - low <= 6:
            for digit in range(2, 10):
                minor = x.at(exponent + math.log10(digit))
                parts.append(
                    Markup('<line class="minor" x1="{:.1f}" x2="{:.1f}" y1="{}" y2="{}"/>').format(
                        minor, minor, base - 4, base
                    )
                )
    for tick in count_ticks(total):
        py = y.at(tick)
        parts.append(
            Markup(
                '<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>'
                '<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>'
            ).format(left, width - right, py, py, left - 6, py + 4, tick)
        )
    parts.append(
        Markup(
            '<path class="axis" d="M{l} {t}V{b}H{r}"/>'
            '<text class="axis-label" x="{r}" y="{xl}" text-anchor="end">'
            "KL divergence, first token (nats, log scale) →</text>"
            '<text class="axis-label" x="4" y="12">refusals of {total}</text>'
        ).format(l=left, t=top, b=base, r=width - right, xl=height - 8, total=total)
    )
    return Markup("").join(parts)


def shape(series: int | None, x: float, y: float, r: float) -> Markup:
    """The mark of a method at (x, y): one of SHAPES, about as large as a circle of radius `r`.

    Its class `s0` to `s4` colours it. Seven shapes and five colours: no two of 35 are alike, and
    the shape alone tells the first seven apart.
    """
    if series is None:
        return Markup('<circle class="dot" cx="{:.1f}" cy="{:.1f}" r="{}"/>').format(x, y, r)
    colour = f"dot s{series % COLOURS}"
    corners = SHAPES[series % len(SHAPES)]
    if not corners:
        return Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="{}"/>').format(colour, x, y, r)
    places = "L".join(f"{x + r * dx:.1f} {y + r * dy:.1f}" for dx, dy in corners)
    return Markup('<path class="{}" d="M{}Z"/>').format(colour, places)


def _point(mark: Mark, px: float, py: float) -> Markup:
    kind = "picked" if mark.picked else "front" if mark.front else "tried"
    ring = (
        Markup('<circle class="ring" cx="{:.1f}" cy="{:.1f}" r="10"/>').format(px, py)
        if mark.picked
        else Markup("")
    )
    return Markup(
        '<a class="point {kind}" href="{href}"{tab} data-number="{number}" aria-label="{title}">'
        '<title>{title}</title><circle class="hit" cx="{x:.1f}" cy="{y:.1f}" r="{hit}"/>{ring}'
        "{dot}</a>"
    ).format(
        kind=kind,
        href=mark.href,
        tab=Markup("") if mark.front or mark.picked else Markup(' tabindex="-1"'),
        number=mark.number,
        title=mark.title,
        x=px,
        y=py,
        ring=ring,
        hit=12 if mark.front or mark.picked else 7,
        dot=shape(mark.series, px, py, 5.5 if mark.front or mark.picked else 3.5),
    )


def _heldout(mark: Mark, held: HeldOut, px: float, y: Axis, total: int) -> Markup:
    py = y.at(held.refusals / held.total * total if held.total else 0)
    d = 5.5
    return Markup(
        '<a class="heldout" href="{href}" tabindex="-1" data-heldout="{number}" '
        'aria-label="{title}"><title>{title}</title>'
        '<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'
        '<path class="diamond" d="M{x:.1f} {a:.1f}L{r:.1f} {y:.1f}L{x:.1f} {b:.1f}'
        'L{l:.1f} {y:.1f}Z"/></a>'
    ).format(
        href=mark.href, number=mark.number, title=held.title, x=px, y=py,
        low=y.at(held.low * total), high=y.at(held.high * total),
        a=py - d, b=py + d, l=px - d, r=px + d,
    )  # fmt: skip


def rate(share: float, low: float, high: float, *, width: int = 180, height: int = 14) -> Markup:
    """A share 0..1 as a bar, its interval as a whisker. The numbers stand beside it as text."""
    x = Axis(0, 1, 1, width - 1)
    middle = height / 2
    return Markup(
        '<svg class="rate" viewBox="0 0 {w} {h}" width="{w}" height="{h}" aria-hidden="true" '
        'preserveAspectRatio="none">'
        '<rect class="track" x="0" y="{t}" width="{w}" height="4"/>'
        '<rect class="fill" x="0" y="{t}" width="{f:.1f}" height="4"/>'
        '<path class="whisker" d="M{a:.1f} {m}H{b:.1f}M{a:.1f} {u}V{d}M{b:.1f} {u}V{d}"/></svg>'
    ).format(
        w=width, h=height, t=middle - 2, f=x.at(share), a=x.at(low), b=x.at(high),
        m=middle, u=middle - 4, d=middle + 4,
    )  # fmt: skip
