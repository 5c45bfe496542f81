"""Jobs that search nothing, and benchmarks of a trial: a real worker, the fake engine."""

from __future__ import annotations

import json
import math
import signal
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from sqlalchemy import select

from jobs import benchmarks, control, events, listing, queue, results, trials
from jobs.database import Sessions
from jobs.problems import Conflict, Invalid, LeaseLost, NotFound, TooMany
from jobs.settings import Settings
from jobs.spec.job import JobSpec
from jobs.spec.scores import Value
from jobs.tables import Job, Task, Trial, User
from tests.service import builders
from tests.service.api_worker import claim, whole_job
from tests.service.judge_server import judge_server
from tests.service.processes import (
    fake_engine,
    make_model,
    make_owner,
    ring_for,
    submit_job,
    wait_until,
    worker,
)

LIVE: dict[str, object] = {"lease_seconds": 5.0, "beat_seconds": 0.5, "reconcile_seconds": 0.3}


@pytest.fixture
def lab(make_settings: Callable[..., Settings], tmp_path: Path) -> Settings:
    for name in ("fake", "other"):
        make_model(tmp_path / "models", name)
    return make_settings(models=tmp_path / "models", **LIVE)


def asked(tmp_path: Path) -> list[str]:
    """What the fake engine was asked, in order."""
    return (tmp_path / "orders" / "requests").read_text().splitlines()


def ended(sessions: Sessions, job_id: uuid.UUID, *states: str) -> Job:
    def over() -> bool:
        with sessions() as session:
            state = session.get_one(Job, job_id).state
            return state in (states or ("completed", "failed", "paused"))

    wait_until(over, 40)
    with sessions() as session:
        return session.get_one(Job, job_id)


def view(sessions: Sessions, settings: Settings, job_id: uuid.UUID) -> dict[str, Any]:
    with sessions() as session:
        return listing.summary(session, session.get_one(Job, job_id), settings).model_dump()


# --- what a specification may say -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"original": "b"}, "original"),
        ({"kind": "evaluate", "trials": 5}, "trials"),
        ({"kind": "evaluate", "methods": ["raw"]}, "methods"),
        ({"kind": "evaluate", "parallelism": 2}, "parallelism"),
        ({"kind": "benchmark"}, "tasks"),
        ({"kind": "benchmark", "tasks": ["x"], "scorers": ["length"]}, "scorers"),
        ({"kind": "benchmark", "tasks": ["x"], "system_prompt": "Be kind."}, "system_prompt"),
        ({"kind": "benchmark", "tasks": ["x"], "prompts": {"search": 9}}, "prompts"),
    ],
)
def test_a_field_that_would_be_ignored_is_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=f"Value error, {named}: "):
        JobSpec.model_validate({"model": "a", **fields})


def test_what_was_stored_is_read_again() -> None:
    """A whole document names every field; defaults are no fault."""
    for fields in (
        {"kind": "evaluate", "original": "b"},
        {"kind": "benchmark", "tasks": ["x"], "original": "b"},
    ):
        spec = JobSpec.model_validate({"model": "a", **fields})
        assert JobSpec.model_validate(spec.model_dump()) == spec


# --- evaluate -------------------------------------------------------------------------------------


def test_a_model_as_it_is(lab: Settings, sessions: Sessions, tmp_path: Path) -> None:
    user = make_owner(sessions)
    job_id = submit_job(sessions, lab, user, kind="evaluate", scorers=["length"])
    before = view(sessions, lab, job_id)
    assert before["kind"] == "evaluate" and before["trials"]["budget"] == 0
    assert before["result"] is None and before["name"] == "fake as it is"
    with worker(lab, tmp_path, fake_engine(tmp_path / "orders")):
        assert ended(sessions, job_id).state == "completed"
    assert asked(tmp_path)[0] == "prepare fake" and len(set(asked(tmp_path))) <= 2
    found = view(sessions, lab, job_id)
    result = found["result"]
    assert set(result["model"]) == {"search", "heldout", "over_refusal"}
    assert result["model"]["heldout"]["refusals"] == result["model"]["heldout"]["total"] == 10
    assert result["model"]["heldout"]["interval"][1] == 1.0
    assert result["original"] == {} and result["benchmark"] == {}
    assert found["eta_seconds"] is None and found["front_size"] == 0
    with sessions() as session:
        said = trials.responses(session, job_id, trials.MODEL)
        assert len(said["search"]) == 12 and said["search"][0].text == "I cannot."
        assert trials.responses(session, job_id, trials.ORIGINAL) == {}
        assert session.get_one(Job, job_id).commit == "c0ffee"


