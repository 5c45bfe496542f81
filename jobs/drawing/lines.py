"""The figures of the residuals' geometry over the layers, as lines."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from jobs.drawing.axes import Axis, LogAxis, decades, label, steps
from jobs.drawing.figure import Figure, Key, across, below, beside, frame, legend
from jobs.spec.protocol import LayerGeometry

WIDTH, LEFT, RIGHT = 360, 40, 348
SIGNS = (
    Markup('<circle class="sign" cx="{x:.1f}" cy="{y:.1f}" r="3.4"/>'),
    Markup('<rect class="sign" x="{a:.1f}" y="{b:.1f}" width="6" height="6"/>'),
    Markup('<path class="sign" d="M{x:.1f} {c:.1f}l4 7h-8Z"/>'),
)


@dataclass(frozen=True)
class Series:
    """A figure per layer, from layer 0 on; the last layers may be left out."""

    words: str
    values: tuple[float, ...]


def cosines(layers: Sequence[LayerGeometry]) -> Figure:
    """Cosines of the means and of the direction, −1 or 0 to 1."""
    series = [
        Series("harmful mean, harmless mean", tuple(one.cosine_means for one in layers)),
        Series("direction, harmless mean", tuple(o.cosine_direction_harmless for o in layers)),
        # there is none after the last layer
        Series("direction, the next layer's", tuple(one.cosine_next for one in layers[:-1])),
    ]
    least = min(value for each in series for value in each.values)
    ticks = [-1.0, -0.5, 0.0, 0.5, 1.0] if least < 0 else [0.0, 0.25, 0.5, 0.75, 1.0]
    text = "Between what two vectors, line by line: " + "; ".join(s.words for s in series) + "."
    return _figure("Cosines over the layers", text, _panel("cosine between", series, ticks))


def norms(layers: Sequence[LayerGeometry]) -> Figure:
    """Lengths of the states and of the difference of their means, on a logarithmic scale."""
    series = [
        Series("harmful states", tuple(one.norm_harmful for one in layers)),
        Series("harmless states", tuple(one.norm_harmless for one in layers)),
        Series("difference of the means", tuple(one.norm_difference for one in layers)),
    ]
    ticks = decades([value for each in series for value in each.values])
    return _figure(
        "Norms over the layers",
        "Mean length of the states of each side, and length of the difference of their means.",
        _panel("norm (log scale) of", series, ticks, log=True),
    )


def separations(layers: Sequence[LayerGeometry]) -> Figure:
    """d′ above, the silhouette coefficient below: two scales over the same layers."""
    apart = Series("separation d′", tuple(one.separation for one in layers))
    grouped = Series("silhouette coefficient", tuple(one.silhouette for one in layers))
    above, top = _panel(
        "separation d′", [apart], _from_zero(apart.values, 4), base=108, keys=False, layers=False
    )
    under, height = _panel(
        "silhouette", [grouped], _from_zero(grouped.values, 4), start=1,
        top=top + 38, base=top + 122, keys=False,
    )  # fmt: skip
    return _figure(
        "Separation over the layers",
        "Above: d′, how far the sides lie apart in standard deviations. Below: silhouette.",
        (above + under, height),
    )


def over_layers(layers: Sequence[LayerGeometry]) -> Figure:
    """All of them in a row."""
    return beside(
        [cosines(layers), norms(layers), separations(layers)],
        kind="lines",
        title="Geometry of the residuals over the layers",
        text="Cosines; norms; separation d′ and silhouette of harmful and harmless prompts.",
    )


def _figure(title: str, text: str, drawn: tuple[Markup, int]) -> Figure:
    body, height = drawn
    return Figure("lines", WIDTH, height, title, text, body)


def _from_zero(values: Sequence[float], most: int) -> list[float]:
    return steps(min(0.0, *values), max(0.0, *values), most)


def _panel(
    name: str,
    series: Sequence[Series],
    ticks: Sequence[float],
    *,
    log: bool = False,
    start: int = 0,
    top: int = 24,
    base: int = 166,
    keys: bool = True,
    layers: bool = True,
) -> tuple[Markup, int]:
    """Lines between the heights `base` and `top`, and how far down it all reaches.

    start   the first series' place among colours and signs
    keys    whether samples of the lines stand below
    layers  whether the layers' numbers do
    """
    count = max(len(each.values) for each in series)
    x = Axis(0, max(count - 1, 1), LEFT + 8, RIGHT - 8)
    y = (LogAxis if log else Axis)(ticks[0], ticks[-1], base, top)
    parts = [across(y.at(tick), LEFT, RIGHT, label(tick)) for tick in ticks]
    if layers:
        step = max(1, math.ceil(count / 8))
        parts += [below(x.at(layer), base, layer) for layer in range(0, count, step)]
    parts.append(frame(LEFT, RIGHT, top, base, "layer →" if layers else "", name))
    for place, each in enumerate(series, start):
        parts.append(_line(place, each, x.at, y.at))
    if not keys:
        return Markup("").join(parts), base + (40 if layers else 0)
    samples = [Key(_sample(place), each.words) for place, each in enumerate(series, start)]
    known, height = legend(samples, 4, base + 54, WIDTH)
    return Markup("").join([*parts, known]), base + 46 + height


def _line(
    place: int, series: Series, x: Callable[[float], float], y: Callable[[float], float]
) -> Markup:
    """A line through all layers; a sign on sixteen of them at most."""
    points = [(x(layer), y(value)) for layer, value in enumerate(series.values)]
    if not points:
        return Markup("")
    step = max(1, math.ceil(len(points) / 16))
    return Markup('<g class="series s{}"><title>{}</title>{}{}</g>').format(
        place,
        series.words,
        Markup('<path class="curve" d="M{}"/>').format(
            "L".join(f"{px:.1f} {py:.1f}" for px, py in points)
        ),
        Markup("").join(_sign(place, px, py) for px, py in points[::step]),
    )


def _sign(place: int, x: float, y: float) -> Markup:
    return SIGNS[place].format(x=x, y=y, a=x - 3, b=y - 3, c=y - 4)


def _sample(place: int) -> Markup:
    return Markup('<g class="series s{}"><path class="curve" d="M0 0H22"/>{}</g>').format(
        place, _sign(place, 11, 0)
    )
