"""Where values lie in a figure, and the round numbers beside its axes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Axis:
    """A linear map of [low, high] to pixels [start, end]; values outside go to the ends."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """The pixel of `value`."""
        part = (value - self.low) / (self.high - self.low)
        return self.start + (self.end - self.start) * min(1.0, max(0.0, part))


@dataclass(frozen=True)
class LogAxis:
    """A logarithmic map of [low, high], both positive, to pixels [start, end].

    Values outside go to the ends, and so does what has no logarithm: to the start.
    """

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """The pixel of `value`."""
        if value <= self.low:
            return self.start
        plain = Axis(math.log(self.low), math.log(self.high), self.start, self.end)
        return plain.at(math.log(value))


LEAST = 1e-200  # what is smaller is 0 to an axis: a step between such values would have no digits


def steps(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers at equal distances that hold [low, high]; `most` intervals at most.

    steps(0, 0.93)  # [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    if not high > low:
        high = low + (abs(low) if abs(low) > LEAST else 1.0)
    exponent = math.floor(math.log10((high - low) / most))
    for digit, power in ((m, exponent + e) for e in (0, 1, 2) for m in (1, 2, 5)):
        step = digit * 10.0**power
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first <= most:
            break
    return [round(place * step, max(0, -power)) for place in range(first, last + 1)]


def decades(values: Iterable[float]) -> list[float]:
    """1, 2 and 5 times powers of ten that hold all positive `values`; powers alone over two.

    decades([3, 40])      # [2, 5, 10, 20, 50]
    decades([0.3, 9000])  # [0.1, 1, 10, 100, 1000, 10000]
    """
    positive = [value for value in values if value > 0 and math.isfinite(value)] or [1.0]
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    # nothing is told by what lies below a billionth of the largest
    low = max(low, high - 9)
    fine = [float(f"{m}e{e}") for e in range(low, high + 1) for m in (1, 2, 5)]
    first = max((i for i, tick in enumerate(fine) if tick <= min(positive)), default=0)
    last = next(i for i, tick in enumerate(fine) if tick >= max(positive))
    chosen = fine[first : max(last, first + 1) + 1]
    if len(chosen) <= 7:
        return chosen
    return [float(f"1e{exponent}") for exponent in range(low, high + 1)]


def label(value: float) -> str:
    """A tick's text.

    label(0.25)   # '0.25'
    label(-0.5)   # '−0.5'
    label(20000)  # '2×10⁴'
    """
    if value and not 1e-3 <= abs(value) < 1e4:
        digits, exponent = f"{value:.0e}".split("e")
        power = "10" + str(int(exponent)).translate(_SUPERSCRIPT)
        return power if digits == "1" else f"{digits}×{power}".replace("-", "−")
    return f"{value:g}".replace("-", "−")
