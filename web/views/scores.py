"""Scores as pages show them: counts, intervals, divergences and the bar of the refusal rate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from markupsafe import Markup

from jobs.spec.scorers import SCORERS
from jobs.spec.scores import Role, Value, wilson
from jobs.tables import Trial
from jobs.trial_scores import search_scores
from web import plots
from web.views import formats

HARNESS = "harness."
ROLES: dict[Role, str] = {
    "search": "Search prompts",
    "heldout": "Held-out prompts",
    "over_refusal": "Over-refusal prompts",
}
MEANING: dict[Role, str] = {
    "search": "seen by the search",
    "heldout": "seen by neither directions nor search",
    "over_refusal": "harmless, but they look refusable",
}


@dataclass(frozen=True)
class Further:
    """A further score in words: its name, its value, and what it rests on."""

    title: str
    value: str
    note: str


@dataclass(frozen=True)
class Score:
    """Refusals of `total` prompts with their Wilson 95 % interval, KLs in nats.

    screened   the trial was not decoded to the end: the counts are of its first answers, if any
    """

    refusals: int
    total: int
    low: float
    high: float
    kl_first: float | None = None
    kl_multi: float | None = None
    mean_tokens: float | None = None
    values: Mapping[str, Value] = field(default_factory=dict)
    screened: bool = False

    @property
    def share(self) -> float:
        """Refused share, 0..1."""
        return self.refusals / self.total if self.total else 0.0

    @property
    def interval(self) -> str:
        """'1.0–8.5 %'."""
        return formats.interval(self.low, self.high)

    @property
    def bar(self) -> Markup:
        """The share as a bar with its interval."""
        return plots.rate(self.share, self.low, self.high)


@dataclass(frozen=True)
class Comparison:
    """One role's row of a result: the original beside the edit."""

    role: Role
    label: str
    meaning: str
    original: Score | None
    edited: Score | None

    @property
    def further(self) -> list[Further]:
        """The further scores of the edit, beside the original's where they are known."""
        before = self.original.values if self.original else {}
        after = self.edited.values if self.edited else {}
        return [
            further(name, value, before.get(name))
            for name, value in after.items()
            if not name.startswith(HARNESS)  # they have a table of their own
        ]


def score(stored: Mapping[str, Any] | None) -> Score | None:
    """A stored `Scores` document."""
    if not stored or stored.get("refusals") is None or stored.get("total") is None:
        return None
    refusals, total = int(stored["refusals"]), int(stored["total"])
    low, high = wilson(refusals, total)
    return Score(
        refusals, total, low, high,
        stored.get("kl_first"), stored.get("kl_multi"), stored.get("mean_tokens"),
        {name: Value.model_validate(value) for name, value in (stored.get("values") or {}).items()},
    )  # fmt: skip


def further(name: str, value: Value, original: Value | None = None) -> Further:
    """One further score; `name` is of SCORERS, or `harness.<task>.<metric>`."""
    known = next((scorer for key, scorer in SCORERS.items() if key == name), None)
    unit = known.unit if known else ""
    notes = []
    if value.low is not None and value.high is not None:
        notes.append(f"{_plain(value.low, unit)} to {_plain(value.high, unit)}")
    if value.n is not None:
        notes.append(f"of {value.n}")
    if original is not None:
        notes.append(f"original {_plain(original.value, unit)}")
    title = known.title if known else name.removeprefix("harness.").replace(".", ", ")
    shown = _plain(value.value, unit)
    return Further(title, f"{shown} {unit}" if unit == "nats" else shown, "; ".join(notes))


def _plain(value: float, unit: str) -> str:
    """A share in percent, anything else with three digits."""
    return formats.share(value) if unit == "of prompts" else formats.number(value)


def of_trial(row: Trial) -> Score | None:
    """The scores on the search prompts, kept in the trial's own columns."""
    found = search_scores(row)
    shown = None if found is None else score(found.model_dump())
    return replace(shown, screened=True) if shown is not None and row.screened else shown


def by_role(row: Trial) -> dict[Role, Score]:
    """All scores that a trial has."""
    found = {
        "search": of_trial(row),
        "heldout": score(row.heldout),
        "over_refusal": score(row.over_refusal),
    }
    return {role: found[role] for role in ROLES if found[role] is not None}  # type: ignore[misc]


def compare(baseline: Mapping[str, Any] | None, row: Trial | None) -> list[Comparison]:
    """Rows for every role that either side has, in the order of ROLES."""
    edited = by_role(row) if row is not None else {}
    original = {role: score((baseline or {}).get(role)) for role in ROLES}
    return [
        Comparison(role, ROLES[role], MEANING[role], original[role], edited.get(role))
        for role in ROLES
        if original[role] is not None or role in edited
    ]