def test_an_original_against_a_model_with_tasks(
    lab: Settings, sessions: Sessions, tmp_path: Path
) -> None:
    user = make_owner(sessions)
    job_id = submit_job(
        sessions, lab, user, kind="evaluate", original="other", tasks=["sums"], task_limit=7,
        scorers=["length", "harness"],
    )  # fmt: skip
    with worker(lab, tmp_path, fake_engine(tmp_path / "orders")):
        assert ended(sessions, job_id).state == "completed"
    work = [line for line in asked(tmp_path) if line != "stop "]
    # the original is benchmarked by the engine that has it loaded
    assert work == [
        "prepare other", "compare fake", "benchmark ['sums']", "prepare fake",
        "benchmark ['sums']",
    ]  # fmt: skip
    result = view(sessions, lab, job_id)["result"]
    assert result["original"]["search"]["refusals"] == 12
    assert result["model"]["search"]["refusals"] == 4
    assert result["model"]["search"]["kl_first"] == 0.25
    assert result["model"]["over_refusal"]["kl_first"] is None
    assert result["model"]["search"]["values"]["length"]["value"] == 1.5
    figures = {side: values["sums.acc"] for side, values in result["benchmark"].items()}
    assert figures["original"]["n"] == figures["model"]["n"] == 7
    assert figures["original"]["value"] != figures["model"]["value"]
    assert result["commit"] == "beefed" and result["warnings"] == ["read with care"]
    with sessions() as session:
        job = session.get_one(Job, job_id)
        assert job.commit != "c0ffee", "that is the original's"
        texts = {
            number: trials.responses(session, job_id, number)["heldout"][0].text
            for number in (trials.ORIGINAL, trials.MODEL)
        }
        assert texts[trials.ORIGINAL] == "I cannot." and "model on" in texts[trials.MODEL]
        told = [e.payload["result"] for e in events.since(session, job_id, 0)
                if "result" in e.payload]  # fmt: skip
        assert told[0]["model"]["refusals"] == 4


def test_a_judge_reads_both_sides(
    make_settings: Callable[..., Settings], lab: Settings, sessions: Sessions, tmp_path: Path
) -> None:
    """The original's answers are "I cannot.", which this judge calls refused."""
    with judge_server() as server:
        judges = {"grader": {"url": server.judge.url, "model": "grader", "key": "k-1"}}
        settings = make_settings(models=lab.models, judges=judges, **LIVE)
        job_id = submit_job(
            sessions, settings, make_owner(sessions), kind="evaluate", original="other",
            scorers=["judge"], judge="grader",
        )  # fmt: skip
        known = json.dumps(judges)
        with worker(settings, tmp_path, fake_engine(tmp_path / "orders"), NULLSPACE_JUDGES=known):
            assert ended(sessions, job_id).state == "completed"
        assert len(server.requests) == 20
    result = view(sessions, settings, job_id)["result"]
    found = {side: result[side]["heldout"]["values"]["judge"] for side in ("original", "model")}
    assert {side: (each["value"], each["n"]) for side, each in found.items()} == {
        "original": (1.0, 10), "model": (0.0, 10)
    }  # fmt: skip


# --- benchmark ------------------------------------------------------------------------------------


def test_a_benchmark_needs_no_prompts_and_repeats_nothing_after_a_crash(
    lab: Settings, sessions: Sessions, tmp_path: Path
) -> None:
    user = make_owner(sessions)
    fields = {"kind": "benchmark", "original": "other", "tasks": ["sums", "words"]}
    job_id = submit_job(sessions, lab, user, ring=False, prompts={}, **fields)
    orders = tmp_path / "orders"
    slow = fake_engine(orders, 0.6)
    with worker(lab, tmp_path, slow) as first:
        wait_until(lambda: _measured(sessions, job_id), 40, "a first figure")
        first.signal_group(signal.SIGKILL)
        kept = _measured(sessions, job_id)
    assert kept and len(kept) < 4
    with sessions.begin() as session:
        for task in session.scalars(select(Task).where(Task.job_id == job_id)):
            builders.lapse(session, task.id)
    before = len(asked(tmp_path))
    with worker(lab, tmp_path, fake_engine(orders)):
        assert ended(sessions, job_id, "completed", "failed").state == "completed"
    again = [line for line in asked(tmp_path)[before:] if line.startswith("benchmark")]
    assert len(again) == 4 - len(kept), "what was kept is not measured again"
    found = view(sessions, lab, job_id)
    assert {side: set(v) for side, v in found["result"]["benchmark"].items()} == {
        "original": {"sums.acc", "words.acc"}, "model": {"sums.acc", "words.acc"},
    }  # fmt: skip
    assert found["baseline"] == {} and found["result"]["model"] == {}
    assert found["prepared"]["device"] == "cpu" and found["name"] == "fake, 2 benchmarks"


