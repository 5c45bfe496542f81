"""Trials as pages show them: table, plot, one trial with its answers."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from jobs.spec.methods import METHODS
from jobs.spec.protocol import PromptTexts
from jobs.spec.scores import Outcome, Role
from jobs.tables import Trial
from jobs.trial_scores import score_of
from web import plots
from web.views import formats, scores
from web.views.scores import Score

MOST_TRIED = 400  # points off the front in one plot; the table holds them all
ORIGINS = {
    "single_pass": "single pass",
    "selected": "selection",
    "plain": "plain point",
    "warm_start": "warm start",
    "sampler": "search",
}


@dataclass(frozen=True)
class Line:
    """A row of the trials' table; the same facts as its point in the plot."""

    number: int
    href: str
    state: str
    method: str
    origin: str
    front: bool
    picked: bool
    search: Score | None
    heldout: Score | None
    seconds: float | None


@dataclass(frozen=True)
class Column:
    """A sortable heading. `more` is left out on phones.

    `order` is what a click leads to, `current` how it is sorted now.
    """

    key: str
    label: str
    more: str
    order: str
    current: str
    wide: bool = False


@dataclass(frozen=True)
class Answer:
    """A prompt with both models' answers."""

    place: int
    prompt: str
    original: Outcome | None
    edited: Outcome
    change: str


@dataclass(frozen=True)
class Answers:
    """One page of the answers of a role."""

    role: Role
    label: str
    items: list[Answer]
    total: int
    refused: int
    page: int
    pages: int


@dataclass(frozen=True)
class Missing:
    """Trials that are in the table alone: not decoded, and the oldest off the front."""

    screened: int
    old: int


def line(job_id: uuid.UUID, row: Trial, front: frozenset[int]) -> Line:
    """A row of the table."""
    return Line(
        number=row.number,
        href=f"/jobs/{job_id}/trials/{row.number}",
        state=row.state,
        method=row.method,
        origin=ORIGINS.get(row.origin, row.origin),
        front=row.number in front,
        picked=row.picked,
        search=scores.of_trial(row),
        heldout=scores.score(row.heldout),
        seconds=row.seconds,
    )


def _or_last(value: float | int | None) -> float:
    return math.inf if value is None else float(value)


KEYS: dict[str, Callable[[Line], tuple[float, ...]]] = {
    "number": lambda item: (item.number,),
    "refusals": lambda item: (
        _or_last(item.search.refusals if item.search and not item.search.screened else None),
        _or_last(item.search.kl_first if item.search else None),
        item.number,
    ),
    "kl": lambda item: (_or_last(item.search.kl_first if item.search else None), item.number),
    "kl_multi": lambda item: (_or_last(item.search.kl_multi if item.search else None), item.number),
    "heldout": lambda item: (
        _or_last(item.heldout.share if item.heldout else None),
        _or_last(item.search.kl_first if item.search else None),
        item.number,
    ),
    "seconds": lambda item: (_or_last(item.seconds), item.number),
}
HEADINGS = (
    ("number", "Trial", "", False),
    ("refusals", "Refused", "", False),
    ("heldout", "Held-out", "", False),
    ("kl", "KL", "first token", False),
    ("kl_multi", "KL", "several tokens", True),
    ("seconds", "Time", "", True),
)


def ordered(lines: Iterable[Line], sort: str, order: str) -> list[Line]:
    """Sorted by a key of KEYS; lines that lack the value stay last in both orders."""
    key = KEYS.get(sort, KEYS["refusals"])
    items = list(lines)
    known = [item for item in items if key(item)[0] != math.inf]
    unknown = sorted((i for i in items if key(i)[0] == math.inf), key=lambda i: i.number)
    return sorted(known, key=key, reverse=order == "desc") + unknown


def has_several(lines: Iterable[Line]) -> bool:
    """Whether any trial has a KL over several tokens on the search prompts."""
    return any(item.search is not None and item.search.kl_multi is not None for item in lines)


def columns(sort: str, order: str, several: bool = True) -> list[Column]:
    """The headings, each with the order that a click on it gives. `several`: see `has_several`."""
    return [
        Column(
            key,
            label,
            more,
            "desc" if key == sort and order == "asc" else "asc",
            ("descending" if order == "desc" else "ascending") if key == sort else "none",
            wide,
        )
        for key, label, more, wide in HEADINGS
        if several or key != "kl_multi"
    ]


def title(item: Line) -> str:
    """A point in words."""
    if item.search is None:
        return f"Trial {item.number}: {item.state}"
    refused = f"{item.search.refusals} of {item.search.total} refused"
    words = (
        f"Trial {item.number}: {'not decoded' if item.search.screened else refused}, "
        f"KL {formats.divergence(item.search.kl_first)}"
    )
    if item.heldout is not None:
        words += f"; held-out {item.heldout.refusals} of {item.heldout.total}"
    if item.picked:
        words += "; picked"
    return words


