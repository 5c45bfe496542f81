"""What is scored in the slots of a job: what a dead worker began, fixed points, a sampler's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jobs import trials, warm
from jobs.spec.candidate import Candidate
from jobs.spec.methods import METHODS, MethodName, turn
from jobs.spec.protocol import Prepared, Select, Selected
from jobs.trials import Slot
from worker.run import Run
from worker.space import first, plain, plain_number
from worker.study import MethodStudy
from worker.warm import fitted, places

Studies = Mapping[MethodName, MethodStudy]


@dataclass(frozen=True)
class Point:
    """A slot with what goes into it. `finished`: the trials that may screen it."""

    number: int
    method: MethodName
    candidate: Candidate
    params: dict[str, Any]
    origin: str
    optuna_number: int | None = None
    finished: list[dict[str, float]] = field(default_factory=list)


def point_of(run: Run, studies: Studies, slot: Slot, prepared: Prepared) -> Point:
    """What to score in a slot: what a dead worker began there, or something new."""
    if slot.candidate is not None:
        row = run.lease.write(lambda session: trials.get(session, run.job.id, slot.number))
        params, known = slot.params or {}, row.optuna_number
        return Point(slot.number, slot.method, slot.candidate, params, row.origin, known)
    kind, own = METHODS[slot.method].kind, turn(run.spec.methods, slot.number)[1]
    if slot.method == "arditi":
        return _selected(run, slot)
    if kind == "fixed" or (kind == "ablation" and own == 0):
        whole = first(prepared.anatomy.layers, slot.method)
        return Point(slot.number, slot.method, whole, {}, "single_pass")
    study = studies[slot.method]
    begun = _warm(run, study, slot, prepared)
    if begun is not None:
        return Point(slot.number, slot.method, study.candidate(begun), begun, warm.ORIGIN)
    params, optuna_number = run.lease.patiently(lambda: study.ask(own))
    origin = "plain" if own == plain_number(slot.method) else "sampler"
    edit = study.candidate(params)
    return Point(slot.number, slot.method, edit, params, origin, optuna_number)


def _selected(run: Run, slot: Slot) -> Point:
    """A direction that the engine chooses; nothing else may run there."""
    run.log.line("info", f"trial {slot.number}: choosing a direction ({slot.method})")
    found = Selected.model_validate(run.ask(Select(), on_progress=run.searching).value)
    why = found.choices[0].model_dump() if found.choices else {}
    return Point(slot.number, slot.method, found.candidate, why, "selected")


def _warm(run: Run, study: MethodStudy, slot: Slot, prepared: Prepared) -> dict[str, Any] | None:
    """The point of a warm start; None where the slot has none. Optuna learns of it by its score."""
    numbers = places(run.spec.methods, run.job.trials)
    if not run.spec.warm_start or slot.number not in numbers[slot.method]:
        return None
    anatomy = prepared.anatomy
    chosen = run.lease.write(
        lambda session: warm.starts(session, run.task, run.token, numbers, anatomy)
    )
    if slot.number not in chosen:
        return None
    return fitted(chosen[slot.number].params, study.space, plain(anatomy.layers, slot.method))


def is_ara(method: MethodName) -> bool:
    """Whether its candidates are optimised one by one, which a batch of projections is not."""
    return METHODS[method].kind == "ara"


def together(points: Sequence[Point], size: int) -> list[list[Point]]:
    """Points by the request that holds them, at most `size` in each.

    ARA is asked apart, so that the time of a trial is that of its method; and what is screened by
    other trials.
    """
    groups: list[list[Point]] = []
    for point in points:
        key = is_ara(point.method), point.finished
        for group in groups:
            if len(group) < size and key == (is_ara(group[0].method), group[0].finished):
                group.append(point)
                break
        else:
            groups.append([point])
    return groups