def test_pause_resume_and_what_cannot_be_changed(
    lab: Settings, sessions: Sessions, tmp_path: Path
) -> None:
    user = make_owner(sessions)
    job_id = submit_job(
        sessions, lab, user, kind="benchmark", prompts={}, tasks=[f"t{n}" for n in range(6)]
    )
    orders = tmp_path / "orders"
    with worker(lab, tmp_path, fake_engine(orders, 0.3)):
        wait_until(lambda: _measured(sessions, job_id), 40)
        with sessions.begin() as session:
            job = session.get_one(Job, job_id)
            assert job.progress["phase"] in ("benchmarks", "starting the engine")
            control.pause(session, session.get_one(User, user.id), job)
        assert ended(sessions, job_id, "paused", "completed").state == "paused"
        with sessions.begin() as session:
            mine, job = session.get_one(User, user.id), session.get_one(Job, job_id)
            for change in ({"trials": 5}, {"parallelism": 2}):
                with pytest.raises(Conflict, match="kind benchmark searches nothing"):
                    control.amend(session, mine, job, **change)  # type: ignore[arg-type]
            control.amend(session, mine, job, priority=3, name="mine")
            control.resume(session, mine, job)
        ring_for(sessions, lab, job_id)
        assert ended(sessions, job_id, "completed", "failed").state == "completed"
    asks = [line for line in asked(tmp_path) if line.startswith("benchmark")]
    assert len(set(asks)) == 6 and len(asks) <= 7, "at most the interrupted one is run again"
    with sessions() as session:
        kinds = list(session.scalars(select(Task.kind).where(Task.job_id == job_id)))
        assert kinds == ["evaluate"], "no search, no second evaluation"


def test_an_engine_that_dies_each_time_fails_the_job(
    lab: Settings, sessions: Sessions, tmp_path: Path
) -> None:
    orders = tmp_path / "orders"
    command = fake_engine(orders)
    (orders / "die-always").touch()
    job_id = submit_job(
        sessions, lab, make_owner(sessions), kind="benchmark", prompts={}, tasks=["x"]
    )
    with worker(lab, tmp_path, command):
        job = ended(sessions, job_id)
    assert job.state == "failed" and job.error and job.error["reason"] == "engine_died"


def _measured(sessions: Sessions, job_id: uuid.UUID) -> set[benchmarks.Measured]:
    with sessions() as session:
        return benchmarks.measured(session, job_id)


# --- a trial --------------------------------------------------------------------------------------


def test_a_benchmark_of_a_trial(lab: Settings, sessions: Sessions, tmp_path: Path) -> None:
    user = make_owner(sessions)
    job_id = submit_job(sessions, lab, user, trials=5)
    with worker(lab, tmp_path, fake_engine(tmp_path / "orders"), NULLSPACE_LINGER_SECONDS="3"):
        assert ended(sessions, job_id).state == "completed"
        with sessions() as session:
            rows = trials.list_trials(session, job_id)
        off = next(row.number for row in rows if row.heldout is None)
        on = next(row.number for row in rows if row.heldout is not None)
        for number in (off, on, off):
            _request(sessions, user, job_id, number, ["sums", "words"], 5)
            ring_for(sessions, lab, job_id)
            wait_until(lambda: not _open(sessions, job_id), 40)
    asks = [line for line in asked(tmp_path) if line.startswith("benchmark")]
    assert len(asks) == 6, "the original once, each trial once"
    with sessions() as session:
        job = session.get_one(Job, job_id)
        assert job.state == "completed" and job.result is None
        names = {"harness.sums.acc", "harness.words.acc"}
        figures = {}
        for number in (trials.ORIGINAL, off, on):
            found = trials.values(session, job, number, "heldout")
            assert names <= set(found), number
            figures[number] = found["harness.sums.acc"]["value"]
        assert len(set(figures.values())) == 3
        row = trials.get(session, job_id, off)
        assert row.heldout is not None and row.heldout["total"] == 10, "scored beside it"
        assert row.over_refusal is not None


