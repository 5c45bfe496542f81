"""What a search has in hand: begun in order, scored in any order, told in order again.

The sampler learns of trials in the order in which it asked for them, one for each that it is asked
for anew. So a point depends on the seed and the scores alone, not on which candidate was faster.
"""

from __future__ import annotations

from typing import Generic, TypeVar

Point = TypeVar("Point")
Score = TypeVar("Score")


class Window(Generic[Point, Score]):
    """At most `size` points in hand.

    window = Window(2)
    window.take(0, a); window.take(1, b)        # window.room == 0
    window.finish(1, score)
    window.next_told()                          # None: 0 comes first
    window.finish(0, other)
    window.next_told()                          # (a, other); and then (b, score)
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._points: dict[int, Point] = {}
        self._scores: dict[int, Score] = {}

    @property
    def room(self) -> int:
        """How many points may be taken in hand."""
        return self._size - len(self._points)

    @property
    def open(self) -> list[Point]:
        """The points that have no score, in order."""
        return [point for number, point in self._points.items() if number not in self._scores]

    @property
    def untold(self) -> list[int]:
        """The numbers of the points that have a score of which nobody may know as yet."""
        return list(self._scores)

    def take(self, number: int, point: Point) -> None:
        """Take a point in hand."""
        self._points[number] = point

    def finish(self, number: int, score: Score) -> None:
        """The score of a point in hand; a second one is of no account."""
        if number in self._points:
            self._scores.setdefault(number, score)

    def next_told(self) -> tuple[Point, Score] | None:
        """The first point in hand and its score, which leave; None where it has none."""
        first = next(iter(self._points), None)
        if first is None or first not in self._scores:
            return None
        return self._points.pop(first), self._scores.pop(first)
