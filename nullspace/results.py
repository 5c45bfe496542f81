"""What a job without a search found, as the rows of one table."""

from __future__ import annotations

from collections.abc import Iterator

from nullspace.client import Json
from nullspace.terminal import number, ratio

FIGURES = ("figure", "original", "model")


def figure_rows(job: Json) -> Iterator[tuple[str, str, str]]:
    """Rows of the table with the columns FIGURES of a job without a search."""
    result = job.get("result") or {}
    sides = [result.get("original") or {}, result.get("model") or {}]
    for role in sides[1]:
        scores = [side.get(role) or {} for side in sides]
        yield (f"{role}, refused", ratio(scores[0]), ratio(scores[1]))
        if scores[0]:
            for kl in ("kl_first", "kl_multi"):
                if scores[1].get(kl) is not None:
                    yield (f"{role}, {kl}", number(scores[0].get(kl)), number(scores[1][kl]))
        values = [each.get("values") or {} for each in scores]
        for name in dict.fromkeys([*values[0], *values[1]]):
            yield (f"{role}, {name}", _value(values[0].get(name)), _value(values[1].get(name)))
    yield from benchmark_rows(result.get("benchmark") or {})


def benchmark_rows(sides: Json) -> Iterator[tuple[str, str, str]]:
    """Rows of harness figures by side."""
    before, after = sides.get("original") or {}, sides.get("model") or {}
    for name in sorted({*before, *after}):
        yield (name, _value(before.get(name)), _value(after.get(name)))


def _value(value: Json | None) -> str:
    """`0.51 ± 0.03 of 100`."""
    if not value:
        return "-"
    text = number(value["value"])
    if value.get("low") is not None and value.get("high") is not None:
        text += f" ± {(value['high'] - value['low']) / 2:.2g}"
    return text + (f" of {value['n']}" if value.get("n") is not None else "")
