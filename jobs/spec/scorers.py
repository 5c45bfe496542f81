"""What turns an edited model into a number: one row each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

ScorerName = Literal[
    "refusals", "log_odds", "judge", "kl_first", "kl_multi", "over_refusal", "length",
    "perplexity", "harness",
]  # fmt: skip


@dataclass(frozen=True)
class Scorer:
    """Its name on pages, its unit, and how it may be used.

    direction   which way is better; "same": as near to the original's as possible
    cost        one forward (cheap), decoding (decode), or minutes (dear): dear ones score fronts
    objective   whether a search may minimise it
    """

    title: str
    unit: str
    direction: Literal["less", "more", "same"]
    cost: Literal["cheap", "decode", "dear"]
    objective: bool


SCORERS: dict[ScorerName, Scorer] = {
    "refusals": Scorer("Refusals by markers", "of prompts", "less", "decode", True),
    "log_odds": Scorer("First-token refusal log-odds", "nats", "less", "cheap", True),
    "judge": Scorer("Refusals by a judge", "of prompts", "less", "dear", False),
    "kl_first": Scorer("KL, first answer token", "nats", "less", "cheap", True),
    "kl_multi": Scorer("KL, several answer tokens", "nats", "less", "cheap", True),
    "over_refusal": Scorer("Refusals of look-alikes", "of prompts", "less", "decode", False),
    "length": Scorer("Length drift of harmless answers", "ratio", "same", "decode", False),
    "perplexity": Scorer("Perplexity on given text", "", "less", "cheap", False),
    "harness": Scorer("lm-evaluation-harness tasks", "", "more", "dear", False),
}  # fmt: skip
OBJECTIVES: tuple[ScorerName, ...] = tuple(n for n, s in SCORERS.items() if s.objective)
ALWAYS: tuple[ScorerName, ...] = ("refusals", "kl_first", "kl_multi")  # no `Score` is without


def of_trials(objectives: Iterable[ScorerName], scorers: Iterable[ScorerName]) -> list[ScorerName]:
    """What every trial is scored by besides ALWAYS: its objectives, and what costs one forward."""
    wanted = [*objectives, *(name for name in scorers if SCORERS[name].cost == "cheap")]
    return [name for name in dict.fromkeys(wanted) if name not in ALWAYS]


def of_engine(objectives: Iterable[ScorerName], scorers: Iterable[ScorerName]) -> list[ScorerName]:
    """What an engine must be prepared to score besides ALWAYS: `of_trials`, and the front's.

    Dear scorers need no preparation: a judge reads the answers, a harness is a `Benchmark`.
    """
    wanted = dict.fromkeys([*objectives, *scorers])
    return [name for name in wanted if name not in ALWAYS and SCORERS[name].cost != "dear"]