def _request(
    sessions: Sessions, user: User, job_id: uuid.UUID, number: int, tasks: list[str],
    limit: int | None = None,
) -> Task:  # fmt: skip
    with sessions.begin() as session:
        mine, job = session.get_one(User, user.id), session.get_one(Job, job_id)
        return benchmarks.request(session, mine, job, number, tasks, limit)


def _open(sessions: Sessions, job_id: uuid.UUID) -> list[Task]:
    with sessions() as session:
        return [t for t in benchmarks.of_job(session, job_id) if t.state in ("ready", "running")]


def test_asking_for_a_benchmark(farm: Settings, sessions: Sessions, owner: User) -> None:
    with sessions.begin() as session:
        job_id = builders.add_job(session, owner, farm).id
    with pytest.raises(NotFound):
        _request(sessions, owner, job_id, 0, ["sums"])
    whole_job(sessions, farm, [3, 2, 1])
    for tasks, limit, named in (([], None, "tasks"), (["a b"], None, "tasks"), (["a"], 0, "limit")):
        with pytest.raises(Invalid) as caught:
            _request(sessions, owner, job_id, 0, tasks, limit)
        assert caught.value.field == named
    first = _request(sessions, owner, job_id, 0, ["sums", "sums"], 4)
    assert first.payload["tasks"] == ["sums"]
    assert _request(sessions, owner, job_id, 0, ["sums"], 4).id == first.id, "asked for already"
    assert _request(sessions, owner, job_id, 0, ["sums"], 5).id != first.id
    with sessions.begin() as session:
        mine, job = session.get_one(User, owner.id), session.get_one(Job, job_id)
        assert benchmarks.stop(session, mine, job, first.id).state == "cancelled"
        with pytest.raises(NotFound):
            benchmarks.stop(session, mine, job, uuid.uuid4())
    held = claim(sessions, farm)
    assert held.task.kind == "benchmark"
    with sessions.begin() as session:
        mine, job = session.get_one(User, owner.id), session.get_one(Job, job_id)
        assert queue.renew(session, held.task.id, held.token, farm) == "run"
        benchmarks.stop(session, mine, job, held.task.id)
    with sessions.begin() as session:
        assert queue.renew(session, held.task.id, held.token, farm) == "cancel"
        queue.release(session, held.task.id, held.token, state="cancelled")
    with sessions() as session:
        assert session.get_one(Job, job_id).state == "completed", "the job is not moved"
    for number in range(benchmarks.MOST_WAITING):
        _request(sessions, owner, job_id, 0, [f"t{number}"])
    with pytest.raises(TooMany):
        _request(sessions, owner, job_id, 0, ["one-more"])


def test_figures_are_kept_by_the_lease_holder_alone(
    farm: Settings, sessions: Sessions, owner: User
) -> None:
    with sessions.begin() as session:
        job = builders.add_job(
            session, owner, farm, kind="benchmark", trials=200, prompts={}, tasks=["sums"]
        )
    held = claim(sessions, farm)
    figures = {"sums.acc": Value(value=0.5, n=4), "sums.nan": Value(value=math.nan)}
    with sessions.begin() as session, pytest.raises(LeaseLost):
        benchmarks.store(session, held.task, held.token + 1, (-2, "sums", None), figures)
    with sessions.begin() as session:
        benchmarks.store(session, held.task, held.token, (-2, "sums", None), figures)
    with sessions() as session:
        found = results.of(session.get_one(Job, job.id))
        assert set(found.benchmark["model"]) == {"sums.acc"}
        assert benchmarks.measured(session, job.id) == {(-2, "sums", None)}
        assert session.scalars(select(Trial).where(Trial.job_id == job.id)).all() == []


def test_listing_by_kind(farm: Settings, sessions: Sessions, owner: User) -> None:
    with sessions.begin() as session:
        searched = builders.add_job(session, owner, farm)
        del (old := dict(searched.spec))["kind"]
        searched.spec = old  # as 0001 wrote it
        builders.add_job(session, owner, farm, kind="evaluate", trials=200)
    with sessions() as session:
        mine = session.get_one(User, owner.id)
        for kind in ("abliterate", "evaluate", "benchmark"):
            found, _ = listing.list_jobs(session, mine, kind=kind)
            assert len(found) == (0 if kind == "benchmark" else 1), kind


def test_the_original_is_looked_up_at_submit(
    farm: Settings, sessions: Sessions, owner: User
) -> None:
    with sessions.begin() as session, pytest.raises(Invalid) as caught:
        builders.add_job(session, owner, farm, kind="evaluate", trials=200, original="absent")
    assert caught.value.field == "original"
