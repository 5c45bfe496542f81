"""The search task: reserve slots, ask Optuna, score, write, tell; until no slot is free.

Each method of the job is searched in a study of its own; they take turns (`methods.turn`).
Order of the writes, which is what makes a crash at any point harmless:
1. `begin`: our row has the candidate before the engine sees it;
2. `complete`: our row has the scores, once, in one transaction with the event;
3. `tell`: Optuna learns of it. A crash between 2 and 3 is mended at the next claim.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy.orm import Session

from jobs import screening, trials, warm
from jobs.spec import scorers
from jobs.spec.candidate import Candidate
from jobs.spec.job import JobSpec
from jobs.spec.methods import METHODS, MethodName, turn
from jobs.spec.protocol import Prepared, Progress, Score, Scored, ScoredBatch, Select, Selected
from jobs.spec.scorers import ScorerName
from jobs.tables import Job
from jobs.trials import Slot
from worker import spool
from worker.run import Run
from worker.space import first, plain, plain_number
from worker.study import MethodStudy, Values, told
from worker.warm import fitted, places

Studies = dict[MethodName, MethodStudy]


@dataclass(frozen=True)
class Point:
    """A slot with what goes into it."""

    number: int
    method: MethodName
    candidate: Candidate
    params: dict[str, Any]
    origin: str
    optuna_number: int | None = None


def search(run: Run) -> None:
    """Score candidates until every slot is complete or in the hands of another live worker."""
    prepared = run.prepare()
    studies = _studies(run, prepared.anatomy.layers)
    size = run.batch_size()
    # a full batch of each kind of request in every round
    count = size * max(1, len({together(run.spec, method, "sampler") for method in studies}))
    while True:
        run.lease.check()
        _report(run)
        slots = run.write(lambda session: trials.reserve(session, run.task, run.token, count))
        if not slots:
            break
        points = [_point(run, studies, slot, prepared) for slot in slots]
        run.write(partial(_begin, run, points))
        for batch in _batches(run, points, size):
            run.lease.check()
            _score(run, studies, batch)
    _mend(run, studies)


def _batches(run: Run, points: list[Point], size: int) -> list[list[Point]]:
    """Points that one request may hold, at most `size` in each; what is scored in full first."""
    groups: defaultdict[tuple[bool, str], list[Point]] = defaultdict(list)
    for point in points:
        groups[together(run.spec, point.method, point.origin)].append(point)
    return [
        groups[key][at : at + size]
        for key in sorted(groups)
        for at in range(0, len(groups[key]), size)
    ]


def together(spec: JobSpec, method: MethodName, origin: str) -> tuple[bool, str]:
    """What candidates of one request have in common.

    ARA is asked apart, so that the time of a trial is that of its method; and what a method's own
    trials screen (its name, else "") is asked by method.
    """
    return is_ara(method), method if screening.applies(spec, origin) else ""


def is_ara(method: MethodName) -> bool:
    """Whether its candidates are optimised one by one, which a batch of projections is not."""
    return METHODS[method].kind == "ara"


def _studies(run: Run, layers: int) -> Studies:
    """A study for each method that is searched, brought up to our table."""
    spec, storage, budget = run.spec, run.station.storage, run.job.trials

    def open_all() -> Studies:
        return {
            method: MethodStudy(storage, run.job.id, spec, method, layers, budget)
            for method in spec.methods
            if METHODS[method].kind != "fixed"
        }

    studies = run.lease.patiently(open_all)
    _mend(run, studies)
    return studies


def _mend(run: Run, studies: Studies) -> None:
    if not studies:
        return
    rows = run.lease.write(lambda session: trials.list_trials(session, run.job.id, limit=100_000))
    seconds = run.station.settings.lease_seconds
    for study in studies.values():
        run.lease.patiently(partial(study.mend, rows, seconds))


def _point(run: Run, studies: Studies, slot: Slot, prepared: Prepared) -> Point:
    """What to score in a slot: what a dead worker began there, or something new."""
    if slot.candidate is not None:
        row = run.lease.write(lambda session: trials.get(session, run.job.id, slot.number))
        params, known = slot.params or {}, row.optuna_number
        return Point(slot.number, slot.method, slot.candidate, params, row.origin, known)
    kind, own = METHODS[slot.method].kind, turn(run.spec.methods, slot.number)[1]
    if slot.method == "arditi":
        run.log.line("info", f"trial {slot.number}: choosing a direction ({slot.method})")
        found = Selected.model_validate(
            run.ask(Select(), on_progress=lambda answer: _report(run, answer)).value
        )
        why = found.choices[0].model_dump() if found.choices else {}
        return Point(slot.number, slot.method, found.candidate, why, "selected")
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


def _begin(run: Run, points: list[Point], session: Session) -> None:
    for point in points:
        trials.begin(
            session,
            run.task,
            run.token,
            point.number,
            point.candidate,
            point.params,
            point.origin,
            point.optuna_number,
        )


def _score(run: Run, studies: Studies, points: list[Point]) -> None:
    """Score a batch. Each candidate is written as soon as its score arrives."""
    waiting: list[Point] = []
    for point in points:
        spooled = spool.take(run.station.settings.spool, run.job.id, point.number, point.candidate)
        if spooled is None:
            waiting.append(point)
        else:
            _finish(run, studies, point, spooled)
    if not waiting:
        return
    open_points = dict(enumerate(waiting))

    def finish(index: int, scored: Scored | None) -> None:
        if scored is not None and index in open_points:
            _finish(run, studies, open_points.pop(index), scored)

    result = run.ask(
        Score(
            candidates=[point.candidate for point in waiting],
            finished=_finished(run, waiting),
            scorers=scorers.of_trials(run.spec.objectives, run.spec.scorers),
            kl_multi="kl_multi" in (*run.spec.objectives, *run.spec.scorers),
        ),
        on_partial=lambda answer: finish(answer.index, answer.scored),
        on_progress=lambda answer: _report(run, answer),
    )
    for index, scored in enumerate(ScoredBatch.model_validate(result.value).scored):
        finish(index, scored)


def _finished(run: Run, points: list[Point]) -> list[dict[ScorerName, float]]:
    """The trials that may screen points of one request: other workers' too, as of now."""
    _, method = together(run.spec, points[0].method, points[0].origin)
    if not method:
        return []
    return run.lease.write(
        lambda session: screening.finished(session, run.job.id, method, run.spec.objectives)
    )


