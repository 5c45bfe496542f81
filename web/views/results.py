"""What jobs without a search found, and harness figures of trials, as rows of tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jobs import results
from jobs.benchmarks import Measured
from jobs.listing import ResultView, RoleScores
from jobs.spec.job import JobSpec
from jobs.spec.scores import Role, Value
from jobs.tables import Trial
from web.views import formats, scores


@dataclass(frozen=True)
class Cell:
    """A value, and what it rests on."""

    value: str
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """A row: one figure of both sides; `hint` is its unit or metric."""

    title: str
    hint: str
    original: Cell | None
    model: Cell | None


@dataclass(frozen=True)
class Group:
    """The figures on the prompts of one role."""

    role: Role
    title: str
    meaning: str
    figures: list[Figure]


MEANING: dict[Role, str] = {
    "search": "the prompts that a search would use",
    "heldout": "further prompts of the same sets",
    "over_refusal": scores.MEANING["over_refusal"],
}


def groups(result: ResultView | None) -> list[Group]:
    """The scores of both sides by role."""
    if result is None:
        return []
    return [
        Group(
            role,
            scores.ROLES[role],
            MEANING[role],
            list(_figures(result.original.get(role), result.model.get(role))),
        )
        for role in scores.ROLES
        if role in result.model
    ]


def _figures(original: RoleScores | None, model: RoleScores | None) -> Iterable[Figure]:
    yield Figure("Refused", "", _refused(original), _refused(model))
    if original is not None and model is not None and model.total and original.kl_first is not None:
        for title, name in (("KL, first token", "kl_first"), ("KL, several tokens", "kl_multi")):
            moved = getattr(model, name)
            if moved is not None:
                yield Figure(title, "nats", Cell("0"), Cell(formats.divergence(moved)))
    yield Figure("Answer length", "tokens", _tokens(original), _tokens(model))
    before = original.values if original else {}
    after = model.values if model else {}
    for name in dict.fromkeys([*before, *after]):
        yield _further(name, before.get(name), after.get(name))


def _refused(side: RoleScores | None) -> Cell | None:
    if side is None:
        return None
    return Cell(f"{side.refusals}/{side.total}", formats.interval(*side.interval))


def _tokens(side: RoleScores | None) -> Cell | None:
    return None if side is None else Cell(f"{side.mean_tokens:.1f}")


def _further(name: str, original: Value | None, model: Value | None) -> Figure:
    shown = [None if each is None else scores.further(name, each) for each in (original, model)]
    title = next(each.title for each in shown if each is not None)
    cells = [None if each is None else Cell(each.value, each.note) for each in shown]
    return Figure(title, "", cells[0], cells[1])


@dataclass(frozen=True)
class Steps:
    """How many of a job's steps are done: scoring, each task on each side, a judge's verdicts."""

    done: int
    total: int


def steps(spec: JobSpec, result: ResultView | None, measured: set[Measured]) -> Steps:
    """How far a job without a search is."""
    sides = results.sides(spec)
    figures = [
        (results.NUMBERS[side], name, spec.task_limit) for side in sides for name in spec.tasks
    ]
    done, total = sum(each in measured for each in figures), len(figures)
    if spec.kind == "evaluate":
        total, done = total + 1, done + (result is not None and bool(result.model))
    if "judge" in spec.scorers:
        held = result.model.get("heldout") if result is not None else None
        total, done = total + 1, done + (held is not None and "judge" in held.values)
    return Steps(done, total)


def harness(original: Mapping[str, Value], model: Mapping[str, Value]) -> list[Figure]:
    """Harness figures of both sides, by name (`<task>.<metric>`, with or without `harness.`)."""
    before, after = _harness(original), _harness(model)
    found = []
    for name in sorted({*before, *after}):
        task, _, metric = name.partition(".")
        cells = [_measured(side.get(name)) for side in (before, after)]
        found.append(Figure(task, metric.replace(".", ", "), cells[0], cells[1]))
    return found


def harness_of(stored: Mapping[str, Any] | None) -> dict[str, Value]:
    """The harness figures in a stored `Scores` document."""
    known = scores.score(stored)
    values = known.values if known is not None else {}
    return {name: value for name, value in values.items() if name.startswith(scores.HARNESS)}


def of_trial(baseline: Mapping[str, Any] | None, row: Trial) -> list[Figure]:
    """The harness figures of a trial beside the original's, where the trial has any."""
    mine = harness_of(row.heldout)
    return harness(harness_of((baseline or {}).get("heldout")), mine) if mine else []


def _harness(values: Mapping[str, Value]) -> dict[str, Value]:
    return {name.removeprefix(scores.HARNESS): value for name, value in values.items()}


def _measured(value: Value | None) -> Cell | None:
    """'0.512 ± 0.031' of 100 samples."""
    if value is None:
        return None
    shown = f"{value.value:.3g}"
    if value.low is not None and value.high is not None:
        shown += f" ± {(value.high - value.low) / 2:.2g}"
    return Cell(shown, f"of {formats.number(value.n)}" if value.n is not None else "")
