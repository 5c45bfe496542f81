"""The search task: reserve slots, ask Optuna, score, write, tell; until no slot is free.

Each method of the job is searched in a study of its own; they take turns (`methods.turn`).
Order of the writes, which is what makes a crash at any point harmless:
1. `begin`: our row has the candidate before the engine sees it;
2. `complete`: our row has the scores, once, in one transaction with the event;
3. `tell`: Optuna learns of it. A crash between 2 and 3 is mended at the next claim.

Where the engine scores each candidate by itself, whenever a trial is told the next one joins the
request that runs, so that the engine never waits; where several share a batch, a whole batch is
told before the next is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from sqlalchemy.orm import Session

from jobs import screening, trials
from jobs.spec import scorers
from jobs.spec.memory import CANDIDATES
from jobs.spec.methods import METHODS, MethodName
from jobs.spec.protocol import Prepared, Score, Scored, ScoredBatch
from jobs.tables import Job
from worker import spool
from worker.points import Point, Studies, is_ara, point_of, together
from worker.run import Run
from worker.study import MethodStudy, Values, told
from worker.window import Window


def search(run: Run) -> None:
    """Score candidates until every slot is complete or in the hands of another live worker."""
    prepared = run.prepare()
    studies = _studies(run, prepared.anatomy.layers)
    hand = Search(run, studies, prepared)
    while hand.go_on():
        run.lease.check()
    _mend(run, studies)


class Search:
    """The points that a worker has in hand, and what becomes of them.

    search = Search(run, studies, prepared)
    while search.go_on(): ...                  # a request each
    """

    def __init__(self, run: Run, studies: Studies, prepared: Prepared) -> None:
        self._run, self._studies, self._prepared = run, studies, prepared
        methods = run.spec.methods
        # A second method's points would wait for a request of their own; a choice of direction is
        # a request itself.
        self._joins = prepared.ahead > 0 and len(methods) == 1 and methods[0] in studies
        self._size = run.batch_size(prepared.ahead if self._joins else CANDIDATES)
        # a full batch of each kind of request in every round
        screened = screening.applies(run.spec, "sampler")
        kinds = {(is_ara(method), method if screened else "") for method in studies}
        self._window: Window[Point, Scored] = Window(self._size * max(1, len(kinds)))

    def go_on(self) -> bool:
        """One request to the engine; False where there is nothing to score."""
        report(self._run)
        if self._joins or not self._window.open:
            self._take(self._window.room)
            self._settle()
        waiting = together(self._window.open, self._size)
        if waiting:
            self._score(waiting[0])
            self._settle()
        return bool(waiting)

    def _take(self, count: int) -> None:
        """Take points in hand, at most `count`: written down, and finished if their score lies in
        the spool."""
        run = self._run
        slots = run.write(lambda session: trials.reserve(session, run.task, run.token, count))
        points = [point_of(run, self._studies, slot, self._prepared) for slot in slots]
        if not points:
            return
        run.write(partial(_begin, run, points))
        for point in self._with_finished(points):
            self._window.take(point.number, point)
        for point in points:
            spooled = spool.take(
                run.station.settings.spool, run.job.id, point.number, point.candidate
            )
            if spooled is not None:
                self._finish(point, spooled)

    def _with_finished(self, points: Sequence[Point]) -> list[Point]:
        """The points with the trials that may screen them: other workers' too, as of now, but none
        that the sampler does not know of."""
        run, found = self._run, dict[MethodName, list[dict[str, float]]]()
        for point in points:
            if screening.applies(run.spec, point.origin) and point.method not in found:
                found[point.method] = run.lease.write(partial(self._front, point.method))
        return [
            replace(point, finished=found[point.method])
            if screening.applies(run.spec, point.origin)
            else point
            for point in points
        ]

    def _front(self, method: MethodName, session: Session) -> list[dict[str, float]]:
        run, untold = self._run, self._window.untold
        return screening.finished(session, run.job.id, method, run.spec.objectives, untold)

    def _score(self, batch: list[Point]) -> None:
        """Score a batch, and what joins it. Each score is written as soon as it arrives."""
        run, asked = self._run, list(batch)

        def finish(index: int, scored: Scored | None) -> None:
            if scored is not None:
                self._finish(asked[index], scored)

        def join() -> None:
            if not self._joins:
                return
            self._settle()
            known = {point.number for point in asked}
            new = [point for point in self._window.open if point.number not in known]
            for group in together(new, self._size):
                run.add([point.candidate for point in group], group[0].finished)
                asked.extend(group)

        result = run.ask(
            Score(
                candidates=[point.candidate for point in batch],
                finished=batch[0].finished,
                scorers=scorers.of_trials(run.spec.objectives, run.spec.scorers),
                kl_multi="kl_multi" in (*run.spec.objectives, *run.spec.scorers),
                joined=self._joins,
            ),
            on_partial=lambda answer: finish(answer.index, answer.scored),
            on_progress=run.searching,
            after=join,
        )
        scores = ScoredBatch.model_validate(result.value).scored
        for point, scored in zip(batch, scores, strict=True):
            if point in self._window.open:
                self._finish(point, scored)

    def _finish(self, point: Point, scored: Scored) -> None:
        """Write a score down, at once; its turn to be told comes later."""
        run, folder = self._run, self._run.station.settings.spool
        kept = spool.Spooled(candidate=point.candidate, scored=scored)
        run.write(
            lambda session: trials.complete(session, run.task, run.token, point.number, scored),
            on_outage=lambda: spool.keep(folder, run.job.id, point.number, kept),
        )
        spool.drop(folder, run.job.id, point.number)
        said = f"trial {point.number} ({point.method}, {point.origin}): {_said(scored)}"
        run.log.line("info", said)
        self._window.finish(point.number, scored)

    def _settle(self) -> None:
        """Tell the sampler what is finished, in order; where points join, take one for each."""
        while (done := self._window.next_told()) is not None:
            point, scored = done
            study = self._studies.get(point.method)
            if study is not None and point.params:
                values = _values(self._run, scored)
                self._run.lease.patiently(partial(_tell, study, point, values))
            if self._joins:
                self._take(1)
            report(self._run)


def _studies(run: Run, layers: int) -> dict[MethodName, MethodStudy]:
    """A study for each method that is searched, brought up to our table."""
    spec, storage, budget = run.spec, run.station.storage, run.job.trials

    def open_all() -> dict[MethodName, MethodStudy]:
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


def _tell(study: MethodStudy, point: Point, values: Values | None) -> None:
    study.tell(point.number, point.params, point.optuna_number, values)


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


def report(run: Run) -> None:
    """ "searching k/n", counted anew."""
    run.searched, run.budget = run.lease.write(partial(_counted, run))
    run.progress("searching", run.searched, run.budget)


def _counted(run: Run, session: Session) -> tuple[int, int]:
    """Complete trials, and how many there will be: more may have been asked for meanwhile."""
    job = session.get_one(Job, run.job.id)
    return trials.counts(session, job.id)["complete"], job.trials
