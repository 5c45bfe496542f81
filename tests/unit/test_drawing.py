"""Figures as files: marks land where the numbers say, and what is written is SVG."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jobs.drawing import axes, figure, kernel, lines, points
from jobs.drawing.figure import Figure
from jobs.spec.candidate import Ablation, Kernel, constant
from jobs.spec.protocol import LayerGeometry

SVG = "{http://www.w3.org/2000/svg}"
NUMBER = re.compile(r"-?\d+\.?\d*")
STYLE_SHEET = Path(__file__).parents[2] / "web" / "static" / "style.css"


def tree(made: Figure) -> ET.Element:
    """Parsed as XML: what is not well-formed fails here."""
    return ET.fromstring(made.document())


def layer(number: int, **figures: float) -> LayerGeometry:
    values = dict.fromkeys(LayerGeometry.model_fields, 0.5) | figures
    return LayerGeometry.model_validate({**values, "layer": number})


def path_of(element: ET.Element) -> list[tuple[float, float]]:
    """The points of a path of absolute M and L commands."""
    found = [float(n) for n in NUMBER.findall(element.attrib["d"])]
    return list(zip(found[::2], found[1::2], strict=True))


def curves(made: Figure) -> dict[str, list[tuple[float, float]]]:
    """The lines of a figure by what they are titled; keys of the legend have no title."""
    found = {}
    for group in tree(made).iter(f"{SVG}g"):
        title = group.find(f"{SVG}title")
        if title is not None and group.get("class", "").startswith("series"):
            curve = next(p for p in group.iter(f"{SVG}path") if p.get("class") == "curve")
            found[str(title.text)] = path_of(curve)
    return found


def heights(made: Figure) -> dict[str, float]:
    """Ticks of the vertical axis: text to pixel. Ticks under the figure are centred."""
    return {
        str(t.text): float(t.attrib["y"]) - 4
        for t in tree(made).iter(f"{SVG}text")
        if t.get("class") == "tick" and t.get("text-anchor") == "end"
    }


# --- axes -----------------------------------------------------------------------------------


@example(5e-324, 0.0)
@given(st.floats(-1e3, 1e3), st.floats(1e-3, 1e6) | st.just(0.0))
def test_steps_hold_the_range_at_equal_distances(low: float, width: float) -> None:
    ticks = axes.steps(low, low + width)
    assert 2 <= len(ticks) <= 7
    gaps = [b - a for a, b in pairwise(ticks)]
    assert ticks[0] <= low + 1e-6 * gaps[0] and ticks[-1] >= low + width - 1e-6 * gaps[0]
    assert gaps == pytest.approx([gaps[0]] * len(gaps), rel=1e-6) and gaps[0] > 0


def test_steps_are_round() -> None:
    assert axes.steps(0, 0.93) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert axes.steps(-0.02, 0.31) == [-0.1, 0.0, 0.1, 0.2, 0.3, 0.4]
    assert axes.steps(0, 37) == [0, 10, 20, 30, 40]


@given(st.lists(st.floats(1e-5, 1e6), min_size=1))
def test_decades_hold_the_values(values: list[float]) -> None:
    ticks = axes.decades(values)
    assert ticks == sorted(set(ticks)) and 2 <= len(ticks) <= 12
    assert ticks[-1] >= max(values) * (1 - 1e-9)
    assert ticks[0] <= min(values) * (1 + 1e-9) or min(values) < 1e-8 * max(values)


def test_decades_are_ones_twos_and_fives_where_few() -> None:
    assert axes.decades([3, 40]) == [2, 5, 10, 20, 50]
    assert axes.decades([0.3, 9000]) == [0.1, 1, 10, 100, 1000, 10000]
    assert axes.decades([0.0, 7.0]) == [5, 10]
    assert axes.decades([]) == [1, 2]


def test_a_logarithmic_axis_has_equal_ratios_at_equal_distances() -> None:
    axis = axes.LogAxis(0.1, 1000, 200, 0)
    assert [axis.at(v) for v in (0.1, 1, 10, 100, 1000)] == pytest.approx([200, 150, 100, 50, 0])
    assert (axis.at(0), axis.at(-1), axis.at(1e9)) == (200, 200, 0)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.25, "0.25"), (-0.5, "−0.5"), (20000, "2×10⁴"), (1e-5, "10⁻⁵"), (1000, "1000")],
)
def test_labels(value: float, text: str) -> None:
    assert axes.label(value) == text


# --- lines over the layers ------------------------------------------------------------------


def test_cosines_stand_at_their_ticks() -> None:
    values = [-1.0, -0.5, 0.0, 1.0]
    made = lines.cosines([layer(n, cosine_means=v) for n, v in enumerate(values)])
    found, ticks = curves(made), heights(made)
    means = found["harmful mean, harmless mean"]
    assert [y for _, y in means] == pytest.approx(
        [ticks["−1"], ticks["−0.5"], ticks["0"], ticks["1"]], abs=0.1
    )
    at = {
        str(t.text): float(t.attrib["x"])
        for t in tree(made).iter(f"{SVG}text")
        if t.get("class") == "tick" and t.get("text-anchor") == "middle"
    }
    assert [x for x, _ in means] == pytest.approx([at[str(n)] for n in range(4)], abs=0.1)
    # the last layer has no next one
    assert len(found["direction, the next layer's"]) == 3


def test_norms_are_logarithmic() -> None:
    made = lines.norms(
        [layer(n, norm_harmful=v, norm_difference=0.0) for n, v in enumerate([1.0, 10.0, 100.0])]
    )
    found, ticks = curves(made), heights(made)
    a, b, c = (y for _, y in found["harmful states"])
    assert a - b == pytest.approx(b - c, abs=0.2)
    assert (b, c) == pytest.approx((ticks["10"], ticks["100"]), abs=0.1)
    # nothing has no logarithm: it lies on the axis
    assert {y for _, y in found["difference of the means"]} == {max(ticks.values())}


def test_separation_and_silhouette_have_scales_of_their_own() -> None:
    made = lines.separations(
        [layer(n, separation=4.0 * n, silhouette=0.1 * n - 0.1) for n in range(3)]
    )
    found = curves(made)
    above = [y for _, y in found["separation d′"]]
    under = [y for _, y in found["silhouette coefficient"]]
    for drawn in (above, under):  # linear
        assert drawn[0] - drawn[1] == pytest.approx(drawn[1] - drawn[2], abs=0.2)
        assert drawn[0] - drawn[2] > 20
    assert max(above) < min(under)


@pytest.mark.parametrize("count", [1, 2, 126])
def test_any_number_of_layers(count: int) -> None:
    layers = [layer(n, norm_harmful=float(n), separation=0.0) for n in range(count)]
    whole = lines.over_layers(layers)
    root = tree(whole)
    assert "nan" not in whole.document().lower()
    assert len(curves(lines.norms(layers))["harmful states"]) == count
    signs = [e for e in root.iter() if e.get("class") == "sign"]
    assert len(signs) <= 8 * 16 + 6  # sixteen a line, and those of the legends


# --- points of one layer --------------------------------------------------------------------


def drawn(made: Figure, side: str, count: int) -> list[tuple[float, float]]:
    """Where each point of a side begins, in the first path of that side that has so many."""
    for path in tree(made).iter(f"{SVG}path"):
        begins = re.findall(r"M(-?[\d.]+) (-?[\d.]+)", path.get("d", ""))
        if path.get("class") == side and len(begins) == count:
            return [(float(x), float(y)) for x, y in begins]
    raise AssertionError(f"no {count} {side} points")


HARMFUL = [(3.0, 1.0), (4.0, -2.0), (2.5, 0.0)]
HARMLESS = [(-3.0, 0.5), (-4.0, 1.5)]


@pytest.mark.parametrize("make", [points.small, points.projection])
def test_points_land_where_the_numbers_say(make: Callable[..., Figure]) -> None:
    made = make(7, HARMFUL, HARMLESS)
    assert "layer 7" in "".join(tree(made).itertext()).lower()
    values = HARMFUL + HARMLESS
    places = drawn(made, "harmful", 3) + drawn(made, "harmless", 2)
    (x0, y0), (x1, y1) = places[0], places[3]
    across = (x0 - x1) / (3.0 - -3.0)
    up = (y1 - y0) / (1.0 - 0.5)
    # one unit is as long across as up, and right and up are positive
    assert across > 0 and up == pytest.approx(across, rel=0.02)
    for (a, b), (x, y) in zip(values, places, strict=True):
        assert x == pytest.approx(x0 + across * (a - 3.0), abs=0.2)
        assert y == pytest.approx(y0 - across * (b - 1.0), abs=0.2)
        assert 0 <= x <= made.width and 0 <= y <= made.height


def test_ticks_of_a_projection_are_its_numbers() -> None:
    made = points.projection(0, [(2.0, 2.0)], [(-4.0, 0.0)])
    # the key of the legend comes last
    x, y = drawn(made, "harmful", 1)[0]
    assert y == pytest.approx(heights(made)["2"], abs=0.1)
    at = {
        str(t.text): float(t.attrib["x"])
        for t in tree(made).iter(f"{SVG}text")
        if t.get("class") == "tick" and t.get("text-anchor") == "middle"
    }
    assert x == pytest.approx(at["2"], abs=0.1)


def test_a_small_one_names_its_range() -> None:
    made = points.small(3, [(0.0, 10.0)], [(-50.0, 0.0)])
    assert "±53" in "".join(tree(made).itertext())
    (low,) = drawn(made, "harmless", 1)
    assert low[0] == pytest.approx(75 - 75 * 50 / 53, abs=0.1)  # 150 pixels for −53..53


def test_sides_differ_in_shape() -> None:
    paths = {p.get("class"): p.attrib["d"] for p in tree(points.small(0, HARMFUL, HARMLESS))
             .iter(f"{SVG}path")}  # fmt: skip
    assert "l" in paths["harmful"] and "l" not in paths["harmless"]


def test_points_that_are_all_one() -> None:
    for make in (points.small, points.projection):
        made = make(0, [(0.0, 0.0)] * 2, [])
        assert "nan" not in made.document().lower() and len(drawn(made, "harmful", 2)) == 2


# --- the kernel -----------------------------------------------------------------------------


def test_kernel_shows_the_weight_of_every_layer() -> None:
    candidate = Ablation(
        scope="global",
        index=3.5,
        attention=Kernel(max_weight=1.5, min_weight=0.5, position=5, distance=2.5),
        mlp=constant(1.0),
    )
    made = kernel.plot(candidate, 8, " of trial 3")
    root, ticks = tree(made), heights(made)
    found: dict[str, list[float]] = {"attention": [], "mlp": []}
    for knot in root.iter(f"{SVG}g"):
        if "data-layer" in knot.attrib:
            shape = next(e for e in knot if e.tag != f"{SVG}title")
            height = float(shape.get("cy") or float(shape.attrib["y"]) + 3)
            found[knot.attrib["class"].split()[1]].append(height)
    for column, name in ((1, "attention"), (2, "mlp")):
        weights = [row[column] for row in kernel.weights(candidate, 8)]
        unit = ticks["0"] - ticks["1"]
        assert [(ticks["0"] - y) / unit for y in found[name]] == pytest.approx(weights, abs=0.01)
    assert kernel.weights(candidate, 8)[5] == (5, 1.5, 1.0)
    title = root.find(f"{SVG}title")
    assert title is not None and title.text == "Edit strength λ over the layers of trial 3"
    assert "where the direction was taken" in "".join(root.itertext())


def test_kernel_of_one_layer_and_of_many() -> None:
    plain = Ablation(attention=constant(), mlp=constant(0.0))
    for layers in (1, 2, 126):
        root = tree(kernel.plot(plain, layers))
        assert len([g for g in root.iter(f"{SVG}g") if "data-layer" in g.attrib]) == 2 * layers
        assert "where the direction" not in "".join(root.itertext())


# --- files ----------------------------------------------------------------------------------

FIGURES: list[Figure] = [
    kernel.plot(Ablation(attention=constant(), mlp=constant()), 4),
    lines.over_layers([layer(0), layer(1)]),
    points.projection(0, HARMFUL, HARMLESS),
]


@pytest.mark.parametrize("made", FIGURES, ids=lambda made: made.kind)
def test_a_document_stands_alone(made: Figure) -> None:
    root = tree(made)
    named = [root.find(f"{SVG}{tag}") for tag in ("title", "desc")]
    assert [e.get("id") for e in named if e is not None] == root.attrib["aria-labelledby"].split()
    assert all(e is not None and e.text for e in named)
    x, y, width, height = (float(n) for n in root.attrib["viewBox"].split())
    assert (width, height) == (float(root.attrib["width"]), float(root.attrib["height"]))
    for text in root.iter(f"{SVG}text"):
        inside = text.get("class") is None or y <= float(text.attrib["y"]) <= y + height
        assert inside, text.text
    style = root.find(f"{SVG}style")
    assert style is not None and style.text == figure.STYLE  # what POLICY's digest is of
    assert not re.search(r"https?:(?!//www\.w3\.org)|url\(|@import", made.document())
    assert x < 0 and not math.isnan(width)


@pytest.mark.parametrize("made", FIGURES, ids=lambda made: made.kind)
def test_every_mark_has_a_rule(made: Figure) -> None:
    classes = {name for e in tree(made).iter() for name in e.get("class", "").split()}
    plain = {"plot", "tick", "axis-label", "series", "knot", "kernel", "lines", "points"}
    for name in classes - plain:
        assert re.search(rf"\.{name}\b", figure.STYLE), name


def test_files_look_as_on_the_pages() -> None:
    """Rules of files are rules of the pages, and colours theirs, light and dark."""
    pages = STYLE_SHEET.read_text()
    shared = figure.STYLE.partition("pages' style sheet */")[2]
    rules = re.findall(r"[^{}]+\{[^{}]*\}", shared)
    assert len(rules) > 15
    for rule in rules:
        assert rule.strip() in pages, rule
    variables = re.compile(r"(--[\w-]+): ([^;]+);")
    for mine, theirs in zip(
        figure.STYLE.partition("/*")[0].split("@media"), pages.split("@media")[:2], strict=True
    ):
        found = dict(variables.findall(mine))
        known = dict(variables.findall(theirs))
        assert found and found == {name: known.get(name) for name in found}
