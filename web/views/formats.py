"""Numbers, times and hostile text in the form in which a person reads them."""

from __future__ import annotations

import datetime as dt
import math
import re
import unicodedata

DASH = "–"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
# CSI, OSC and two-character escape sequences (ECMA-48)
_ANSI = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"
    r"|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?"
    r"|\x1b[ -/]*[0-~]"
    r"|\x9b[0-?]*[ -/]*[@-~]"
)


def duration(seconds: float | None) -> str:
    """Seconds in the two largest units that matter.

    duration(0.42)   # '0.4 s'
    duration(200)    # '3 min 20 s'
    duration(3900)   # '1 h 05 min'
    duration(187200) # '2 d 4 h'
    """
    if seconds is None or not math.isfinite(seconds) or seconds < 0:
        return DASH
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s" if minutes < 10 else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes:02d} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h"


def size(count: int | float | None) -> str:
    """Bytes in decimal units: size(12_345_678) # '12.3 MB'."""
    if count is None:
        return DASH
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 99.5 else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB" if value < 999.5 else f"{value:,.0f} TB"


def divergence(value: float | None) -> str:
    """A KL divergence in nats.

    divergence(0.01234) # '0.0123'
    divergence(2.1e-4)  # '2.1×10⁻⁴'
    divergence(-1e-9)   # '0': rounding below zero is no news
    """
    if value is None or math.isnan(value):
        return DASH
    if math.isinf(value):
        return "∞"
    if value < 1e-9:
        return "0"
    if value < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}×10{str(int(exponent)).translate(_SUPERSCRIPT)}"
    if value < 10:
        return f"{value:.3g}"
    return f"{value:.1f}"


def share(part: float | None) -> str:
    """A share 0..1 in percent: share(0.085) # '8.5 %'."""
    if part is None:
        return DASH
    percent = 100 * part
    return f"{percent:.0f} %" if percent in (0, 100) else f"{percent:.1f} %"


def interval(low: float, high: float) -> str:
    """A 95 % interval of a share: interval(0.0103, 0.0845) # '1.0–8.5 %'."""
    return f"{100 * low:.1f}–{100 * high:.1f} %"


def number(value: float | int | None) -> str:
    """A count with thin spaces between thousands; a real number with three digits."""
    if value is None:
        return DASH
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value):,}".replace(",", "\u202f")
    return f"{value:.3g}"


def ago(when: dt.datetime | None, now: dt.datetime) -> str:
    """How long ago `when` was, in its largest unit: '3 min ago'."""
    if when is None:
        return "never"
    seconds = (now - when).total_seconds()
    if seconds < 5:
        return "just now"
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{int(seconds // length)} {unit} ago"
    return f"{int(seconds)} s ago"


def clock(when: dt.datetime | None) -> str:
    """A moment in UTC: '2026-01-31 13:05'."""
    if when is None:
        return DASH
    return when.astimezone(dt.timezone.utc).strftime("%Y-%m-%d %H:%M")


def shown(text: object) -> str:
    """Text without terminal escapes, its other invisible characters made visible.

    Control and format characters (bidi overrides, zero-width signs, NUL) can make a page or a log
    read as something else than it is, so they are written as ⟨U+202E⟩. Line feeds and tabs stay.
    """
    value = _ANSI.sub("", str(text)).replace("\r\n", "\n")
    if value.isascii() and value.isprintable():
        return value
    return "".join(_visible(letter) for letter in value)


def _visible(letter: str) -> str:
    if letter in "\n\t":
        return letter
    # Zero-width joiners make emoji and Indic text; alone they cannot reorder anything.
    if letter == "\u200d":
        return letter
    if unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp"):
        return f"⟨U+{ord(letter):04X}⟩"
    return letter
