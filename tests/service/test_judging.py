"""A job with a judge: real worker, database and HTTP; the engine only speaks the protocol."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs import trials
from jobs.database import Sessions
from jobs.problems import Invalid
from jobs.settings import Settings
from jobs.tables import Job
from tests.service.judge_server import judge_server
from tests.service.processes import (
    fake_engine,
    make_model,
    make_owner,
    submit_job,
    wait_until,
    worker,
)


def run_job(
    make_settings: Callable[..., Settings],
    sessions: Sessions,
    folder: Path,
    judge: dict[str, Any],
) -> tuple[uuid.UUID, str]:
    """A job of three trials with that judge, to its end; its id and what the worker said."""
    make_model(folder / "models")
    judges = {"grader": judge}
    settings = make_settings(models=folder / "models", judges=judges, reconcile_seconds=0.5)
    owner = make_owner(sessions)
    job_id = submit_job(sessions, settings, owner, trials=3, scorers=["judge"], judge="grader")
    engine = fake_engine(folder / "orders")
    with worker(settings, folder, engine, NULLSPACE_JUDGES=json.dumps(judges)):

        def over() -> bool:
            with sessions() as session:
                return session.get_one(Job, job_id).state in ("completed", "failed")

        wait_until(over, 60)
    logs = "".join(path.read_text() for path in settings.logs.glob("*.log"))
    return job_id, logs


def judged(sessions: Sessions, job_id: uuid.UUID) -> dict[int, Any]:
    """The judge's value by trial, the original's under -1."""
    with sessions() as session:
        job = session.get_one(Job, job_id)
        assert job.state == "completed", job.error
        numbers = [trials.ORIGINAL, *(row.number for row in trials.to_check(session, job_id))]
        return {n: trials.values(session, job, n, "heldout").get("judge") for n in numbers}


def test_an_endpoint_judges_the_front(
    make_settings: Callable[..., Settings], sessions: Sessions, tmp_path: Path
) -> None:
    with judge_server() as server:
        judge = {"url": server.judge.url, "model": "grader", "key": "k-1"}
        job_id, _ = run_job(make_settings, sessions, tmp_path, judge)
        found = judged(sessions, job_id)
        assert len(found) >= 2 and len(server.requests) == 10 * len(found)
    assert (found[-1]["value"], found[-1]["n"]) == (1.0, 10)  # the original cannot
    for number, value in found.items():
        if number != trials.ORIGINAL:
            assert (value["value"], value["low"], value["n"]) == (0.0, 0.0, 10)
            assert value["high"] == pytest.approx(0.2775, abs=1e-3)  # Wilson of 0 of 10


def test_a_local_model_judges(
    make_settings: Callable[..., Settings], sessions: Sessions, tmp_path: Path
) -> None:
    """The engine repeats the question, whose last word of the two is ANSWERED."""
    job_id, _ = run_job(make_settings, sessions, tmp_path, {"model": "fake"})
    assert {value["value"] for value in judged(sessions, job_id).values()} == {0.0}


def test_an_absent_judge_costs_only_the_verdicts(
    make_settings: Callable[..., Settings], sessions: Sessions, tmp_path: Path
) -> None:
    judge = {"url": "http://127.0.0.1:9/v1", "model": "grader"}
    job_id, logs = run_job(make_settings, sessions, tmp_path, judge)
    assert set(judged(sessions, job_id).values()) == {None}
    assert "no verdict on 10 of 10 answers" in logs


def test_a_judge_without_room_costs_only_the_verdicts(
    make_settings: Callable[..., Settings], sessions: Sessions, tmp_path: Path
) -> None:
    """Its owner could not mend it: the job must not pause for ever."""
    (tmp_path / "orders").mkdir()
    refusal = {"reason": "out_of_memory", "message": "The judge does not fit."}
    (tmp_path / "orders" / "refuse-respond").write_text(json.dumps(refusal))
    job_id, logs = run_job(make_settings, sessions, tmp_path, {"model": "fake"})
    assert set(judged(sessions, job_id).values()) == {None}
    assert "The judge does not fit." in logs


def test_judges_are_the_operators(
    make_settings: Callable[..., Settings], sessions: Sessions, tmp_path: Path
) -> None:
    make_model(tmp_path / "models")
    settings = make_settings(models=tmp_path / "models")
    with pytest.raises(Invalid, match="NULLSPACE_JUDGES") as caught:
        submit_job(sessions, settings, make_owner(sessions), scorers=["judge"], judge="mine")
    assert caught.value.field == "judge"
