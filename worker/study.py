"""The Optuna study of one method of a job: `job-<id>-<method>` in the schema `optuna`.

Our `trials` table is the truth and is always written first; Optuna only learns from it. What a
crash left between the two is mended by `mend` when a worker claims the study. Optuna's own
heartbeats are not used: they work inside `study.optimize` alone.
"""

from __future__ import annotations

import datetime as dt
import math
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from jobs.database import bounded, normal_url
from jobs.spec.candidate import Candidate
from jobs.spec.job import JobSpec
from jobs.spec.methods import MethodName, share
from jobs.tables import Trial
from jobs.trial_scores import objectives_of
from worker.samplers import check, sampler, startup
from worker.space import candidate_from, plain, plain_number, space

SCHEMA = "optuna"
SLOT = "slot"  # user attribute of trials that were added complete: our trial number
LOCK = 0x6E73_6F70  # advisory lock: one process at a time makes the tables, or adds to a study

Values = tuple[float, ...]

optuna.logging.set_verbosity(optuna.logging.WARNING)


def open_storage(database_url: str, idle_seconds: float) -> RDBStorage:
    """Optuna's storage, its schema and tables made on the way if they are missing.

    `idle_seconds`: see `worker.database.bounded`.
    """
    url = normal_url(database_url)
    with create_engine(url, poolclass=NullPool).connect() as connection:
        connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": LOCK})
        connection.execute(text(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}"))
        connection.commit()
        storage = RDBStorage(
            bounded(database_url, idle_seconds, SCHEMA),
            engine_kwargs={"pool_pre_ping": True, "pool_size": 2, "max_overflow": 2},
        )
        connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": LOCK})
        connection.commit()
    return storage


def startup_trials(spec: JobSpec, budget: int, method: MethodName) -> int:
    """How many of a method's trials are random: its part of the job's, if that has its own figure.

    `budget`: the job's trials, all methods together.
    """
    mine = share(spec.methods, budget, method)
    if spec.startup_trials is None:
        return startup(mine)
    return math.ceil(spec.startup_trials * mine / budget)


def told(spec: JobSpec, values: Values, screened: bool) -> Values:
    """What a sampler is told of a trial that has these objectives.

    Of a screened one the refusals are not known; that all prompts are refused serves the search
    best (docs/search.md): it ranks behind all that were decoded.
    """
    if not screened:
        return values
    worst = float(spec.prompts.search)
    pairs = zip(spec.objectives, values, strict=True)
    return tuple(worst if name == "refusals" else value for name, value in pairs)


class MethodStudy:
    """Asks for points and is told scores of one method of a job.

    Minimised: the job's objectives. Sampling reads a copy of the study in memory, kept up by
    one query a trial, and a point is stored in one transaction: asking through the database makes
    about 180 round trips a trial, more than a small model takes to be scored. EngineError where the
    job's sampler needs a package that is missing.
    """

    def __init__(
        self,
        storage: RDBStorage,
        job_id: object,
        spec: JobSpec,
        method: MethodName,
        layers: int,
        budget: int,
    ) -> None:
        check(spec.sampler)
        self.spec, self.method, self.layers = spec, method, layers
        self.space: dict[str, BaseDistribution] = space(layers, method)
        self._startup = startup_trials(spec, budget, method)
        directions = [StudyDirection.MINIMIZE] * len(spec.objectives)
        self._engine = storage.engine
        self._storage = optuna.storages.get_storage(storage)
        self._study = optuna.create_study(
            storage=self._storage,
            study_name=f"job-{job_id}-{method}",
            directions=directions,
            load_if_exists=True,
        )
        self._id = self._storage.get_study_id_from_name(self._study.study_name)
        self._copy = optuna.create_study(directions=directions)
        self._copied: dict[int, int | None] = {}  # number in the study → number in the copy
        self._running: set[int] = set()  # of the study, as far as the copy knows

    def ask(self, number: int) -> tuple[dict[str, Any], int | None]:
        """A new point for the method's own trial `number`, and Optuna's number for it.

        (None for the plain point, which Optuna learns of with its score.)
        """
        if number == plain_number(self.method):
            return plain(self.layers, self.method), None
        self._refresh()
        self._copy.sampler = sampler(self.spec.seed, self._startup, number, self.spec.sampler)
        point = self._copy.ask(fixed_distributions=self.space)
        params = dict(point.params)
        stored = create_trial(state=TrialState.RUNNING, params=params, distributions=self.space)
        try:
            trial_id = self._storage.create_new_trial(self._id, stored)
        except Exception:
            self._copy.tell(point, state=TrialState.FAIL)  # asked again, it must not stay open
            raise
        optuna_number = self._storage.get_trial_number_from_id(trial_id)
        self._copied[optuna_number] = point.number
        self._running.add(optuna_number)
        return params, optuna_number

    def tell(
        self,
        number: int,
        params: dict[str, Any],
        optuna_number: int | None,
        values: Values | None,
    ) -> None:
        """The score of the job's trial `number`, once. None, or what is not finite, is a failure.

        A point that Optuna did not hand out itself, or has closed, is added as a finished trial.
        """
        good = values is not None and all(math.isfinite(value) for value in values)
        known = None
        if optuna_number is not None:
            known = self._close(optuna_number, values if good else None)
        if known is None and good and params:
            self._add(number, params, values)

    def _add(self, number: int, params: dict[str, Any], values: Values | None) -> None:
        """Add a finished trial, once: two workers may find at the same time that it is missing."""
        with self._engine.begin() as connection:
            lock = text("SELECT pg_advisory_xact_lock(:key, :study)")
            connection.execute(lock, {"key": LOCK, "study": self._id})
            if number not in self._added():
                self._study.add_trial(
                    create_trial(
                        values=values,
                        params=params,
                        distributions=self.space,
                        user_attrs={SLOT: number},
                    )
                )

    def _close(self, optuna_number: int, values: Values | None) -> TrialState | None:
        """Finish a trial of the study; None when it is not there or was closed without a score."""
        state = TrialState.COMPLETE if values is not None else TrialState.FAIL
        try:
            trial_id = self._storage.get_trial_id_from_study_id_trial_number(
                self._id, optuna_number
            )
            self._storage.set_trial_state_values(trial_id, state, values)
            return state
        except KeyError:
            return None
        except UpdateFinishedTrialError:
            before = self._storage.get_trial(trial_id).state
            return before if before == TrialState.COMPLETE else None

    def _refresh(self) -> None:
        """Bring the copy up to the study: other workers' points, and scores of all."""
        for trial in self._study.get_trials(deepcopy=False):
            if trial.number not in self._copied:
                self._copied[trial.number] = None
                if trial.state in (TrialState.RUNNING, TrialState.COMPLETE):
                    self._copied[trial.number] = len(self._copy.get_trials(deepcopy=False))
                    self._copy.add_trial(trial)
                if trial.state == TrialState.RUNNING:
                    self._running.add(trial.number)
            elif trial.number in self._running and trial.state.is_finished():
                self._running.discard(trial.number)
                own = self._copied[trial.number]
                if own is not None:
                    self._copy.tell(own, trial.values, state=trial.state)

    def candidate(self, params: dict[str, Any]) -> Candidate:
        """The candidate of a point."""
        return candidate_from(params, self.layers, self.method)

    def mend(self, rows: list[Trial], lease_seconds: float) -> None:
        """Bring Optuna up to our table after crashes, other workers' included. `rows`: the job's.

        - complete rows that Optuna does not know as complete are told;
        - running Optuna trials that no row names are told FAIL once they are too old to be
          between another worker's ask and its first write.
        Rows that are still running are left: their slot is scored again, and then told.
        """
        rows = [row for row in rows if row.method == self.method]
        known = {trial.number: trial for trial in self._study.get_trials(deepcopy=False)}
        added = self._added()
        for row in rows:
            state = known[row.optuna_number].state if row.optuna_number in known else None
            learned = state == TrialState.COMPLETE or row.number in added
            if row.state == "complete" and row.params and not learned:
                found = objectives_of(row, self.spec.objectives)
                values = None if found is None else told(self.spec, found, row.screened)
                self.tell(row.number, row.params, row.optuna_number, values)
        named = {row.optuna_number for row in rows}
        before = dt.datetime.now() - dt.timedelta(seconds=2 * lease_seconds)
        for number, trial in known.items():
            stray = trial.state == TrialState.RUNNING and number not in named
            if stray and (trial.datetime_start is None or trial.datetime_start < before):
                self._study.tell(number, state=TrialState.FAIL, skip_if_finished=True)

    def _added(self) -> set[int]:
        trials = self._study.get_trials(deepcopy=False)
        return {trial.user_attrs[SLOT] for trial in trials if SLOT in trial.user_attrs}
