"""The plots are right: places follow values, links lead to the trials, hostile text stays text."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from web import plots

SVG = "{http://www.w3.org/2000/svg}"


def tree(markup: str) -> ET.Element:
    """Parsed as XML: what is not well-formed fails here."""
    return ET.fromstring(
        str(markup).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    )


def mark(number: int, kl: float, refusals: int, **more: object) -> plots.Mark:
    values = {
        "number": number,
        "refusals": refusals,
        "total": 100,
        "kl": kl,
        "href": f"/jobs/x/trials/{number}",
        "title": f"Trial {number}",
    }
    return plots.Mark(**{**values, **more})  # type: ignore[arg-type]


def dots(root: ET.Element) -> dict[int, tuple[float, float]]:
    found = {}
    for link in root.iter(f"{SVG}a"):
        if "data-number" in link.attrib:
            dot = next(c for c in link.iter(f"{SVG}circle") if c.get("class") == "dot")
            found[int(link.attrib["data-number"])] = (
                float(dot.attrib["cx"]),
                float(dot.attrib["cy"]),
            )
    return found


points = st.lists(
    st.tuples(st.floats(1e-7, 50), st.integers(0, 100)), min_size=2, max_size=25, unique=True
)


@given(points)
def test_places_follow_values(pairs: list[tuple[float, int]]) -> None:
    root = tree(plots.pareto([mark(n, kl, r) for n, (kl, r) in enumerate(pairs)], None))
    places = dots(root)
    assert set(places) == set(range(len(pairs)))
    width, height = (float(root.attrib[side]) for side in ("width", "height"))
    for a, (kl_a, refusals_a) in enumerate(pairs):
        assert 0 <= places[a][0] <= width and 0 <= places[a][1] <= height
        for b, (kl_b, refusals_b) in enumerate(pairs):
            if kl_a <= kl_b:  # more KL is further right (equal after rounding)
                assert places[a][0] <= places[b][0] + 0.05
            if refusals_a < refusals_b:  # more refusals are higher up
                assert places[a][1] > places[b][1]


def test_x_is_logarithmic_and_y_is_linear() -> None:
    places = dots(tree(plots.pareto([mark(n, 10.0 ** (n - 3), 25 * n) for n in range(4)], None)))
    steps = [places[n + 1][0] - places[n][0] for n in range(3)]
    rises = [places[n][1] - places[n + 1][1] for n in range(3)]
    assert steps == pytest.approx([steps[0]] * 3, abs=0.2) and steps[0] > 50
    assert rises == pytest.approx([rises[0]] * 3, abs=0.2) and rises[0] > 50


def test_ticks_stand_where_their_values_are() -> None:
    root = tree(plots.pareto([mark(0, 0.01, 40), mark(1, 1.0, 100)], None))
    places = dots(root)
    at = {t.text: t for t in root.iter(f"{SVG}text") if t.get("class") == "tick"}
    assert float(at["0.01"].attrib["x"]) == pytest.approx(places[0][0], abs=0.1)
    assert float(at["1"].attrib["x"]) == pytest.approx(places[1][0], abs=0.1)
    assert float(at["40"].attrib["y"]) - 4 == pytest.approx(places[0][1], abs=0.1)


def test_every_trial_is_a_link_and_the_front_comes_last() -> None:
    marks = [
        mark(0, 0.1, 5, front=True),
        mark(1, 0.2, 50),
        mark(2, 0.3, 1, front=True, picked=True),
    ]
    links = list(tree(plots.pareto(marks, None)).iter(f"{SVG}a"))
    assert {link.attrib["href"] for link in links} == {mark.href for mark in marks}
    assert [link.attrib["data-number"] for link in links] == ["1", "0", "2"]
    assert [link.get("tabindex") for link in links] == ["-1", None, None]
    assert [link.attrib["class"] for link in links] == [
        "point tried",
        "point front",
        "point picked",
    ]
    for link in links:
        title = link.find(f"{SVG}title")
        assert title is not None and title.text == link.attrib["aria-label"]


def test_front_line_is_a_staircase_through_the_front() -> None:
    marks = [
        mark(n, kl, r, front=True) for n, (kl, r) in enumerate([(0.1, 1), (0.001, 80), (0.01, 9)])
    ]
    root = tree(plots.pareto([*marks, mark(9, 0.05, 90)], None))
    places = dots(root)
    line = next(p for p in root.iter(f"{SVG}path") if p.get("class") == "front-line")
    numbers = [float(n) for n in re.findall(r"-?\d+\.?\d*", line.attrib["d"])]
    (x1, y1), (x2, y2), (x3, y3) = places[1], places[2], places[0]
    assert numbers[:6] == pytest.approx([x1, y1, x2, y2, x3, y3], abs=0.11)
    assert numbers[6] >= x3


def test_held_out_marks_use_their_own_total_and_interval() -> None:
    held = plots.HeldOut(refusals=20, total=40, kl=0.1, low=0.35, high=0.65, title="held")
    root = tree(plots.pareto([mark(0, 0.1, 50, front=True, heldout=held)], None))
    place = dots(root)[0]
    link = next(a for a in root.iter(f"{SVG}a") if a.get("data-heldout") == "0")
    diamond = next(iter(link.iter(f"{SVG}path"))).attrib["d"]
    x, top = (float(n) for n in re.findall(r"[\d.]+", diamond)[:2])
    assert (x, top + 5.5) == pytest.approx(place, abs=0.11)  # 20/40 is as high as 50/100
    whisker = next(iter(link.iter(f"{SVG}line"))).attrib
    assert float(whisker["y2"]) < place[1] < float(whisker["y1"])
    off = tree(plots.pareto([mark(0, 0.1, 50, heldout=held)], None))
    assert not [a for a in off.iter(f"{SVG}a") if a.get("data-heldout")]


def test_baseline_is_drawn_at_its_height() -> None:
    root = tree(plots.pareto([mark(0, 0.1, 60)], plots.Baseline(60, 100)))
    line = next(p for p in root.iter(f"{SVG}line") if p.get("class") == "baseline")
    assert float(line.attrib["y1"]) == pytest.approx(dots(root)[0][1], abs=0.1)
    assert "original refuses 60 of 100" in "".join(root.itertext())


@pytest.mark.parametrize("kl", [0.0, -1e-9, 1e-300, 1e300])
def test_degenerate_divergences_stay_inside(kl: float) -> None:
    root = tree(plots.pareto([mark(0, kl, 0), mark(1, 0.5, 100)], None, width=356, height=330))
    assert all(0 <= x <= 356 and 0 <= y <= 330 for x, y in dots(root).values())


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</title></svg><script>alert(1)</script>",
    "' onload='alert(1)",
    "&lt;b&gt; & {{ 7*7 }} {0} {href}",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text(text: str) -> None:
    held = plots.HeldOut(1, 10, 0.1, 0.0, 0.4, text)
    marks = [mark(0, 0.1, 5, front=True, title=text, href="/jobs/" + text, heldout=held)]
    root = tree(plots.pareto(marks, None, label=text))
    assert {e.tag.removeprefix(SVG) for e in root.iter()} <= {
        "svg", "a", "title", "circle", "line", "path", "text"
    }  # fmt: skip
    assert not [k for e in root.iter() for k in e.attrib if k.startswith("on") or k == "style"]
    link = next(a for a in root.iter(f"{SVG}a") if a.get("data-number") == "0")
    title = link.find(f"{SVG}title")
    assert title is not None and title.text == text and link.attrib["href"] == "/jobs/" + text


@given(st.integers(0, 100_000))
def test_count_ticks(total: int) -> None:
    ticks = plots.count_ticks(total)
    assert ticks[0] == 0 and ticks[-1] == total
    assert ticks == sorted(set(ticks)) and len(ticks) <= 7


@given(st.lists(st.floats(1e-9, 1e3), min_size=1))
def test_decades_hold_the_values(values: list[float]) -> None:
    low, high = plots.decades(values)
    assert high - low >= 2
    assert max(values) <= 10.0**high * (1 + 1e-9)
    if math.log10(max(values) / min(values)) < 7:
        assert min(values) >= 10.0**low * (1 - 1e-9)


def test_rate_bar() -> None:
    root = tree(plots.rate(0.25, 0.1, 0.5, width=102))
    fill = next(r for r in root.iter(f"{SVG}rect") if r.get("class") == "fill")
    assert float(fill.attrib["width"]) == pytest.approx(26, abs=0.1)
