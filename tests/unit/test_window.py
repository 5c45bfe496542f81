"""What a search has in hand, against a plain account of it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from worker.window import Window


@given(st.integers(1, 8), st.integers(0, 30), st.randoms(use_true_random=False))
def test_told_in_order_whatever_ends_first(size: int, trials: int, random: object) -> None:
    """And the next point is asked for knowing the same ones, always."""
    window: Window[int, str] = Window(size)
    begun, told = 0, list[int]()
    known: dict[int, list[int]] = {}  # point -> what had been told when it was asked for
    hand: list[int] = []
    while begun < trials or hand:
        while window.room and begun < trials:
            known[begun] = list(told)
            window.take(begun, begun)
            hand.append(begun)
            begun += 1
        assert len(window.open) <= size and window.open == sorted(hand)
        done = hand.pop(random.randrange(len(hand)))  # type: ignore[attr-defined]
        window.finish(done, f"score {done}")
        window.finish(done, "another")
        while (one := window.next_told()) is not None:
            assert one == (len(told), f"score {len(told)}")
            told.append(one[0])
            if begun < trials:  # one for each that is told
                known[begun] = list(told)
                window.take(begun, begun)
                hand.append(begun)
                begun += 1
        assert not set(window.untold) & {*told, *hand}
    assert told == list(range(trials)) and window.open == window.untold == []
    assert all(seen == list(range(max(0, point - size + 1))) for point, seen in known.items())


def test_what_is_not_in_hand_is_of_no_account() -> None:
    window: Window[str, int] = Window(2)
    window.finish(7, 1)
    assert window.next_told() is None and window.untold == [] and window.room == 2
