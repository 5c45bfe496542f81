"""What the command line prints: results on stdout, everything for people's eyes on stderr.

What models say is hostile: it must not move the cursor, hide itself or colour the terminal.
"""

from __future__ import annotations

import datetime as dt
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

Json = dict[str, Any]
WIDE = 240  # where nobody looks: files and pipes get whole lines


def _console(stderr: bool) -> Console:
    made = Console(stderr=stderr, highlight=False, soft_wrap=True)
    if not made.is_terminal:
        made.width = WIDE
    return made


out = _console(stderr=False)
err = _console(stderr=True)
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def plain(text: object, limit: int | None = None) -> str:
    """`text` without control characters (shown as \\xNN), cut to `limit` characters."""
    clean = CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", str(text))
    return clean if limit is None or len(clean) <= limit else clean[: limit - 1] + "…"


def say(text: str = "", style: str = "") -> None:
    """A line for people, on stderr."""
    err.print(Text(text, style=style))


def show(text: str = "") -> None:
    """A line of the result, on stdout."""
    out.print(Text(text))


def dump(value: Any) -> None:
    """JSON on stdout, as it is: no wrapping, no colours."""
    out.file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    out.file.flush()


def table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, console: Console = out
) -> None:
    """A table of plain texts.

    A column whose name begins with '#' holds right-aligned numbers; one whose name ends with '?' is
    left out where all its cells are dashes.
    """
    grid = Table(box=None, pad_edge=False, header_style="bold")
    lines = [[plain(cell) for cell in row] for row in rows]
    kept = [
        place
        for place, name in enumerate(columns)
        if not name.endswith("?") or any(line[place] != "-" for line in lines)
    ]
    for place in kept:
        name = columns[place]
        justify: Literal["left", "right"] = "right" if name.startswith("#") else "left"
        grid.add_column(name.removeprefix("#").removesuffix("?"), justify=justify)
    for line in lines:
        grid.add_row(*(Text(line[place]) for place in kept))
    console.print(grid, soft_wrap=False)


def ratio(scores: Json | None) -> str:
    """`3/100 (1.0-8.5 %)`, or a dash."""
    if not scores:
        return "-"
    text = f"{scores['refusals']}/{scores['total']}"
    if interval := scores.get("interval"):
        text += f" ({100 * interval[0]:.1f}-{100 * interval[1]:.1f} %)"
    return text


def number(value: float | None) -> str:
    """Four significant digits, or a dash."""
    return "-" if value is None else f"{value:.4g}"


def duration(seconds: float | None) -> str:
    """`2 h 5 min`, `3 min 20 s`, `4 s`."""
    if seconds is None:
        return "-"
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def size(count: float | None) -> str:
    """Bytes in the unit that people would use (powers of 1000)."""
    if count is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def when(text: str | None) -> str:
    """An ISO time as local date and time."""
    if not text:
        return "-"
    return dt.datetime.fromisoformat(text).astimezone().strftime("%Y-%m-%d %H:%M")


FRONT = ("#trial", "search", "#KL first", "#KL multi?", "held-out", "#KL first", "method", "picked")


def front_rows(trials: Iterable[Json]) -> Iterable[Sequence[object]]:
    """Rows of the table with the columns FRONT."""
    for trial in trials:
        search, heldout = trial.get("search") or {}, trial.get("heldout") or {}
        yield (
            trial["number"],
            "not decoded" if trial.get("screened") else ratio(search),
            number(search.get("kl_first")),
            number(search.get("kl_multi")),
            ratio(heldout),
            number(heldout.get("kl_first")),
            trial.get("method", "-"),
            "yes" if trial.get("picked") else "",
        )


METHODS = (
    "method", "#trials", "#front", "#hypervolume", "#best", "search", "held-out", "#KL first",
    "#KL multi?", "#s/trial",
)  # fmt: skip


def method_rows(methods: Iterable[Json]) -> Iterable[Sequence[object]]:
    """Rows of the table with the columns METHODS; KLs on held-out prompts where measured."""
    for method in methods:
        best = method["best"] or {}
        search, heldout = best.get("search"), best.get("heldout")
        shown = heldout or search or {}
        yield (
            method["method"],
            f"{method['complete']}/{method['budget']}",
            len(method["front"]),
            number(method["hypervolume"]),
            best.get("number", "-"),
            ratio(search),
            ratio(heldout),
            number(shown.get("kl_first")),
            number(shown.get("kl_multi")),
            number(method["seconds"]),
        )
