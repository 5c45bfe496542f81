"""Trials: the slots of a job's budget, their scores, and the front.

Every write but `counts` and the readers is fenced: it happens under the job's lock and only for
the holder of the task's lease. A slot belongs to a lease token; when that lease is over, the slot
is an orphan, and the next searcher scores its candidate again under the same number.
"""

from __future__ import annotations

import math
import uuid
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from jobs import analysis, events, queue
from jobs.problems import LeaseLost, NotFound
from jobs.spec.candidate import Candidate, parse
from jobs.spec.job import JobSpec
from jobs.spec.methods import MethodName, turn
from jobs.spec.protocol import Prepared, Scored
from jobs.spec.scores import Outcome, Role, Value
from jobs.tables import Job, Task, Trial, TrialResponses
from jobs.trial_scores import front_of, further

ORIGINAL = -1
MODEL = -2  # what a job that searches nothing scores
Side = Literal["original", "model"]  # in the `result` of such a job
SIDES: dict[int, Side] = {ORIGINAL: "original", MODEL: "model"}


@dataclass(frozen=True)
class Slot:
    """A number that this task may fill. `candidate` is set where it was begun before."""

    number: int
    method: MethodName = "mpoa"
    candidate: Candidate | None = None
    params: dict[str, Any] | None = None


