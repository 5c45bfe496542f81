"""`--pick best`: little KL counts more than refusals that the interval cannot tell apart."""

from __future__ import annotations

from typing import Any

from nullspace.one_job import best


def trial(number: int, refusals: int, kl: float, heldout: bool = True) -> dict[str, Any]:
    scores = {"refusals": refusals, "total": 100, "kl_first": kl}
    worst = {"refusals": 99, "total": 100, "kl_first": 9.0}
    return {"number": number, "heldout": scores if heldout else None,
            "search": worst if heldout else scores}  # fmt: skip


def test_least_kl_within_two_percent_of_the_fewest_refusals() -> None:
    front = [trial(0, 0, 0.02), trial(1, 2, 0.005), trial(2, 3, 0.001), trial(3, 80, 0.0001)]
    assert best(front)["number"] == 1


def test_held_out_figures_count_where_there_are_any() -> None:
    assert best([trial(0, 5, 0.02), trial(1, 1, 0.03, heldout=False)])["number"] == 1


def test_equal_trials_go_by_number() -> None:
    assert best([trial(7, 0, 0.01), trial(4, 0, 0.01)])["number"] == 4
