"""What a worker would write, written by hand: claims, trials, artifacts."""

from __future__ import annotations

import hashlib
import uuid

from jobs import artifacts, queue, trials, workers
from jobs.database import Sessions
from jobs.queue import Claim
from jobs.settings import Settings
from jobs.spec.candidate import single_pass
from jobs.spec.protocol import Exported, ExportedFile, Scored
from jobs.spec.scores import Outcome, Scores


def claim(sessions: Sessions, settings: Settings) -> Claim:
    """The next task, in the hands of a new worker."""
    with sessions.begin() as session:
        worker = workers.register(
            session,
            name="by-hand",
            host="here",
            pid=1,
            accepts=["search", "evaluate", "export", "chat", "benchmark"],
            device={"kind": "cpu", "name": "test", "memory_bytes": 10**11},
            versions={},
        )
        found = queue.claim(session, worker, settings)
        assert found is not None
        return found


def score(sessions: Sessions, held: Claim, refusals: int, kl: float) -> int:
    """Reserve, begin and complete one trial; its number."""
    with sessions.begin() as session:
        slot = trials.reserve(session, held.task, held.token, 1)[0]
        candidate = single_pass(8)
        trials.begin(session, held.task, held.token, slot.number, candidate, {}, "sampler", None)
    outcomes = [Outcome(refused=n < refusals, text=f"answer {n}", tokens=3) for n in range(8)]
    scores = Scores(role="search", refusals=refusals, total=8, kl_first=kl, kl_multi=kl)
    with sessions.begin() as session:
        scored = Scored(scores=scores, outcomes=outcomes, seconds=1.0)
        assert trials.complete(session, held.task, held.token, slot.number, scored)
    return slot.number


def finish(sessions: Sessions, held: Claim) -> None:
    """Release the task as done."""
    with sessions.begin() as session:
        queue.release(session, held.task.id, held.token, state="done")


def whole_job(sessions: Sessions, settings: Settings, refusals: list[int]) -> None:
    """Run the only job to its end; one trial per entry of `refusals`, KL rising."""
    held = claim(sessions, settings)
    for number, count in enumerate(refusals):
        score(sessions, held, count, 0.01 * (number + 1))
    finish(sessions, held)
    finish(sessions, claim(sessions, settings))  # the evaluation


def export(sessions: Sessions, settings: Settings, artifact: str, files: dict[str, bytes]) -> None:
    """Claim the export task and make the artifact ready with these files."""
    held = claim(sessions, settings)
    folder = artifacts.folder(settings, uuid.UUID(artifact))
    made = []
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        made.append(ExportedFile(name=name, size=len(data), sha256=digest))
    with sessions.begin() as session:
        exported = Exported(files=made)
        artifacts.mark_ready(session, held.task, held.token, uuid.UUID(artifact), exported)
        queue.release(session, held.task.id, held.token, state="done")