def _finish(run: Run, studies: Studies, point: Point, scored: Scored) -> None:
    folder = run.station.settings.spool
    kept = spool.Spooled(candidate=point.candidate, scored=scored)
    run.write(
        lambda session: trials.complete(session, run.task, run.token, point.number, scored),
        on_outage=lambda: spool.keep(folder, run.job.id, point.number, kept),
    )
    spool.drop(folder, run.job.id, point.number)
    run.log.line("info", f"trial {point.number} ({point.method}, {point.origin}): {_said(scored)}")
    study = studies.get(point.method)
    if study is not None and point.params:
        values = _values(run, scored)
        run.lease.patiently(
            lambda: study.tell(point.number, point.params, point.optuna_number, values)
        )


def _values(run: Run, scored: Scored) -> Values | None:
    """What Optuna is told to minimise; None when a score is missing."""
    found = tuple(scored.scores.value(name) for name in run.spec.objectives)
    known = tuple(value for value in found if value is not None)
    return told(run.spec, known, scored.screened) if len(known) == len(found) else None


def _said(scored: Scored) -> str:
    """A score as a line of the log."""
    scores = scored.scores
    refused = f"{scores.refusals}/{scores.total} refusals"
    said = [f"not decoded ({refused})" if scored.screened else refused]
    said += [
        f"KL {value:.3g} ({of})"
        for value, of in ((scores.kl_first, "first token"), (scores.kl_multi, "several"))
        if value is not None
    ]
    said += [f"{name} {value.value:.3g}" for name, value in scores.values.items()]
    return ", ".join([*said, f"{scored.seconds:.2f} s"])


def _report(run: Run, inner: Progress | None = None) -> None:
    """ "searching k/n", with what the engine is at inside the present batch."""
    if inner is None:
        run.searched, run.budget = run.lease.write(partial(_counted, run))
    text = f"{inner.phase} {inner.done:g}/{inner.total:g}" if inner is not None else ""
    run.progress("searching", run.searched, run.budget, text)


def _counted(run: Run, session: Session) -> tuple[int, int]:
    """Complete trials, and how many there will be: more may have been asked for meanwhile."""
    job = session.get_one(Job, run.job.id)
    return trials.counts(session, job.id)["complete"], job.trials
