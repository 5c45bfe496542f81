"""One claimed task while it runs: the lease, the engine, the log, the progress."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from sqlalchemy.orm import Session

from jobs import models, progress, results, trials
from jobs.queue import Claim
from jobs.spec import scorers
from jobs.spec.candidate import Candidate
from jobs.spec.job import JobSpec
from jobs.spec.memory import CANDIDATES
from jobs.spec.methods import needs_affine, needs_ara, needs_router, recipes
from jobs.spec.protocol import (
    NOTHING,
    Partial,
    Prepare,
    Prepared,
    Progress,
    PromptTexts,
    Purpose,
    Request,
    Result,
)
from jobs.tables import Job
from jobs.trials import Side
from worker.lease import Lease
from worker.problems import Interrupted
from worker.station import Station
from worker.task_log import TaskLog

T = TypeVar("T")
PROGRESS_SECONDS = 0.5  # live pages need no more than two a second


class Run:
    """What the functions of `worker.tasks.TASKS` are handed."""

    def __init__(self, station: Station, claim: Claim, lease: Lease, log: TaskLog) -> None:
        self.station, self.lease, self.log = station, lease, log
        self.job, self.task, self.token = claim.job, claim.task, claim.token
        self.spec = JobSpec.model_validate(claim.job.spec)
        self._reported_at = 0.0
        self._phase = ""
        self.searched, self.budget = 0, claim.job.trials  # as last counted

    def write(self, act: Callable[[Session], T], on_outage: Callable[[], None] | None = None) -> T:
        """A transaction that outlasts an outage, and a nudge for the live pages after it."""
        value = self.lease.write(act, on_outage)
        self.station.doorbell.nudge(self.job.id)
        return value

    def progress(self, phase: str, done: float = 0, total: float = 0, text: str = "") -> None:
        """Say how far the task is. Dropped when it comes too soon or the database is away."""
        now = time.monotonic()
        if phase == self._phase and done < total and now - self._reported_at < PROGRESS_SECONDS:
            return
        self._phase, self._reported_at = phase, now
        if self.lease.attempt(
            lambda session: progress.report(
                session, self.task, self.token, phase, done, total, text
            )
        ):
            self.station.doorbell.nudge(self.job.id)

    def ask(
        self,
        request: Request,
        on_partial: Callable[[Partial], None] = lambda partial: None,
        on_progress: Callable[[Progress], None] | None = None,
        after: Callable[[], None] = lambda: None,
    ) -> Result:
        """One request to the prepared engine; its progress is the task's unless told otherwise.

        `after` is called after each answer, while the request may still go on: it may `add`. When
        its owner pauses or cancels the job, the engine may finish what it is at: those
        partial answers still come before Interrupted is raised.
        """
        engine = self.station.engine
        if engine is None:
            raise RuntimeError("prepare() comes first")
        try:
            for answer in engine.request(request, self.lease.check):
                if isinstance(answer, Progress):
                    self._pass_on(answer, on_progress)
                elif isinstance(answer, Partial):
                    on_partial(answer)
                elif isinstance(answer, Result):
                    return answer
                after()
        except Interrupted as interrupted:
            if interrupted.cause in ("pause", "cancel"):
                for partial in engine.stop(self.station.own.stop_seconds):
                    on_partial(partial)
            raise
        raise RuntimeError("a request ends in a result or an exception")

    def add(self, candidates: Sequence[Candidate], finished: list[dict[str, float]]) -> None:
        """Candidates for the `score` that is being asked, with the trials that may screen them."""
        if self.station.engine is not None:
            self.station.engine.add(candidates, finished)

    def searching(self, inner: Progress) -> None:
        """ "searching k/n", as last counted, with what the engine is at."""
        text = f"{inner.phase} {inner.done:g}/{inner.total:g}"
        self.progress("searching", self.searched, self.budget, text)

    def _pass_on(self, answer: Progress, to: Callable[[Progress], None] | None) -> None:
        if to is not None:
            to(answer)
        else:
            self.progress(answer.phase, answer.done, answer.total, answer.text)

    def prepare(self) -> Prepared:
        """An engine that is ready for this job: the warm one if it is, else a new one."""
        if self.spec.kind == "abliterate":
            request = self.request_for("model", "abliterate")
        else:
            request = self.request_for(results.sides(self.spec)[0], "evaluate")
        prepared = self.prepare_for(request)
        if self.job.prepared is None:
            self.write(
                lambda session: trials.store_baseline(session, self.task, self.token, prepared)
            )
        return prepared

    def prepare_for(self, request: Prepare) -> Prepared:
        """An engine that is ready for `request`."""
        _, ready = self.station.engine_for(request, self.log)
        if ready and self.station.prepared is not None:
            self.log.line("info", "the engine is still prepared for this job")
            prepared = self.station.prepared[1]
        else:
            self.progress("starting the engine")
            prepared = Prepared.model_validate(self.ask(request).value)
            self.station.note_prepared(request, prepared)
        return prepared

    def batch_size(self, usual: int = CANDIDATES) -> int:
        """How many candidates to have in hand: the operator's setting goes first."""
        return self.station.own.batch or usual

    def request_for(self, side: Side, purpose: Purpose) -> Prepare:
        """What makes an engine ready for the job's model, or for the one that it compares with."""
        spec, settings = self.spec, self.station.settings
        prompts = NOTHING
        if purpose != "respond":
            stored = self.lease.write(lambda session: session.get_one(Job, self.job.id).prompts)
            prompts = PromptTexts.model_validate(stored)
        model, revision = spec.model, self.job.commit or spec.revision
        if side == "original" and spec.original is not None:
            model, revision = spec.original, self.task.payload.get("original")
        path = models.local_path(model, settings)
        return Prepare(
            model=model,
            revision=revision,
            path=str(path) if path is not None else None,
            quantization=spec.quantization,
            dtype=spec.dtype,
            device=spec.device,
            device_map=spec.device_map,
            purpose=purpose,
            recipes=recipes(spec.methods),
            ara=needs_ara(spec.methods),
            affine=needs_affine(spec.methods),
            router=needs_router(spec.methods),
            allow_partial=spec.allow_partial,
            scorers=scorers.of_engine(spec.objectives, spec.scorers),
            prompts=prompts,
            system_prompt=spec.system_prompt,
            max_new_tokens=spec.max_new_tokens,
            kl_tokens=spec.kl_tokens,
            markers=spec.markers,
            seed=spec.seed,
        )