def marks(lines: Sequence[Line], methods: Sequence[str] = ()) -> list[plots.Mark]:
    """The points of the plot: the whole front, picks, and the newest of the others.

    Where there are several `methods`, each has marks of its own, by its place among them. Screened
    trials have no place in the plane: how many prompts they refuse is not known.
    """
    scored = [
        item
        for item in lines
        if item.search is not None and item.search.kl_first is not None and not item.search.screened
    ]
    tried = [item for item in scored if not item.front and not item.picked]
    tried = sorted(tried, key=lambda item: -item.number)[:MOST_TRIED]
    chosen = [item for item in scored if item.front or item.picked] + tried
    return [_mark(item, methods if len(methods) > 1 else ()) for item in chosen]


def _mark(item: Line, methods: Sequence[str]) -> plots.Mark:
    assert item.search is not None and item.search.kl_first is not None
    held = item.heldout
    return plots.Mark(
        number=item.number,
        refusals=item.search.refusals,
        total=item.search.total,
        kl=item.search.kl_first,
        href=item.href,
        title=title(item) + (f"; {method_title(item.method)}" if methods else ""),
        series=methods.index(item.method) if item.method in methods else None,
        front=item.front,
        picked=item.picked,
        heldout=None
        if held is None
        else plots.HeldOut(
            refusals=held.refusals,
            total=held.total,
            kl=held.kl_first,
            low=held.low,
            high=held.high,
            title=f"Trial {item.number}, held-out: {held.refusals} of {held.total} refused "
            f"({held.interval}), KL {formats.divergence(held.kl_first)}",
        ),
    )


def plot(
    lines: Sequence[Line],
    baseline: Score | None,
    methods: Sequence[str] = (),
    *,
    width: int,
    height: int,
) -> Markup | None:
    """The Pareto plot; None while no trial has scores."""
    points = marks(lines, methods)
    if not points:
        return None
    original = plots.Baseline(baseline.refusals, baseline.total) if baseline else None
    return plots.pareto(points, original, width=width, height=height)


def left_out(lines: Sequence[Line]) -> Missing:
    """What the plot does not draw."""
    screened = sum(item.search is not None and item.search.screened for item in lines)
    tried = sum(item.search is not None and not item.front for item in lines) - screened
    return Missing(screened, max(0, tried - MOST_TRIED))


def method_title(name: str) -> str:
    """A method as pages call it."""
    return next((method.title for key, method in METHODS.items() if key == name), name)


def prompts_of(stored: Mapping[str, Any], role: Role) -> list[str]:
    """The prompts whose outcomes are kept for a role, in the outcomes' order."""
    texts = PromptTexts.model_validate(stored)
    found: dict[Role, list[str]] = {
        "search": texts.search_harmful,
        "heldout": texts.heldout_harmful,
        "over_refusal": texts.over_refusal,
    }
    return found[role]


NAMES = {"kl_first": "KL", "kl_multi": "KL of several tokens", "log_odds": "refusal log-odds"}


def reason(row: Trial, better: Trial | None, objectives: Sequence[str]) -> str:
    """Why a screened trial was not decoded; '' for others. `better` dominates it."""
    if not row.screened:
        return ""
    if better is None:
        return "Not decoded: a finished trial is better whatever this one answers."
    others = [name for name in objectives if name != "refusals"]
    lower = all((score_of(better, n) or 0.0) < (score_of(row, n) or 0.0) for n in others)
    words = " and ".join(NAMES.get(name, name) for name in others)
    refused = f"{better.refusals} refusal{'s' if better.refusals != 1 else ''}"
    said = (
        f"trial {better.number} has {'a lower' if lower else 'no higher'} {words} and "
        f"{refused if better.refusals else 'no refusals'}"
    )
    if not row.total:
        return f"Not decoded: {said}."
    answers = f"{row.refusals} of this one's first {row.total} answers were refusals"
    return f"Not decoded to the end: {said}; {answers}."


def change(original: Outcome | None, edited: Outcome) -> str:
    """What the edit did to one prompt: 'now answered', 'still refused', 'now refused', ''."""
    if original is None:
        return "refused" if edited.refused else "answered"
    if edited.refused:
        return "still refused" if original.refused else "now refused"
    return "now answered" if original.refused else "answered as before"


def answers(
    role: Role,
    prompts: Sequence[str],
    original: Sequence[Outcome],
    edited: Sequence[Outcome],
    *,
    only_refused: bool,
    page: int,
    length: int = 20,
) -> Answers:
    """One page of a role's answers; still refused ones first, then in the prompts' order."""
    items = [
        Answer(
            place=place,
            prompt=prompts[place] if place < len(prompts) else "",
            original=original[place] if place < len(original) else None,
            edited=outcome,
            change=change(original[place] if place < len(original) else None, outcome),
        )
        for place, outcome in enumerate(edited)
        if outcome.answered
    ]
    items.sort(key=lambda item: (not item.edited.refused, item.place))
    refused = sum(item.edited.refused for item in items)
    chosen = [item for item in items if item.edited.refused] if only_refused else items
    pages = max(1, math.ceil(len(chosen) / length))
    page = min(max(1, page), pages)
    return Answers(
        role, scores.ROLES[role], chosen[(page - 1) * length : page * length],
        len(items), refused, page, pages,
    )  # fmt: skip
