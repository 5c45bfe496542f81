"""The search task: reserve slots, ask Optuna, score, write, tell; until no slot is free.

Order of the writes, which is what makes a crash at any point harmless:
1. `begin`: our row has the candidate before the engine sees it;
2. `complete`: our row has the scores, once, in one transaction with the event;
3. `tell`: Optuna learns of it. A crash between 2 and 3 is mended at the next claim.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy.orm import Session

from jobs import trials
from jobs.spec.candidate import Candidate, single_pass
from jobs.spec.protocol import Prepared, Progress, Score, Scored, ScoredBatch
from jobs.tables import Job
from jobs.trials import Slot
from worker import spool
from worker.run import Run
from worker.study import JobStudy


@dataclass(frozen=True)
class Point:
    """A slot with what goes into it."""

    number: int
    candidate: Candidate
    params: dict[str, Any]
    origin: str
    optuna_number: int | None


def search(run: Run) -> None:
    """Score candidates until every slot is complete or in the hands of another live worker."""
    prepared = run.prepare()
    study = _study(run, prepared.anatomy.layers) if run.spec.method == "search" else None
    size = run.batch_size(prepared)
    while True:
        run.lease.check()
        _report(run)
        slots = run.write(lambda session: trials.reserve(session, run.task, run.token, size))
        if not slots:
            break
        points = [_point(run, study, slot, prepared) for slot in slots]
        run.write(partial(_begin, run, points))
        _score(run, study, points)
    if study is not None:
        _mend(run, study)


def _study(run: Run, layers: int) -> JobStudy:
    study = run.lease.patiently(
        lambda: JobStudy(run.station.storage, run.job.id, run.spec, layers, run.job.trials)
    )
    _mend(run, study)
    return study


def _mend(run: Run, study: JobStudy) -> None:
    rows = run.lease.write(lambda session: trials.list_trials(session, run.job.id, limit=100_000))
    run.lease.patiently(lambda: study.mend(rows, run.station.settings.lease_seconds))


def _point(run: Run, study: JobStudy | None, slot: Slot, prepared: Prepared) -> Point:
    """What to score in a slot: what a dead worker began there, or something new."""
    if slot.candidate is not None:
        row = run.lease.write(lambda session: trials.get(session, run.job.id, slot.number))
        return Point(slot.number, slot.candidate, slot.params or {}, row.origin, row.optuna_number)
    if study is None or slot.number == 0:
        first = single_pass(prepared.anatomy.layers, run.spec.modes[0], run.spec.projected)
        return Point(slot.number, first, {}, "single_pass", None)
    params, optuna_number = run.lease.patiently(lambda: study.ask(slot.number))
    origin = "plain" if slot.number == 1 else "sampler"
    return Point(slot.number, study.candidate(params), params, origin, optuna_number)


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


def _score(run: Run, study: JobStudy | None, points: list[Point]) -> None:
    """Score a batch. Each candidate is written as soon as its score arrives."""
    waiting: list[Point] = []
    for point in points:
        spooled = spool.take(run.station.settings.spool, run.job.id, point.number, point.candidate)
        if spooled is None:
            waiting.append(point)
        else:
            _finish(run, study, point, spooled)
    if not waiting:
        return
    open_points = dict(enumerate(waiting))

    def finish(index: int, scored: Scored | None) -> None:
        if scored is not None and index in open_points:
            _finish(run, study, open_points.pop(index), scored)

    result = run.ask(
        Score(candidates=[point.candidate for point in waiting]),
        on_partial=lambda answer: finish(answer.index, answer.scored),
        on_progress=lambda answer: _report(run, answer),
    )
    for index, scored in enumerate(ScoredBatch.model_validate(result.value).scored):
        finish(index, scored)


def _finish(run: Run, study: JobStudy | None, point: Point, scored: Scored) -> None:
    folder = run.station.settings.spool
    kept = spool.Spooled(candidate=point.candidate, scored=scored)
    run.write(
        lambda session: trials.complete(session, run.task, run.token, point.number, scored),
        on_outage=lambda: spool.keep(folder, run.job.id, point.number, kept),
    )
    spool.drop(folder, run.job.id, point.number)
    scores = scored.scores
    run.log.line(
        "info",
        f"trial {point.number} ({point.origin}): {scores.refusals}/{scores.total} refusals, "
        f"KL {_shown(scores.kl_first)} (first token) {_shown(scores.kl_multi)} (several), "
        f"{scored.seconds:.2f} s",
    )
    if study is not None and point.params:
        values = None if scores.kl_first is None else (float(scores.refusals), scores.kl_first)
        run.lease.patiently(
            lambda: study.tell(point.number, point.params, point.optuna_number, values)
        )


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


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