def reserve(session: Session, task: Task, token: int, count: int) -> list[Slot]:
    """At most `count` slots for this task: orphans first, then fresh numbers below job.trials.

    N searchers never overshoot: numbers are given out under the lock of the job's row. The last
    open slots are shared among them, so that all end at about the same time. An empty answer means
    that every slot is complete or in the hands of a live searcher.
    """
    held = queue.fence(session, task.id, token)
    job = session.get_one(Job, held.job_id)
    begun = (Trial.job_id == job.id, Trial.number < job.trials)
    taken = set(session.scalars(select(Trial.number).where(*begun)))
    open_rows = session.scalars(
        select(Trial)
        .where(*begun, Trial.state != "complete")
        .order_by(Trial.number)
        .execution_options(populate_existing=True)
    )
    live = dict(
        session.execute(
            select(Task.lease_token, Task.kind).where(
                Task.job_id == job.id,
                Task.state == "running",
                Task.lease_expires_at > func.clock_timestamp(),
            )
        ).all()
    )
    orphans = [row for row in open_rows if row.state == "failed" or row.lease_token not in live]
    fresh = sorted(set(range(job.trials)) - taken)
    searchers = max(1, list(live.values()).count(held.kind))
    count = min(count, -(-(len(orphans) + len(fresh)) // searchers))
    slots: list[Slot] = []
    for row in orphans[:count]:
        row.state, row.lease_token = "running", token
        known = parse(row.candidate) if row.candidate else None
        method = cast(MethodName, row.method)
        slots.append(Slot(row.number, method, known, row.params if known else None))
    methods = JobSpec.model_validate(job.spec).methods
    for number in fresh[: count - len(slots)]:
        method, _ = turn(methods, number)
        session.add(
            Trial(job_id=job.id, number=number, method=method, candidate={}, lease_token=token)
        )
        slots.append(Slot(number, method))
    session.flush()
    return slots


def _own(session: Session, held: Task, token: int, number: int) -> Trial:
    row = _get(session, held.job_id, number)
    if row is None or row.lease_token != token:
        raise LeaseLost(f"trial {number} is not in the hands of lease {token}")
    return row


def _get(session: Session, job_id: uuid.UUID, number: int) -> Trial | None:
    return session.scalars(
        select(Trial)
        .where(Trial.job_id == job_id, Trial.number == number)
        .execution_options(populate_existing=True)
    ).one_or_none()


def begin(
    session: Session,
    task: Task,
    token: int,
    number: int,
    candidate: Candidate,
    params: dict[str, Any],
    origin: str,
    optuna_number: int | None,
) -> None:
    """Write down what will be scored in a reserved slot, before it is scored. Fenced."""
    row = _own(session, queue.fence(session, task.id, token), token, number)
    if row.state != "running":
        raise LeaseLost(f"trial {number} is {row.state}")
    row.candidate = candidate.model_dump(mode="json")
    row.params = params
    row.origin = origin
    row.optuna_number = optuna_number
    session.flush()


def complete(session: Session, task: Task, token: int, number: int, scored: Scored) -> bool:
    """Set a slot complete, once: False when it already is. Fenced.

    Keeps the outcomes, tells the live views and resets the count of engine deaths in a row.
    """
    held = queue.fence(session, task.id, token)
    known = _get(session, held.job_id, number)
    if known is not None and known.state == "complete":
        return False
    row = _own(session, held, token, number)
    scores = scored.scores
    row.state = "complete"
    row.refusals, row.total = scores.refusals, scores.total
    row.screened = scored.screened
    row.kl_first, row.kl_multi = scores.kl_first, scores.kl_multi
    row.mean_tokens = scores.mean_tokens
    row.values = further(scores)
    row.seconds = scored.seconds
    row.finished_at = func.now()
    held.crashes = 0
    store_outcomes(session, held.job_id, number, scores.role, scored.outcomes)
    session.flush()
    events.append(session, held.job_id, "trial", summary(row))
    return True


def fail(session: Session, task: Task, token: int, number: int, reason: str) -> None:
    """Free a slot whose candidate could not be scored; the next `reserve` gives it out again."""
    held = queue.fence(session, task.id, token)
    row = _own(session, held, token, number)
    if row.state == "complete":
        return
    row.state = "failed"
    row.lease_token = None
    held.crashes += 1
    session.flush()
    events.append(session, held.job_id, "trial", {**summary(row), "reason": reason})


def store_baseline(session: Session, task: Task, token: int, prepared: Prepared) -> None:
    """Keep what `prepare` measured: the job's `prepared`, its commit, the original's answers.

    The first worker's stays: one that was slower to load the model would wipe out what has been
    measured of the original meanwhile (`store_values`). Fenced.
    """
    held = queue.fence(session, task.id, token)
    job = session.get_one(Job, held.job_id, populate_existing=True)
    if job.prepared is not None:
        return
    spec = JobSpec.model_validate(job.spec)
    job.prepared = prepared.model_dump(mode="json", exclude={"baseline_outcomes", "geometry"})
    job.geometry = analysis.stored(prepared.geometry)
    if spec.original is None:
        job.commit = prepared.commit or job.commit
    if spec.kind == "abliterate":  # jobs.results keeps the answers of the others
        for role, outcomes in prepared.baseline_outcomes.items():
            store_outcomes(session, job.id, ORIGINAL, role, outcomes)
    session.flush()
    if prepared.baseline and (spec.kind == "abliterate" or spec.original is not None):
        baseline = {role: scores.model_dump() for role, scores in prepared.baseline.items()}
        events.append(session, job.id, "job", {"state": job.state, "baseline": baseline})


def store_rescored(
    session: Session, task: Task, token: int, number: int, role: Role, scored: Scored
) -> None:
    """Keep a complete trial's scores on another role (held-out, over-refusal). Fenced."""
    held = queue.fence(session, task.id, token)
    row = _get(session, held.job_id, number)
    if row is None or row.state != "complete":
        raise NotFound(f"Trial {number} has not been scored.")
    before = (getattr(row, role) or {}).get("values") if role != "search" else None
    added = {**(before or {}), **further(scored.scores)}  # a benchmark may have been faster
    scores = {**scored.scores.model_dump(mode="json"), "values": added}
    if role == "heldout":
        row.heldout = scores
    elif role == "over_refusal":
        row.over_refusal = scores
    store_outcomes(session, held.job_id, number, role, scored.outcomes)
    session.flush()
    events.append(session, held.job_id, "trial", {**summary(row), role: scores})


def values(session: Session, job: Job, number: int, role: Role) -> dict[str, Any]:
    """The further scores of a trial, or of the original (-1), on a role other than search.

    Of a job that searches nothing: those of its original (-1) or of its model (-2).
    """
    if job.result is not None:
        stored = (job.result.get(SIDES[number]) or {}).get(role) or {}
    elif number == ORIGINAL:
        stored = ((job.prepared or {}).get("baseline") or {}).get(role) or {}
    else:
        stored = getattr(get(session, job.id, number), role) or {}
    return dict(stored.get("values") or {})


def store_values(
    session: Session, task: Task, token: int, number: int, role: Role, found: dict[str, Value]
) -> None:
    """Add further scores to those of a trial or of one of SIDES. Fenced."""
    held = queue.fence(session, task.id, token)
    job = session.get_one(Job, held.job_id, populate_existing=True)
    added = {
        name: value.model_dump(mode="json")
        for name, value in found.items()
        if math.isfinite(value.value)
    }
    merged = {**values(session, job, number, role), **added}
    if job.result is not None:
        side = job.result[SIDES[number]]
        scores = {**side[role], "values": merged}
        job.result = {**job.result, SIDES[number]: {**side, role: scores}}
        session.flush()
        return
    if number == ORIGINAL:
        prepared = job.prepared or {}
        scores = {**prepared["baseline"][role], "values": merged}
        job.prepared = {**prepared, "baseline": {**prepared["baseline"], role: scores}}
        session.flush()
        return
    row = get(session, job.id, number)
    scores = {**(getattr(row, role) or {}), "values": merged}
    setattr(row, role, scores)
    session.flush()
    events.append(session, job.id, "trial", {**summary(row), role: scores})


def store_outcomes(
    session: Session, job_id: uuid.UUID, number: int, role: Role, outcomes: Iterable[Outcome]
) -> None:
    """Write (or replace) what a model said on a role's prompts."""
    plain = [outcome.model_dump() for outcome in outcomes]
    values = {"job_id": job_id, "number": number, "role": role, "outcomes": plain}
    session.execute(
        insert(TrialResponses)
        .values(**values)
        .on_conflict_do_update(
            index_elements=["job_id", "number", "role"], set_={"outcomes": plain}
        )
    )


def summary(row: Trial) -> dict[str, Any]:
    """A trial as events show it."""
    return {
        "number": row.number,
        "state": row.state,
        "method": row.method,
        "origin": row.origin,
        "refusals": row.refusals,
        "total": row.total,
        "screened": row.screened,
        "kl_first": row.kl_first,
        "kl_multi": row.kl_multi,
        "mean_tokens": row.mean_tokens,
        "seconds": row.seconds,
    }


def counts(session: Session, job_id: uuid.UUID) -> dict[str, int]:
    """{"complete", "running", "failed"}: trials of a job by state."""
    rows = session.execute(
        select(Trial.state, func.count()).where(Trial.job_id == job_id).group_by(Trial.state)
    )
    found = {state: int(count) for state, count in rows}
    return {state: found.get(state, 0) for state in ("complete", "running", "failed")}


def list_trials(
    session: Session, job_id: uuid.UUID, *, limit: int = 100, after: int | None = None
) -> list[Trial]:
    """Trials numbered above `after`, by number, at most `limit`."""
    query = select(Trial).where(Trial.job_id == job_id).order_by(Trial.number).limit(limit)
    if after is not None:
        query = query.where(Trial.number > after)
    return list(session.scalars(query))


def get(session: Session, job_id: uuid.UUID, number: int) -> Trial:
    """One trial. NotFound."""
    row = _get(session, job_id, number)
    if row is None:
        raise NotFound(f"The job has no trial {number}.")
    return row


def responses(session: Session, job_id: uuid.UUID, number: int) -> dict[Role, list[Outcome]]:
    """What a trial's model said, per role, in the prompts' order; number -1 is the original."""
    rows = session.scalars(
        select(TrialResponses).where(
            TrialResponses.job_id == job_id, TrialResponses.number == number
        )
    )
    found: dict[Role, list[Outcome]] = {}
    for row in rows:
        found[row.role] = [  # type: ignore[index]
            Outcome.model_validate(outcome) for outcome in row.outcomes
        ]
    return found


def front(session: Session, job_id: uuid.UUID) -> list[Trial]:
    """Pareto-optimal complete trials by the job's objectives, the best by the first one first."""
    objectives = _objectives(session, job_id)
    return front_of(_complete(session, job_id), objectives)


def fronts_by_method(session: Session, job_id: uuid.UUID) -> dict[str, list[Trial]]:
    """The front that each method has by itself."""
    objectives = _objectives(session, job_id)
    rows: defaultdict[str, list[Trial]] = defaultdict(list)
    for row in _complete(session, job_id):
        rows[row.method].append(row)
    return {method: front_of(mine, objectives) for method, mine in rows.items()}


def to_check(session: Session, job_id: uuid.UUID) -> list[Trial]:
    """What is scored again on held-out prompts: all that a front or a comparison shows.

    The job's front, the front of each method (one that another method dominates must still be
    compared), and each method's single pass, what is had without a search.
    """
    chosen = {row.number: row for row in front(session, job_id)}
    for mine in fronts_by_method(session, job_id).values():
        chosen |= {row.number: row for row in mine}
    passes = select(Trial).where(
        Trial.job_id == job_id, Trial.state == "complete", Trial.origin == "single_pass"
    )
    chosen |= {row.number: row for row in session.scalars(passes)}
    return [chosen[number] for number in sorted(chosen)]


def _objectives(session: Session, job_id: uuid.UUID) -> list[str]:
    return list(JobSpec.model_validate(session.get_one(Job, job_id).spec).objectives)


def _complete(session: Session, job_id: uuid.UUID) -> list[Trial]:
    return list(
        session.scalars(
            select(Trial)
            .where(Trial.job_id == job_id, Trial.state == "complete")
            .order_by(Trial.number)
        )
    )
