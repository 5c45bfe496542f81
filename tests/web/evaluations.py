"""Jobs without a search, and benchmarks of a trial, written as a worker would."""

from __future__ import annotations

import random
import uuid
from typing import Any

from jobs import benchmarks, control, progress, queue, results, trials
from jobs.database import Sessions
from jobs.results import NUMBERS
from jobs.settings import Settings
from jobs.spec.job import JobSpec
from jobs.spec.protocol import PromptTexts, Scored
from jobs.spec.scores import Outcome, Role, Scores, Value
from jobs.tables import User
from jobs.trials import Side
from tests.web import invented, seed

TASKS = ["arc_easy", "gsm8k"]
METRICS = {"arc_easy": ("acc", "acc_norm"), "gsm8k": ("exact_match.strict-match",)}


def figures(task: str, number: int, limit: int | None = None) -> dict[str, Value]:
    """What the harness might say; the same for the same task and number."""
    noise = random.Random(f"{task}{number}")
    found = {}
    for metric in METRICS.get(task, ("acc",)):
        share = round(0.4 + 0.3 * noise.random(), 4)
        margin = {"low": share - 0.031, "high": share + 0.031}
        found[f"{task}.{metric}"] = Value(value=share, n=limit or 1319, **margin)
    return found


def scored(texts: list[str], role: Role, refusals: int, kl: float | None, said: str) -> Scored:
    """Scores and answers of one side."""
    values = {"log_odds": Value(value=2.5 - refusals / 20, low=-6.0, high=6.0, n=len(texts))}
    if kl:
        values["length"] = Value(value=1.04, low=0.97, high=1.12, n=len(texts))
    scores = Scores(
        role=role, refusals=refusals, total=len(texts), kl_first=kl,
        kl_multi=None if kl is None else 2 * kl, mean_tokens=21.5, values=values,
    )  # fmt: skip
    outcomes = [
        Outcome(refused=n < refusals, text="I cannot help with that." if n < refusals else said)
        for n in range(len(texts))
    ]
    return Scored(scores=scores, outcomes=outcomes)


def submitted(sessions: Sessions, settings: Settings, user: User, **spec: Any) -> uuid.UUID:
    """A queued job without a search."""
    with sessions.begin() as session:
        return seed.submit_job(session, settings, user, **spec)


def evaluated(
    sessions: Sessions,
    settings: Settings,
    user: User,
    *,
    original: str | None = "small",
    hostile: str = "",
    finish: bool = True,
) -> uuid.UUID:
    """An evaluate job with scores of both sides and figures of two tasks."""
    job_id = submitted(
        sessions, settings, user, kind="evaluate", name="Edited against its original",
        original=original, tasks=TASKS, scorers=["length", "log_odds"],
    )  # fmt: skip
    noise = random.Random(3)
    with sessions.begin() as session:
        claim = queue.claim(session, seed.worker(session), settings)
        assert claim is not None and claim.task.kind == "evaluate"
        task, token = claim.task, claim.token
        texts = PromptTexts.model_validate(claim.job.prompts)
        spec = JobSpec.model_validate(claim.job.spec)
    prepared = invented.prepared(texts, noise)
    with sessions.begin() as session:
        trials.store_baseline(session, task, token, prepared)
    roles: dict[Role, list[str]] = {
        "search": texts.search_harmful,
        "heldout": texts.heldout_harmful,
    }
    said = "First take a cloth. Then rub the lamp. It shines." + hostile
    model: dict[Role, Scored] = {
        role: scored(lines, role, 4, 0.0134 if original else 0.0, said)
        for role, lines in roles.items()
    }
    first: dict[Role, Scored] = {
        role: scored(lines, role, 97, 0.0, said) for role, lines in roles.items()
    }
    found: dict[Side, dict[Role, Scored]] = {"model": model}
    if original:
        found["original"] = first
    with sessions.begin() as session:
        warnings = ["The edited model brings a chat template of its own." + hostile]
        results.store(session, task, token, found, "3f2a9c41d07b", warnings)
    for side in results.sides(spec):
        for name in TASKS[: 2 if finish else 1]:
            with sessions.begin() as session:
                number = NUMBERS[side]
                benchmarks.store(session, task, token, (number, name, None), figures(name, number))
    with sessions.begin() as session:
        if finish:
            queue.release(session, task.id, token, state="done")
        else:
            text = "the model, gsm8k: 120 forwards" + hostile
            progress.report(session, task, token, "benchmarks", 1, 2, text)
    return job_id


def benchmarked(
    sessions: Sessions, settings: Settings, user: User, job_id: uuid.UUID, number: int,
    *, error: dict[str, str] | None = None,
) -> None:  # fmt: skip
    """A benchmark of a trial that is done, or has failed with `error`."""
    with sessions.begin() as session:
        job = control.editable(session, user, job_id)
        asked = benchmarks.request(session, user, job, number, ["arc_easy"], 200)
    while True:
        with sessions.begin() as session:
            claim = queue.claim(session, seed.worker(session), settings)
            assert claim is not None
        if claim.task.id == asked.id:
            break
    with sessions.begin() as session:
        for each in () if error else (trials.ORIGINAL, number):
            what = (each, "arc_easy", 200)
            benchmarks.store(session, claim.task, claim.token, what, figures("arc_easy", each, 200))
        state = "failed" if error else "done"
        queue.release(session, asked.id, claim.token, state=state, error=error)  # type: ignore[arg-type]
