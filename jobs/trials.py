"""Trials: the slots of a job's budget, their scores, and the front.

Every write but `counts` and the readers is fenced: it happens under the job's lock and only for
the holder of the task's lease. A slot belongs to a lease token; when that lease is over, the slot
is an orphan, and the next searcher scores its candidate again under the same number.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from jobs import events, queue
from jobs.problems import LeaseLost, NotFound
from jobs.spec.candidate import Candidate
from jobs.spec.protocol import Prepared, Scored
from jobs.spec.scores import Outcome, Role
from jobs.tables import Job, Task, Trial, TrialResponses

ORIGINAL = -1


@dataclass(frozen=True)
class Slot:
    """A number that this task may fill. `candidate` is set where it was begun before."""

    number: int
    candidate: Candidate | None = None
    params: dict[str, Any] | None = None


def reserve(session: Session, task: Task, token: int, count: int) -> list[Slot]:
    """At most `count` slots for this task: orphans first, then fresh numbers below job.trials.

    N searchers never overshoot: numbers are given out under the lock of the job's row. An empty
    answer means that every slot is complete or in the hands of a live searcher.
    """
    held = queue.fence(session, task.id, token)
    job = session.get_one(Job, held.job_id)
    rows = list(
        session.scalars(
            select(Trial)
            .where(Trial.job_id == job.id)
            .order_by(Trial.number)
            .execution_options(populate_existing=True)
        )
    )
    live = set(
        session.scalars(
            select(Task.lease_token).where(
                Task.job_id == job.id,
                Task.state == "running",
                Task.lease_expires_at > func.clock_timestamp(),
            )
        )
    )
    slots: list[Slot] = []
    for row in rows:
        if len(slots) == count:
            return slots
        orphan = row.state == "failed" or (row.state == "running" and row.lease_token not in live)
        if not orphan or row.number >= job.trials:
            continue
        row.state, row.lease_token = "running", token
        begun = Candidate.model_validate(row.candidate) if row.candidate else None
        slots.append(Slot(row.number, begun, row.params if begun else None))
    taken = {row.number for row in rows}
    for number in range(job.trials):
        if len(slots) >= count:
            break
        if number not in taken:
            session.add(Trial(job_id=job.id, number=number, candidate={}, lease_token=token))
            slots.append(Slot(number))
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
    row.kl_first, row.kl_multi = scores.kl_first, scores.kl_multi
    row.mean_tokens = scores.mean_tokens
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
    """Keep what `prepare` measured: the job's `prepared`, its commit, the original's answers."""
    held = queue.fence(session, task.id, token)
    job = session.get_one(Job, held.job_id)
    first = job.prepared is None
    job.prepared = prepared.model_dump(mode="json", exclude={"baseline_outcomes"})
    job.commit = prepared.commit or job.commit
    for role, outcomes in prepared.baseline_outcomes.items():
        store_outcomes(session, job.id, ORIGINAL, role, outcomes)
    session.flush()
    if first:
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
    scores = scored.scores.model_dump(mode="json")
    if role == "heldout":
        row.heldout = scores
    elif role == "over_refusal":
        row.over_refusal = scores
    store_outcomes(session, held.job_id, number, role, scored.outcomes)
    session.flush()
    events.append(session, held.job_id, "trial", {**summary(row), role: scores})


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
        "origin": row.origin,
        "refusals": row.refusals,
        "total": row.total,
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
    """Pareto-optimal complete trials (least refusals and kl_first), fewest refusals first."""
    rows = list(
        session.scalars(
            select(Trial)
            .where(
                Trial.job_id == job_id,
                Trial.state == "complete",
                Trial.refusals.is_not(None),
                Trial.kl_first.is_not(None),
            )
            .order_by(Trial.refusals, Trial.kl_first, Trial.number)
        )
    )
    points = [(float(row.refusals or 0), float(row.kl_first or 0.0)) for row in rows]
    return [rows[index] for index in pareto(points)]


def pareto(points: list[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other point dominates (both minimised), in ascending order.

    pareto([(0, 3), (1, 1), (2, 2)])  # [0, 1]
    Equal points do not dominate one another. NaN is never on the front. O(n log n).
    """
    known = [(a, b, i) for i, (a, b) in enumerate(points) if a == a and b == b]
    best_before, found, start = float("inf"), [], 0
    known.sort()
    while start < len(known):
        # all points of one first coordinate: the least second one counts
        end = start
        while end < len(known) and known[end][0] == known[start][0]:
            end += 1
        least = known[start][1]
        if least < best_before:
            found += [i for _, b, i in known[start:end] if b == least]
            best_before = least
        start = end
    return sorted(found)
