"""A figure: its size, its words, its marks; and the parts that figures share."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

STYLE = Path(__file__).with_name("figure.css").read_text(encoding="utf-8")
DIGEST = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
# lets a browser apply exactly that style, and load nothing (Content Security Policy, level 3)
POLICY = f"default-src 'none'; style-src 'sha256-{DIGEST}'; frame-ancestors 'none'"
MARGIN = 12


@dataclass(frozen=True)
class Figure:
    """A drawing of `width` by `height` pixels. `title` names it, `text` says what it shows.

    kind   class of the svg element, for style sheets
    body   its marks, well-formed and escaped
    """

    kind: str
    width: int
    height: int
    title: str
    text: str
    body: Markup

    def __html__(self) -> Markup:
        """The svg element inside a page, which colours it."""
        return Markup(
            '<svg class="plot {}" viewBox="0 0 {w} {h}" width="{w}" height="{h}" role="img" '
            'aria-label="{}">{}</svg>'
        ).format(self.kind, f"{self.title}. {self.text}", self.body, w=self.width, h=self.height)

    def document(self) -> str:
        """An SVG file of its own; light or dark as the reader's system is."""
        return str(
            Markup(
                '<svg xmlns="http://www.w3.org/2000/svg" class="plot {}" viewBox="-{m} -{m} {w} '
                '{h}" width="{w}" height="{h}" role="img" aria-labelledby="title text">'
                '<title id="title">{}</title><desc id="text">{}</desc><style>{}</style>'
                '<rect class="sheet" x="-{m}" y="-{m}" width="{w}" height="{h}"/>{}</svg>\n'
            ).format(
                self.kind, self.title, self.text, Markup(STYLE), self.body,
                m=MARGIN, w=self.width + 2 * MARGIN, h=self.height + 2 * MARGIN,
            )
        )  # fmt: skip


def beside(figures: Sequence[Figure], *, kind: str, title: str, text: str, gap: int = 28) -> Figure:
    """The figures in a row, as one."""
    parts, x = [], 0
    for figure in figures:
        parts.append(Markup('<g transform="translate({} 0)">{}</g>').format(x, figure.body))
        x += figure.width + gap
    height = max(figure.height for figure in figures)
    return Figure(kind, x - gap, height, title, text, Markup("").join(parts))


@dataclass(frozen=True)
class Key:
    """A sample of a mark, drawn around (11, 0) and 22 wide, and what it stands for."""

    sample: Markup
    words: str


def legend(keys: Sequence[Key], x: float, y: float, width: float) -> tuple[Markup, int]:
    """The keys from (x, y) on, in as many lines as `width` needs; and the height of these."""
    parts, at, line = [], 0.0, 0
    for key in keys:
        # Letters are not measured: 6.6 pixels is more than they take on average.
        room = 28 + 6.6 * len(key.words)
        if at and at + room > width:
            at, line = 0.0, line + 1
        parts.append(
            Markup(
                '<g transform="translate({:.1f} {:.1f})">{}<text x="28" y="4">{}</text></g>'
            ).format(x + at, y + 18 * line, key.sample, key.words)
        )
        at += room + 12
    return Markup("").join(parts), 18 * (line + 1)


def across(y: float, left: float, right: float, words: str) -> Markup:
    """A grid line at the height `y` with its tick's text on the left."""
    return Markup(
        '<line class="grid" x1="{}" x2="{}" y1="{y:.1f}" y2="{y:.1f}"/>'
        '<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>'
    ).format(left, right, left - 6, y + 4, words, y=y)


def below(x: float, y: float, words: object) -> Markup:
    """A tick's text under the point (x, y)."""
    return Markup('<text class="tick" x="{:.1f}" y="{:.1f}" text-anchor="middle">{}</text>').format(
        x, y + 16, words
    )


def frame(left: float, right: float, top: float, base: float, x: str, y: str) -> Markup:
    """Both axes with what is on them: `x` under the right end, `y` above the left one."""
    return Markup(
        '<path class="axis" d="M{l} {t}V{b}H{r}"/>'
        '<text class="axis-label" x="{r}" y="{}" text-anchor="end">{}</text>'
        '<text class="axis-label" x="4" y="{}">{}</text>'
    ).format(base + 32, x, top - 12, y, l=left, t=top, b=base, r=right)
